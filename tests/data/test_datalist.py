from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from knowsam_monai.data import load_datalist
from tests.data.test_acdc import write_pack
from tests.data.test_left_atrium import write as write_left_atrium

SMALL = {"num_labeled": 1, "num_unlabeled": 1, "num_validation": 1, "num_test": 0, "max_size": 32}


def write_json(folder: Path, **sections) -> Path:
    """A data list whose files exist (empty: a data list is not read further)."""
    content = {
        "labeled": [{"image": "images/a.nii.gz", "label": "labels/a.nii.gz"}],
        "unlabeled": [{"image": "images/b.nii.gz"}],
        "validation": [{"image": "images/c.nii.gz", "label": "labels/c.nii.gz"}],
    }
    content.update(sections)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(exist_ok=True)
        for name in "abcd":
            (folder / kind / f"{name}.nii.gz").touch()
    path = folder / "data.json"
    path.write_text(json.dumps(content))
    return path


def test_without_a_data_set_the_phantom_is_written_once_and_said_loudly(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        first = load_datalist(None, tmp_path / "phantom", phantom=SMALL)
    assert "SYNTHETIC PHANTOM" in caplog.text and "is ignored" not in caplog.text
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert load_datalist(None, tmp_path / "phantom", labeled_patients=3, phantom=SMALL) == first
    assert "`labeled_patients` is ignored." in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")} == written
    assert {name: len(items) for name, items in first.items()} == {
        "labeled": 2,
        "unlabeled": 2,
        "validation": 2,
        "test": 0,
    }


def test_with_a_data_set_no_phantom_is_written(tmp_path):
    folder = write_pack(tmp_path / "acdc")
    datalist = load_datalist(folder, tmp_path / "phantom", labeled_patients=3)
    assert len(datalist["labeled"]) == 68
    assert not (tmp_path / "phantom").exists()


@pytest.mark.parametrize("form", ["official", "pack"])
def test_left_atrium_data_is_told_by_what_is_in_the_folder(tmp_path, form):
    write_left_atrium(tmp_path / "LA" / "Training Set", form)
    datalist = load_datalist(tmp_path / "LA", tmp_path / "phantom", labeled_patients=4, holdout_patients=10)
    assert [len(datalist[name]) for name in ("labeled", "unlabeled", "validation", "test")] == [4, 66, 10, 20]


def test_data_of_the_other_bundle_is_said_to_be_so(tmp_path):
    write_left_atrium(tmp_path / "LA", "official")
    write_pack(tmp_path / "acdc")
    for folder, labeled, bundle in (("LA", 7, "la"), ("acdc", 8, "acdc")):
        with pytest.raises(
            ValueError, match=f"but .*{folder} is a folder of .*; train with `knowsam train {bundle}`, or"
        ):
            load_datalist(tmp_path / folder, "", labeled_patients=labeled)


def test_folder_of_no_known_form_says_all_that_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    looked_for = (r"training/patient001/Info\.cfg", r"data/slices/\*\.h5", "<case>/lgemri.nrrd", "<case>/mri_norm2.h5")
    message = ".*".join(f"with {name}" for name in looked_for)
    with pytest.raises(ValueError, match=rf"`dataset_dir` must be .*{message}.* but {tmp_path} contains none of them"):
        load_datalist(tmp_path, tmp_path / "phantom")


def test_phantom_of_the_left_atrium_is_an_argument(tmp_path):
    datalist = load_datalist(None, tmp_path / "phantom", phantom={**SMALL, "anatomy": "left_atrium"})
    assert [item["frame"] for item in datalist["labeled"]] == ["LGE"]


def test_a_data_set_that_is_not_there_is_an_error_and_no_phantom(tmp_path):
    for name in ("missing", "missing.json"):
        with pytest.raises((ValueError, FileNotFoundError), match="`dataset_dir` must be .* does not exist"):
            load_datalist(tmp_path / name, tmp_path / "phantom")
    assert not (tmp_path / "phantom").exists()


def test_json_paths_are_relative_to_its_folder(tmp_path):
    path = write_json(tmp_path, test=["images/d.nii.gz"], description="ignored")
    assert load_datalist(path, tmp_path / "phantom") == {
        "labeled": [{"image": f"{tmp_path}/images/a.nii.gz", "label": f"{tmp_path}/labels/a.nii.gz"}],
        "unlabeled": [{"image": f"{tmp_path}/images/b.nii.gz"}],
        "validation": [{"image": f"{tmp_path}/images/c.nii.gz", "label": f"{tmp_path}/labels/c.nii.gz"}],
        "test": [{"image": f"{tmp_path}/images/d.nii.gz"}],
    }


def test_json_without_unlabeled_and_test_gives_empty_lists(tmp_path):
    path = write_json(tmp_path)
    content = json.loads(path.read_text())
    del content["unlabeled"]
    path.write_text(json.dumps(content))
    datalist = load_datalist(path, tmp_path / "phantom")
    assert datalist["unlabeled"] == datalist["test"] == []


def test_several_files_of_one_image_and_further_keys_are_kept(tmp_path):
    item = {"image": ["images/a.nii.gz", "images/d.nii.gz"], "label": "labels/a.nii.gz", "patient": "a"}
    labeled = load_datalist(write_json(tmp_path, labeled=[item]), tmp_path / "phantom")["labeled"]
    assert labeled[0]["image"] == [f"{tmp_path}/images/{name}.nii.gz" for name in "ad"]
    assert labeled[0]["patient"] == "a"


def test_list_of_test_alone_is_said_to_be_for_prediction(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "list.json").write_text(json.dumps({"test": [{"image": "a.nii.gz"}]}))
    with pytest.raises(ValueError, match=r"has \['test'\]; a list of `test` alone is for prediction\."):
        load_datalist(tmp_path / "list.json", tmp_path / "phantom")


@pytest.mark.parametrize(
    "sections, error, message",
    [
        ({"labeled": []}, ValueError, "`labeled` must list at least one item but is empty"),
        ({"validation": []}, ValueError, "`validation` must list at least one item but is empty"),
        (
            {"unlabeled": [{"image": "images/b.nii.gz", "label": "labels/b.nii.gz"}]},
            ValueError,
            "`unlabeled` items must have no label but item 0 of `unlabeled` .* 'labels/b.nii.gz'",
        ),
        ({"labeled": [{"image": "images/a.nii.gz"}]}, ValueError, "`label` must be a path but item 0 of `labeled`"),
        ({"labeled": [{"label": "labels/a.nii.gz"}]}, ValueError, "`image` must be a path but item 0 of `labeled`"),
        ({"labeled": {"a": "b"}}, ValueError, "`labeled` must be a list of items but is dict"),
        ({"unlabeled": [{"image": 3}]}, ValueError, "`image` must be a path or a list of paths but .* has 3"),
        ({"unlabeled": [{"image": "images/z.nii.gz"}]}, FileNotFoundError, "images/z.nii.gz does not .*`unlabeled`"),
        (
            {"unlabeled": [{"image": "images/a.nii.gz"}]},
            ValueError,
            "`unlabeled` must share no image with `labeled` but both list .*images/a.nii.gz",
        ),
        (
            {
                "unlabeled": [{"image": "images/b.nii.gz", "patient": 7}],
                "validation": [{"image": "images/c.nii.gz", "label": "labels/c.nii.gz", "patient": 7}],
            },
            ValueError,
            "`validation` must share no patient with `labeled` or `unlabeled` but both have 7",
        ),
    ],
)
def test_bad_data_list_is_one_clear_sentence(tmp_path, sections, error, message):
    with pytest.raises(error, match=message) as caught:
        load_datalist(write_json(tmp_path, **sections), tmp_path / "phantom")
    assert "\n" not in str(caught.value)


def test_list_of_the_phantom_is_a_valid_data_list(tmp_path):
    datalist = load_datalist(None, tmp_path / "phantom", phantom=SMALL)
    assert load_datalist(tmp_path / "phantom" / "dataset.json", tmp_path / "other") == datalist


@pytest.mark.parametrize(
    "content, message",
    [(b"{", "must be valid JSON but"), (b"\x80\x04}.", "must be valid JSON but"), (b"[]", "must be a JSON object")],
)
def test_file_that_is_no_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.*data.json"):
        load_datalist(path, tmp_path / "phantom")
