"""Files are whole or not there, tables cannot compute, and checkpoints are finite and read without running code."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowsam_monai.data import inference_items, load_datalist, unlabeled_items
from knowsam_monai.data.check import check_dataset
from knowsam_monai.files import (
    LOCK,
    PART,
    InvalidCheckpointError,
    copy_whole,
    iter_csv,
    read_tensor_file,
    remove_parts,
    save_checkpoint,
    write_csv,
    write_tensor_file,
    write_whole,
)
from knowsam_monai.runs import SKDSettings, StudentCheckpointLoader
from knowsam_monai.runs.bundle_folder import config_file, find_bundle
from knowsam_monai.runs.host_trainer import _distiller
from knowsam_monai.runs.prediction import predict_folder
from knowsam_monai.runs.report import write_report
from knowsam_monai.teachers import NetworkTeacher, SAMTeacher
from knowsam_monai.teachers.sam2_model import read_sam2_checkpoint
from tests.full_disk import full_disk
from tests.same_bits import assert_same_bits

CELLS = st.text(st.sampled_from("=+-@'\t\r\n,\"ab1."), min_size=1, max_size=5)


@settings(deadline=None)  # a busy machine is no fault
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), columns=st.tuples(CELLS, CELLS))
def test_texts_come_back_as_they_were_and_none_is_a_formula(tmp_path_factory, rows, columns):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    table = [dict(zip(columns, row)) for row in rows]
    write_csv(path, table)
    assert list(iter_csv(path)) == table
    with open(path, newline="") as file:
        for cell in (cell for row in csv.reader(file) for cell in row):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
                float(cell)


def teacher_of_zoo_overlay(path):
    return _distiller(SKDSettings("*.nii", sam_checkpoint=path), torch.rand(1, 1, 32, 32), 2, overlapping=False)


ENTRIES = {
    "SAM": lambda path: SAMTeacher(num_classes=2, image_size=32, checkpoint=path),
    "SAM of a Zoo overlay": teacher_of_zoo_overlay,
    "SAM 2": lambda path: read_sam2_checkpoint(path, "tiny", config=None),
    "TorchScript": lambda path: NetworkTeacher.from_torchscript(path, 2),
    "bundle as a teacher": lambda path: NetworkTeacher.from_bundle(path, 2),
    "student": lambda path: StudentCheckpointLoader(path, torch.nn.Identity()).load(),
    "data list": lambda path: load_datalist(f"{path}.json", ""),
    "data folder": lambda path: load_datalist(path, ""),
    "data check": check_dataset,
    "images": inference_items,
    "report": write_report,
    "--bundle": find_bundle,
    "predict --bundle": lambda path: predict_folder("scans", path, "out"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("written", ["~/no such", "$STUDIES/no such", "${STUDIES}/no such"])
def test_home_folder_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch, written, entry):
    for variable in ("HOME", "STUDIES"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises((OSError, ValueError), match=re.escape(f"{tmp_path}/no such")):
        ENTRIES[entry](written)


@pytest.mark.parametrize("home", ["~", "$STUDIES"])
def test_paths_in_lists_and_names_of_configs_are_expanded(tmp_path, monkeypatch, home):
    folder = tmp_path / "US$HOME"  # of the list: as it is
    folder.mkdir()
    for variable in ("HOME", "STUDIES"):
        monkeypatch.setenv(variable, str(tmp_path))
    for path in (tmp_path / "a.nii", tmp_path / "b.nii", folder / "$STUDIES.nii"):
        path.touch()
    section = [{"image": [f"{home}/a.nii", "$STUDIES.nii"], "label": f"{home}/b.nii"}]
    (folder / "list.json").write_text(json.dumps({"labeled": section}))
    (tmp_path / "list.json").write_text(json.dumps([f"{home}/a.nii"]))
    first = [{"image": [f"{tmp_path}/a.nii", f"{folder}/$STUDIES.nii"], "label": f"{tmp_path}/b.nii"}]
    assert load_datalist(folder / "list.json", "", required=["labeled"])["labeled"] == first
    images = [{"image": f"{tmp_path}/a.nii"}]
    for written in (f"{home}/list.json", f"{home}/a*.nii", [f"{home}/a.nii"]):
        assert unlabeled_items(written) == images
    assert config_file(Path("bundles/knowsam_acdc"), f"{home}/a.nii") == tmp_path / "a.nii"
    cache = SAMTeacher(2, 32, "stand_in", "procedural", encoder="cached", cache_dir=f"{home}/cache").cache
    assert cache.folder == tmp_path / "cache"


def test_numbers_stay_numbers(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "dice": -0.5, "text": "-0.25"}, {"epoch": 2, "more": "nan"}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["epoch,dice,text,more", "1,-0.5,-0.25,", "2,,,nan"]


@pytest.mark.parametrize("text", ["a,b\n1\n", "a\n1,2\n"])
def test_torn_row_is_an_error(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match="row 1 has more or fewer columns than the first line"):
        list(iter_csv(tmp_path / "a.csv"))


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


SMALL, LARGE = {"weight": torch.zeros(2)}, {"weight": torch.rand(500_000)}


def test_file_is_loaded_without_running_code_and_others_may_read_it(tmp_path):
    save_checkpoint(SMALL, tmp_path / "new" / "a.pt")
    assert torch.equal(torch.load(tmp_path / "new" / "a.pt", weights_only=True)["weight"], SMALL["weight"])
    assert stat.S_IMODE((tmp_path / "new" / "a.pt").stat().st_mode) == 0o666 & ~_umask()


def test_full_disk_is_one_sentence_and_leaves_the_file_before(tmp_path):
    save_checkpoint(SMALL, tmp_path / "a.pt")
    sentence = "must have room for a.pt but it could not be written to .*; free some space"
    with full_disk(), pytest.raises(RuntimeError, match=sentence):
        save_checkpoint(LARGE, tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert torch.equal(torch.load(tmp_path / "a.pt")["weight"], SMALL["weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_never_written(tmp_path, value):
    content = {"good": torch.ones(2), "count": torch.tensor(3), "state": {0: [torch.tensor([1.0, value])]}}
    with pytest.raises(RuntimeError, match=r"must be finite in a checkpoint but `state` is not"):
        save_checkpoint(content, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_writer_that_fails_half_way_leaves_the_file_before(tmp_path):
    (tmp_path / "a").write_bytes(b"before")

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", write)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_table_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "folder" / "a.csv", [{"epoch": 1, "dice": 0.5}, {"epoch": 2, "teacher": "a,b"}])
    assert (tmp_path / "folder" / "a.csv").read_bytes() == b'epoch,dice,teacher\r\n1,0.5,\r\n2,,"a,b"\r\n'
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.csv"]


def test_copy_takes_the_place_of_an_older_one_and_of_itself_nothing(tmp_path):
    source, target = tmp_path / "a", tmp_path / "folder" / "b"
    source.write_bytes(b"content")
    copy_whole(source, target)
    assert target.read_bytes() == b"content"
    copy_whole(source, source)
    assert source.read_bytes() == b"content"


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    def die(file):
        parts.extend(tmp_path.rglob("*"))
        raise KeyboardInterrupt

    parts = []
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "folder" / "a.pt", die)
    parts[1].touch()  # as a SIGKILL leaves it
    theirs = {tmp_path / name for name in ("a.pt", "video.mp4.part", "a.pt.x1.part")}
    for path in theirs:
        path.touch()
    remove_parts(tmp_path)
    assert set(tmp_path.iterdir()) == {*theirs, tmp_path / "folder"} and not list((tmp_path / "folder").iterdir())


def test_writing_leaves_the_umask_of_the_process_alone(tmp_path, monkeypatch):
    before = _umask()
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("other threads write with it"))
    save_checkpoint(SMALL, tmp_path / "a.pt")
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o666 & ~before


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.fixture
def written(tmp_path):
    """A file of weights and plain values, and what is in it."""
    torch.manual_seed(0)
    state = {"network": {f"layer{i}.weight": torch.randn(40, 30) for i in range(6)}, "trainer": {"epoch": 3}, "x": 0.5}
    with open(tmp_path / "a.pt", "x+b") as file:
        write_tensor_file(state, file)
    return tmp_path / "a.pt", state


def test_every_flipped_bit_is_refused_or_harmless(written):
    """Anywhere: in weights, in the zip's headers and its directory, in the checksum."""
    path, state = written
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    places = [*range(300), *range(len(whole) - 1000, len(whole)), *(draw.randrange(len(whole)) for _ in range(300))]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = read_tensor_file(path)
        except InvalidCheckpointError:
            refused += 1
        else:
            assert_same_bits(found, state)
    assert refused >= len(places) - 15  # those that hit the mark before the checksum


