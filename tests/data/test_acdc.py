from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from monai.transforms import Compose

from knowsam_monai.data import (
    ACDC_LABELED_SLICES,
    ACDC_TEST_PATIENTS,
    ACDC_TRAINING_PATIENTS,
    ACDC_VALIDATION_PATIENTS,
    LoadCased,
    ScaleVolumed,
    acdc_datalist,
)

ALL_PATIENTS = [f"patient{number:03d}" for number in range(1, 101)]


def numbers(text: str) -> list[str]:
    return [f"patient{number}" for number in text.split()]


# As the papers name them.
THREE = numbers("099 038 050")
SEVEN = THREE + numbers("100 058 021 049")
TWENTY_ONE = SEVEN + numbers("020 072 040 060 089 004 056 098 096 031 018 094 047 048")


def patients(items: list[dict]) -> list[str]:
    return list(dict.fromkeys(item["patient"] for item in items))


def write_official(folder: Path, names=ALL_PATIENTS) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        systole = number % 9 + 8
        (folder / name / "Info.cfg").write_text(f"ED: 1\nES: {systole}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n")
        for frame in (1, systole):
            for end in ("", "_gt"):
                (folder / name / f"{name}_frame{frame:02d}{end}.nii.gz").touch()
    return folder


def write_pack(folder: Path) -> Path:
    """Empty files with the published numbers of slices in the first 3, 7, 21 and 70 patients."""
    counts = [22, 22, 24] + [17] * 4 + [18] * 12 + [22] * 2 + [18] * 48 + [52]
    (folder / "data" / "slices").mkdir(parents=True)
    for name, count in zip(ACDC_TRAINING_PATIENTS, counts, strict=True):
        for index in range(count):
            frame, position = index % 2 + 1, index // 2
            (folder / "data" / "slices" / f"{name}_frame{frame:02d}_slice_{position}.h5").touch()
    for name in ACDC_VALIDATION_PATIENTS:
        for frame in (1, 2):
            (folder / "data" / f"{name}_frame{frame:02d}.h5").touch()
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return write_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    write_official(folder / "training")
    return folder


def test_split_is_70_10_and_20_of_the_100_patients():
    split = ACDC_TRAINING_PATIENTS + ACDC_VALIDATION_PATIENTS + ACDC_TEST_PATIENTS
    sizes = len(ACDC_TRAINING_PATIENTS), len(ACDC_VALIDATION_PATIENTS), len(ACDC_TEST_PATIENTS)
    assert sizes == (70, 10, 20)
    assert sorted(split) == ALL_PATIENTS


@pytest.mark.parametrize("count, names", [(3, THREE), (7, SEVEN), (21, TWENTY_ONE)])
@pytest.mark.parametrize("form", ["pack", "official"])
def test_protocol_labels_exactly_the_published_patients_in_their_order(form, count, names, request):
    datalist = acdc_datalist(request.getfixturevalue(form), count)
    assert patients(datalist["labeled"]) == names
    assert sorted(patients(datalist["labeled"]) + patients(datalist["unlabeled"])) == sorted(ACDC_TRAINING_PATIENTS)
    assert patients(datalist["validation"]) == list(ACDC_VALIDATION_PATIENTS)


@pytest.mark.parametrize("form", ["pack", "official"])
def test_unlabeled_items_have_no_label_and_all_others_have_one(form, request):
    datalist = acdc_datalist(request.getfixturevalue(form), 7)
    assert not any("label" in item for item in datalist["unlabeled"])
    assert all("label" in item for name in ("labeled", "validation", "test") for item in datalist[name])


@pytest.mark.parametrize("count, slices", [(3, 68), (7, 136), (21, 396), (70, 1312)])
def test_pack_gives_the_published_number_of_labeled_slices(pack, count, slices):
    datalist = acdc_datalist(pack, count)
    assert len(datalist["labeled"]) == slices
    assert len(datalist["labeled"]) + len(datalist["unlabeled"]) == 1312
    assert len(datalist["validation"]) == 20


def test_official_frames_are_those_of_info_cfg(official):
    items = acdc_datalist(official, 3)["labeled"]
    folder = official / "training" / "patient099"
    assert [item["frame"] for item in items[:2]] == ["ED", "ES"]
    # patient099 is number 98 in the folder: its ES is frame 98 % 9 + 8.
    assert [item["image"] for item in items[:2]] == [
        str(folder / f"patient099_frame{frame}.nii.gz") for frame in ("01", "16")
    ]
    assert items[1]["label"] == str(folder / "patient099_frame16_gt.nii.gz")


def test_training_folder_itself_can_be_given(official):
    assert acdc_datalist(official / "training") == acdc_datalist(official)


def test_test_patients_are_listed_where_they_are_there_and_empty_where_none_is(official, pack):
    assert patients(acdc_datalist(official)["test"]) == list(ACDC_TEST_PATIENTS)
    assert acdc_datalist(pack)["test"] == []


