from __future__ import annotations

import pytest

from knowsam_monai.data.split import (
    existing_file,
    listed_names,
    read_json,
    split_training,
    unknown_folder,
    without_labels,
)

SIX = list("abcdef")


def test_first_are_labeled_and_last_are_held_out():
    assert split_training(SIX, 2, 0, (2, 6)) == (["a", "b"], ["c", "d", "e", "f"], [])
    assert split_training(SIX, 2, 3, (2, 6)) == (["a", "b"], ["c"], ["d", "e", "f"])
    assert split_training(SIX, 6, 0, (2, 6)) == (SIX, [], [])


@pytest.mark.parametrize("labeled", [0, 3, True, "2", None, 2.0])
def test_unpublished_number_of_labeled_patients_is_refused(labeled):
    with pytest.raises(ValueError, match=r"`labeled_patients` must be one of \[1, 2\] but is"):
        split_training(SIX, labeled, 0, (1, 2))


@pytest.mark.parametrize("holdout", [-1, 5, 1.0])
def test_more_held_out_than_unlabeled_is_refused(holdout):
    with pytest.raises(ValueError, match=f"from 0 to 4 with 2 labeled patients but is {holdout}"):
        split_training(SIX, 2, holdout, (2,))


def test_list_shorter_than_the_protocol_is_refused():
    with pytest.raises(ValueError, match="at most the 6 patients of the training list but is 8"):
        split_training(SIX, 8, 0, (8,))


def test_unlabeled_items_lose_the_key_and_the_others_keep_it():
    items = [{"image": "a", "label": "b", "patient": "p"}]
    assert without_labels(items) == [{"image": "a", "patient": "p"}]
    assert items[0]["label"] == "b"


def test_missing_file_is_named_with_what_it_is_part_of(tmp_path):
    (tmp_path / "there").touch()
    assert existing_file(tmp_path / "there", "all") == str(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=f"must contain the images but {tmp_path / 'gone'} is missing"):
        existing_file(tmp_path / "gone", "the images")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_of_a_list_are_read_with_or_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "train.list").write_text("case 1\npart/..2\n", encoding=encoding)
    assert listed_names(tmp_path / "train.list") == ["case", "1", "part/..2"]


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "/a", "."])
def test_name_that_may_leave_its_folder_is_refused(tmp_path, name):
    (tmp_path / "train.list").write_text(f"a\n{name}\n")
    with pytest.raises(ValueError, match="`train.list` must only have names in its own folder but .* has '"):
        listed_names(tmp_path / "train.list")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": {"c": 2, "d": 3, "d": 4}}', "the key 'd' appears twice"),
        ("[" * 100_000, "it is nested too deeply"),
        ("{", "Expecting"),
    ],
)
def test_json_that_cannot_be_meant_is_an_error(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "list.json")
    with pytest.raises(ValueError, match="^No such file or directory$"):
        read_json(tmp_path / "gone.json")


def test_data_list_in_an_unknown_folder_is_named_and_another_json_is_not(tmp_path):
    (tmp_path / "a.json").write_text('{"labels": []}')
    assert "use the folder that contains" in str(unknown_folder(tmp_path, ["one form"]))
    (tmp_path / "b.json").write_text('{"labeled": []}')
    assert f"use its data list {tmp_path}/b.json" in str(unknown_folder(tmp_path, ["one form"]))


def test_unknown_folder_lists_every_form_and_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, found in [
        ("file", "is a file"),
        ("empty", "is empty"),
        ("gone", "does not exist"),
        ("", "contains none"),
    ]:
        message = str(unknown_folder(tmp_path / name, ("one form", "another")))
        assert f"must be one form, another or a data-list *.json but {tmp_path / name} {found}" in message