def test_file_with_a_checksum_is_a_zip_like_any_other(written):
    path, state = written
    assert_same_bits(read_tensor_file(path), state)
    assert_same_bits(torch.load(path, weights_only=True), state)
    assert_same_bits(torch.load(path, weights_only=True, mmap=True), state)


@pytest.mark.parametrize("as_zip", [True, False])
def test_other_programs_files_are_read_and_flipped_weights_in_their_zip_refused(written, tmp_path, as_zip):
    _, state = written
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=as_zip)
    assert_same_bits(read_tensor_file(tmp_path / "b.pt"), state)
    content = bytearray((tmp_path / "b.pt").read_bytes())
    content[content.index(state["network"]["layer3.weight"].numpy().tobytes()) + 7] ^= 64
    (tmp_path / "b.pt").write_bytes(content)
    if as_zip:
        with pytest.raises(InvalidCheckpointError, match="is damaged"):
            read_tensor_file(tmp_path / "b.pt")


def test_flipped_weights_are_called_damaged(written):
    path, state = written
    content = bytearray(path.read_bytes())
    start = content.index(state["network"]["layer3.weight"].numpy().tobytes())
    for i in range(200):
        content[start + 16 * i] ^= 64
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"] == 0.5  # torch itself takes it
    with pytest.raises(
        InvalidCheckpointError, match=r"^\(\d+ bytes\) is damaged: its checksum does not match its content$"
    ):
        read_tensor_file(path)