def test_slices_are_in_the_order_of_the_stack(pack):
    items = acdc_datalist(pack, 3)["labeled"]
    assert [(item["frame"], item["slice"]) for item in items[:22]] == [
        (frame, index) for frame in ("frame01", "frame02") for index in range(11)
    ]


def test_held_out_patients_leave_training_and_take_the_place_of_validation(pack, official):
    last = list(ACDC_TRAINING_PATIENTS[-5:])
    for folder in (pack, official):
        datalist = acdc_datalist(folder, 7, holdout_patients=5)
        assert patients(datalist["validation"]) == last
        assert len(datalist["validation"]) == 10
        assert not set(last) & set(patients(datalist["labeled"] + datalist["unlabeled"]))
        assert all("label" in item for item in datalist["validation"])


def test_first_missing_file_is_named(tmp_path):
    folder = write_official(tmp_path / "training")
    (folder / "patient028" / "patient028_frame01_gt.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="patient028_frame01_gt.nii.gz is missing"):
        acdc_datalist(tmp_path)
    shutil.rmtree(folder / "patient028")
    with pytest.raises(FileNotFoundError, match="patient028/Info.cfg is missing"):
        acdc_datalist(tmp_path)


def test_incomplete_test_set_is_an_error_not_a_smaller_test_set(tmp_path):
    folder = write_official(tmp_path / "training")
    shutil.rmtree(folder / "patient008")
    with pytest.raises(FileNotFoundError, match="patient008/Info.cfg is missing"):
        acdc_datalist(tmp_path)


def test_info_cfg_without_end_systole_is_named(tmp_path):
    folder = write_official(tmp_path / "training")
    (folder / "patient099" / "Info.cfg").write_text("ED: 1\n")
    with pytest.raises(ValueError, match="must give the frame of ES but .*patient099/Info.cfg"):
        acdc_datalist(tmp_path)


def test_incomplete_pack_names_what_is_missing(tmp_path):
    folder = write_pack(tmp_path)
    slices = folder / "data" / "slices"
    (folder / "train_slices.list").write_text("\n".join(sorted(path.stem for path in slices.glob("*.h5"))))
    (slices / "patient038_frame01_slice_3.h5").unlink()
    with pytest.raises(FileNotFoundError, match="patient038_frame01_slice_3.h5 is missing"):
        acdc_datalist(folder)
    (folder / "train_slices.list").write_bytes(b"\x80\x04}.")
    with pytest.raises(ValueError, match="must be a text file of names but .*train_slices.list is not"):
        acdc_datalist(folder)
    (folder / "train_slices.list").unlink()
    with pytest.raises(
        ValueError, match="must contain the 136 slices of the first 7 training patients but .* contains 135"
    ):
        acdc_datalist(folder)
    for path in slices.glob("patient015_*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="patient015_frame01_slice_0.h5 is missing"):
        acdc_datalist(folder)


@pytest.mark.skipif("KNOWSAM_ACDC_DIR" not in os.environ, reason="KNOWSAM_ACDC_DIR names no real ACDC folder")
def test_real_acdc_has_the_published_slices_and_one_loads():
    for count, slices in ACDC_LABELED_SLICES.items():
        datalist = acdc_datalist(os.environ["KNOWSAM_ACDC_DIR"], count)
        names = [name for items in datalist.values() for name in patients(items)]
        assert len(names) == len(set(names))
        if "slice" in datalist["labeled"][0]:
            assert len(datalist["labeled"]) == slices
    case = LoadCased(["image", "label"])(datalist["labeled"][0])
    assert case["image"].shape == case["label"].shape
    assert case["image"].max() > 0
    assert set(case["label"].unique().tolist()) <= {0, 1, 2, 3}


@pytest.mark.skipif("KNOWSAM_ACDC_DIR" not in os.environ, reason="KNOWSAM_ACDC_DIR names no real ACDC folder")
def test_real_held_out_patient_loads_as_a_volume():
    item = acdc_datalist(os.environ["KNOWSAM_ACDC_DIR"], 7, holdout_patients=1)["validation"][0]
    case = LoadCased(["image", "label"])(item)
    assert case["image"].ndim == 3
    assert case["image"].shape == case["label"].shape


@pytest.mark.skipif("KNOWSAM_ACDC_DIR" not in os.environ, reason="KNOWSAM_ACDC_DIR names no real ACDC folder")
def test_real_slices_are_as_bright_as_the_volume_they_are_from():
    """A volume stacked from its slice files spans 0..1, its slices alone do not; all go through one pipeline."""
    folder = os.environ["KNOWSAM_ACDC_DIR"]
    volume = acdc_datalist(folder, 7, holdout_patients=1)["validation"][0]
    if not isinstance(volume["image"], list):
        pytest.skip("the official release has no slice files")
    items = [item for item in acdc_datalist(folder, 70)["labeled"] if item["image"] in volume["image"]]
    pipeline = Compose([LoadCased("image", ensure_channel_first=True), ScaleVolumed()])
    stacked = pipeline(volume)["image"]
    for item in items:
        assert torch.equal(pipeline(item)["image"].as_tensor(), stacked[..., volume["image"].index(item["image"])])
