from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from monai.transforms import Compose

from knowsam_monai.data import (
    LEFT_ATRIUM_TEST_CASES,
    LEFT_ATRIUM_TRAINING_CASES,
    CheckDatad,
    LoadCased,
    left_atrium_datalist,
)

FILES = {"official": ("lgemri.nrrd", "laendo.nrrd"), "pack": ("mri_norm2.h5",)}
REAL = pytest.mark.skipif("KNOWSAM_LA_DIR" not in os.environ, reason="KNOWSAM_LA_DIR names no real left-atrium folder")


def cases(items: list[dict]) -> list[str]:
    return [item["patient"] for item in items]


def write(folder: Path, form: str, names=LEFT_ATRIUM_TRAINING_CASES + LEFT_ATRIUM_TEST_CASES) -> Path:
    """Empty files: a data list does not read them."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in FILES[form]:
            (folder / name / file).touch()
    return folder


def write_list(folder: Path, name: str, names) -> None:
    (folder / f"{name}.list").write_text("".join(f"{case}\n" for case in names))


@pytest.fixture(scope="module", params=["official", "pack"])
def whole(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write(folder / {"official": "Training Set", "pack": "2018LA_Seg_Training Set"}[request.param], request.param)
    return folder


@pytest.fixture
def small(tmp_path) -> Path:
    """Ten cases of the pack with a list of their own, in another order than the folder's."""
    write(tmp_path / "2018LA_Seg_Training Set", "pack", list("jihgfedcbakl"))
    write_list(tmp_path, "train", "jihgfedcba")
    return tmp_path


def test_split_is_80_and_20_different_cases():
    assert (len(LEFT_ATRIUM_TRAINING_CASES), len(LEFT_ATRIUM_TEST_CASES)) == (80, 20)
    assert len(set(LEFT_ATRIUM_TRAINING_CASES + LEFT_ATRIUM_TEST_CASES)) == 100


@pytest.mark.parametrize("count", [4, 8, 16])
def test_protocol_labels_the_first_cases_and_the_last_four_validate(whole, count):
    datalist = left_atrium_datalist(whole, count)
    assert cases(datalist["labeled"]) == list(LEFT_ATRIUM_TRAINING_CASES[:count])
    assert cases(datalist["unlabeled"]) == list(LEFT_ATRIUM_TRAINING_CASES[count:76])
    assert cases(datalist["validation"]) == list(LEFT_ATRIUM_TRAINING_CASES[76:])
    assert cases(datalist["test"]) == list(LEFT_ATRIUM_TEST_CASES)


def test_unlabeled_items_have_no_label_and_all_others_have_one(whole):
    datalist = left_atrium_datalist(whole)
    assert not any("label" in item for item in datalist["unlabeled"])
    assert all("label" in item for name in ("labeled", "validation", "test") for item in datalist[name])


def test_folder_of_the_cases_itself_can_be_given(whole):
    folder = next(path for path in whole.iterdir() if path.is_dir())
    assert left_atrium_datalist(folder) == left_atrium_datalist(whole)


def test_files_are_those_of_the_form_and_the_official_release_is_read_where_both_are(tmp_path):
    name = LEFT_ATRIUM_TRAINING_CASES[0]
    write(tmp_path, "pack")
    item = left_atrium_datalist(tmp_path)["labeled"][0]
    assert item["image"] == item["label"] == str(tmp_path / name / "mri_norm2.h5")
    for folder in tmp_path.iterdir():
        for file in FILES["official"]:
            (folder / file).touch()
    item = left_atrium_datalist(tmp_path)["labeled"][0]
    assert (item["image"], item["label"]) == tuple(str(tmp_path / name / file) for file in FILES["official"])


def test_order_of_the_list_file_decides_and_the_last_four_validate(small):
    datalist = left_atrium_datalist(small, 4)
    assert [cases(datalist[key]) for key in ("labeled", "unlabeled", "validation", "test")] == [
        list("jihg"),
        list("fe"),
        list("dcba"),
        [],
    ]


@pytest.mark.parametrize("beside_the_cases", [False, True])
def test_list_of_validation_cases_is_used_where_it_is_there(small, beside_the_cases):
    folder = small / "2018LA_Seg_Training Set"
    write_list(folder if beside_the_cases else small, "val", "kl")
    datalist = left_atrium_datalist(small, 4)
    assert cases(datalist["validation"]) == list("kl")
    assert cases(datalist["unlabeled"]) == list("fedcba")
    assert left_atrium_datalist(folder, 4) == datalist


def test_held_out_cases_leave_training_and_take_the_place_of_validation(small):
    write_list(small, "val", "kl")
    datalist = left_atrium_datalist(small, 4, holdout_patients=2)
    assert (cases(datalist["unlabeled"]), cases(datalist["validation"])) == (list("fedc"), list("ba"))


