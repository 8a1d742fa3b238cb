"""Tables that a spreadsheet shows and does not compute."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowsam_monai.files import LOCK, PART, read_csv, remove_parts, write_csv

CELLS = st.text(st.sampled_from("=+-@'\t\r\n,\"ab1."), min_size=1, max_size=5)


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), columns=st.tuples(CELLS, CELLS))
def test_texts_come_back_as_they_were_and_none_is_a_formula(tmp_path_factory, rows, columns):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    table = [dict(zip(columns, row)) for row in rows]
    write_csv(path, table)
    assert read_csv(path) == table
    with open(path, newline="") as file:
        for cell in (cell for row in csv.reader(file) for cell in row):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
                float(cell)


def test_numbers_stay_numbers(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "dice": -0.5, "text": "-0.25"}, {"epoch": 2, "more": "nan"}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["epoch,dice,text,more", "1,-0.5,-0.25,", "2,,,nan"]


@pytest.mark.parametrize("text", ["a,b\n1\n", "a\n1,2\n"])
def test_torn_row_is_an_error(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match="row 1 has more or fewer columns than the first line"):
        read_csv(tmp_path / "a.csv")


def test_parts_of_another_run_and_files_of_others_stay(tmp_path):
    other = tmp_path / "other_run"
    (tmp_path / "validation_slices").mkdir()
    other.mkdir()
    (other / LOCK).touch()
    own = [tmp_path / f"run.json.0123abcd{PART}", tmp_path / "validation_slices" / f"a.png.0123abcd{PART}"]
    others = [other / f"run.json.0123abcd{PART}", tmp_path / f"mine{PART}"]
    for path in (*own, *others):
        path.touch()
    remove_parts(tmp_path)
    assert not any(path.exists() for path in own) and all(path.exists() for path in others)