def test_validation_list_without_a_training_list_leaves_the_published_training_cases(tmp_path):
    write(tmp_path, "pack")
    write_list(tmp_path, "val", LEFT_ATRIUM_TRAINING_CASES[20:22])
    datalist = left_atrium_datalist(tmp_path)
    assert len(datalist["unlabeled"]) == 70
    assert not set(LEFT_ATRIUM_TRAINING_CASES[20:22]) & set(cases(datalist["unlabeled"]))


def test_lists_may_name_the_file_in_the_case_s_folder(small):
    datalist = left_atrium_datalist(small, 4)
    write_list(small, "train", [f"{case}/mri_norm2.h5" for case in "jihgfedcba"])
    assert left_atrium_datalist(small, 4) == datalist


@pytest.mark.parametrize("name, other", [("val", "train"), ("test", "train"), ("test", "val")])
def test_case_in_two_lists_is_refused(small, name, other):
    write_list(small, other, "jihgfedcba" if other == "train" else "k")
    write_list(small, name, "k" if other == "val" else "j")
    with pytest.raises(ValueError, match=f"`{name}.list` must share no case with `{other}.list` but both name [jk]"):
        left_atrium_datalist(small, 4)


def test_list_too_short_for_protocol_and_validation_is_refused(small):
    with pytest.raises(
        ValueError,
        match="must have 4 validation cases in addition to 8 labeled ones but has 10 cases; lower `labeled_patients`",
    ):
        left_atrium_datalist(small, 8)
    with pytest.raises(ValueError, match="at most the 10 patients"):
        left_atrium_datalist(small, 16)
    with pytest.raises(ValueError, match=r"`labeled_patients` must be one of \[4, 8, 16\] but is 7"):
        left_atrium_datalist(small, 7)


def test_labeled_case_without_a_label_is_one_clear_error_and_an_unlabeled_one_needs_none(tmp_path):
    write(tmp_path, "official")
    labels = [tmp_path / case / "laendo.nrrd" for case in LEFT_ATRIUM_TRAINING_CASES]
    labels[8].unlink()
    assert len(left_atrium_datalist(tmp_path, 8)["labeled"]) == 8
    with pytest.raises(FileNotFoundError, match=f"the label of every labeled, .* but {labels[8]} is missing"):
        left_atrium_datalist(tmp_path, 16)


def test_first_missing_image_is_named_and_an_incomplete_test_set_is_an_error(tmp_path):
    write(tmp_path, "pack")
    shutil.rmtree(tmp_path / LEFT_ATRIUM_TEST_CASES[3])
    with pytest.raises(FileNotFoundError, match=f"{LEFT_ATRIUM_TEST_CASES[3]}/mri_norm2.h5 is missing"):
        left_atrium_datalist(tmp_path)
    (tmp_path / LEFT_ATRIUM_TRAINING_CASES[50] / "mri_norm2.h5").unlink()
    with pytest.raises(FileNotFoundError, match=f"{LEFT_ATRIUM_TRAINING_CASES[50]}/mri_norm2.h5 is missing"):
        left_atrium_datalist(tmp_path)


def test_pack_is_said_to_be_cropped_around_the_truth(whole, caplog):
    with caplog.at_level(logging.WARNING):
        left_atrium_datalist(whole)
    assert ("cropped around the true left atrium" in caplog.text) == ("2018LA" in str(list(whole.iterdir())))


@REAL
def test_real_pack_has_its_protocols_and_a_case_loads_as_height_width_depth():
    datalist = left_atrium_datalist(os.environ["KNOWSAM_LA_DIR"], 8)
    assert len(datalist["labeled"]) == 8
    names = [name for items in datalist.values() for name in cases(items)]
    assert len(names) == len(set(names))
    load = Compose(
        [
            LoadCased(["image", "label"], slice_axis=-1, allow_missing_keys=True, ensure_channel_first=True),
            CheckDatad(num_classes=2),
        ]
    )
    case = load(datalist["labeled"][0])
    assert case["image"].shape == case["label"].shape
    # The pack keeps all 88 axial slices and crops the two other axes.
    assert case["image"].shape[-1] == 88
    assert set(case["label"].unique().tolist()) == {0, 1}
    assert "label" not in load(datalist["unlabeled"][0])


@REAL
def test_real_pack_is_cropped_around_the_truth_validation_cases_included():
    """The label's box has a margin of 10 to 20 voxels in the first axis, whatever the case: the crop has seen it."""
    datalist = left_atrium_datalist(os.environ["KNOWSAM_LA_DIR"], 8)
    if not datalist["labeled"][0]["image"].endswith(".h5"):
        pytest.skip("KNOWSAM_LA_DIR is the official release, which is not cropped")
    for item in datalist["labeled"][:2] + datalist["validation"][:2]:
        label = LoadCased("label", slice_axis=-1)(item)["label"]
        inside = label.sum((1, 2)).nonzero()
        assert 10 <= inside.min() <= 20
        assert 10 <= label.shape[0] - 1 - inside.max() <= 20
