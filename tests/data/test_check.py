"""The checker of a data list: what it finds, and that it reads nothing twice."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from knowsam_monai.data import (
    LoadCased,
    ScaleVolumed,
    case_facts,
    check_datalist,
    check_dataset,
    load_datalist,
    write_phantom,
)

SETS = ("labeled", "unlabeled", "validation", "test")
OBLIQUE = np.array([[0.0, -2, 0, 5], [2, 0, 0, 7], [0, 0, 8, 1], [0, 0, 0, 1]])


class Folder:
    """Two cases of each set, as NIfTI, that tests spoil one by one."""

    def __init__(self, path):
        self.path = path
        self.datalist = {}
        for name in SETS:
            self.datalist[name] = []
            for number in range(2):
                item = {"image": self.write(f"{name}{number}.nii.gz"), "patient": f"{name}{number}"}
                if name != "unlabeled":
                    item["label"] = self.write(f"{name}{number}_gt.nii.gz", label(), dtype=np.uint8)
                self.datalist[name].append(item)

    def write(self, name, array=None, affine=OBLIQUE, dtype=np.float32):
        if array is None:
            array = np.random.default_rng(sum(map(ord, name))).random((6, 5, 3))
        nibabel.save(nibabel.Nifti1Image(np.asarray(array, dtype=dtype), affine), self.path / name)
        return str(self.path / name)

    def check(self, **options):
        options = {"num_classes": 4, "cache_dir": self.path / "cache", "progress": False, **options}
        return check_datalist(self.datalist, **options)


def label(*values):
    array = np.zeros((6, 5, 3))
    array.flat[: len(values or (1, 2, 3))] = values or (1, 2, 3)
    return array


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_table_of_good_data(folder, caplog):
    with caplog.at_level(logging.INFO):
        report = folder.check()
    assert report.errors == report.warnings == []
    report.raise_if_wrong()
    rows = {row[0]: row for row in report.rows}
    assert rows["labeled"][1:6] == ("2", "2", "6 x 5 x 3", "2 x 2 x 8", "ALS")
    assert rows["labeled"][7:] == ("0 1 2 3", "0 of 2") and rows["unlabeled"][7:] == ("none", "")
    assert "Data: 8 items checked in" in caplog.text and "labeled     2      2         6 x 5 x 3" in str(report)
    assert "errors: none\nwarnings: none" in str(report)


def test_table_has_spacings_of_three_digits(folder):
    folder.write("labeled0.nii.gz", affine=OBLIQUE @ np.diag([0.68359375, 0.7, 1, 1]))
    rows = {row[0]: row for row in folder.check().rows}
    assert rows["labeled"][4] == "1.37-2 x 1.4-2 x 8"


def move(folder):
    """The same data in another place, compressed anew, with other headers' texts."""
    for item in (item for items in folder.datalist.values() for item in items):
        for key in {"image", "label"} & item.keys():
            image = nibabel.load(item[key])
            image.header["descrip"] = "moved"
            item[key] = item[key].replace(".nii.gz", "_moved.nii")
            nibabel.save(image, item[key])


CHANGES = {
    "a voxel of an image": lambda folder: folder.write("labeled1.nii.gz", np.zeros((6, 5, 3))),
    "a voxel of a label": lambda folder: folder.write("labeled1_gt.nii.gz", label(1, 2, 2), dtype=np.uint8),
    "the spacing": lambda folder: folder.write("labeled1.nii.gz", affine=OBLIQUE * [[2], [2], [2], [1]]),
    "the orientation": lambda folder: folder.write("labeled1.nii.gz", affine=OBLIQUE * [[-1], [1], [1], [1]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_content_of_a_file_is_known_wherever_it_lies_and_changes_with_what_training_takes_from_it(folder, change):
    before = folder.check().contents
    assert list(before) == list(SETS) and before["labeled"][0][0] == folder.datalist["labeled"][0]["image"]
    digests = {name: [digest for _, digest in pairs] for name, pairs in before.items()}
    assert len({one for pairs in digests.values() for one in pairs}) == 8
    assert folder.check().contents == before  # of the cache
    CHANGES[change](folder)
    changed = folder.check().contents
    assert [name for name in SETS if changed[name] != before[name]] == ["labeled"]
    assert changed["labeled"][0] == before["labeled"][0]
    folder.write("labeled1.nii.gz"), folder.write("labeled1_gt.nii.gz", label(), dtype=np.uint8)
    move(folder)
    assert {name: [one for _, one in pairs] for name, pairs in folder.check().contents.items()} == digests


def spoil_file(name, content):
    def spoil(folder):
        (folder.path / name).write_bytes(content)

    return spoil


def spoil_array(name, array, **kwargs):
    return lambda folder: folder.write(name, array, **kwargs)


def spoil_item(name, **keys):
    return lambda folder: folder.datalist[name][0].update(keys)


def copy_of(folder, source, target):
    """The same voxels under another name, in another file format."""
    nibabel.save(nibabel.load(folder.path / source), folder.path / target)
    return str(folder.path / target)


def drop_label(folder):
    del folder.datalist["labeled"][0]["label"]


def label_of_unlabeled(folder):
    folder.datalist["unlabeled"][0]["label"] = folder.datalist["labeled"][0]["label"]


def slice_in_training(folder):
    """A 2D slice of a validation volume among the unlabeled images, as an h5 file."""
    array = nibabel.load(folder.path / "validation1.nii.gz").get_fdata(dtype=np.float32)
    with h5py.File(folder.path / "slice.h5", "w") as file:
        file["image"] = array[:, :, 1]
    folder.datalist["unlabeled"].append({"image": str(folder.path / "slice.h5"), "patient": "unlabeled2"})


def turned_copy(folder):
    """A scan of the test set among the unlabeled ones, its slices along the first axis and mirrored."""
    scan = nibabel.load(folder.path / "test0.nii.gz")
    turned = scan.as_reoriented([[2, -1], [1, 1], [0, -1]])
    assert turned.shape == (3, 5, 6)
    nibabel.save(turned, folder.path / "turned.nii")
    folder.datalist["unlabeled"].append({"image": str(folder.path / "turned.nii"), "patient": "turned"})


def all_labels_empty(folder, name="labeled"):
    for item in folder.datalist[name]:
        nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 3), np.uint8), OBLIQUE), item["label"])


ERRORS = {
    "patient": (
        spoil_item("test", patient="unlabeled1"),
        "`test` must share no patient with `labeled` or `unlabeled` .*unlabeled1",
    ),
    "file": (
        lambda f: f.datalist["validation"].append(dict(f.datalist["labeled"][0])),
        "`validation` must share no image with `labeled` but both list .*labeled0.nii.gz; remove it from one of them",
    ),
    "content": (
        lambda f: f.datalist["test"].append({"image": copy_of(f, "unlabeled1.nii.gz", "x.nii"), "patient": "x"}),
        "`test` must share no image with `unlabeled` but .*x.nii has the voxels of .*unlabeled1.nii.gz in 3 of its 3",
    ),
    "slice": (
        slice_in_training,
        "`validation` must share no image with `unlabeled` but .*validation1.nii.gz has the voxels of .*slice.h5 in 1",
    ),
    "turned": (
        turned_copy,
        "`test` must share no image with `unlabeled` but .*test0.nii.gz has the voxels of .*turned.nii in 3 of its 3",
    ),
    "unlabeled label": (label_of_unlabeled, "`unlabeled` items must have no label but .*unlabeled0.nii.gz has"),
    "no label": (drop_label, "`label` must be a path but .*labeled0.nii.gz of `labeled` has none"),
    "unreadable": (spoil_file("test1.nii.gz", b"no"), "`image` must be a readable image but .*test1.nii.gz is not"),
    "NaN": (
        spoil_array("unlabeled0.nii.gz", np.full((6, 5, 3), np.nan)),
        "`image` must be finite but .*unlabeled0.nii.gz has 90 NaN or infinite values; repair or remove",
    ),
    "shape": (
        spoil_array("validation0_gt.nii.gz", np.zeros((6, 4, 3))),
        r"`label` must be one channel of the image's shape \(6, 5, 3\) but .*validation0_gt.nii.gz has",
    ),
    "value": (spoil_array("labeled0_gt.nii.gz", label(1, 4)), "the integers 0 to 3 .*labeled0_gt.nii.gz has 4;"),
    "empty validation": (
        lambda folder: all_labels_empty(folder, "validation"),
        "`validation` must have labels with a structure but all 2 are empty; label some",
    ),
    "all empty": (all_labels_empty, "`labeled` must have labels with a structure but all 2 are empty; label some"),
    "channels": (
        spoil_array("test0.nii.gz", np.random.default_rng(0).random((6, 5, 3, 2))),
        "the same number of channels in every item but .*test0.nii.gz has 2 and .*labeled0.nii.gz has 1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_raised_in_one_sentence(folder, name):
    spoil, message = ERRORS[name]
    spoil(folder)
    report = folder.check()
    with pytest.raises(ValueError, match=message) as error:
        report.raise_if_wrong()
    assert "\n" not in str(error.value) and f"  - {report.errors[0]}" in str(report)


WARNINGS = {
    "spacing": (
        spoil_array("labeled0_gt.nii.gz", label(), affine=OBLIQUE @ np.diag([1.1, 1, 1, 1])),
        "`labeled`: 1 of 2 labels have another spacing than the image.*labeled0_gt.nii.gz",
    ),
    "orientation": (
        spoil_array("labeled0_gt.nii.gz", label(), affine=OBLIQUE @ np.diag([-1, 1, 1, 1])),
        "`labeled`: 1 of 2 labels have another orientation than the image.*labeled0_gt.nii.gz",
    ),
    "origin": (
        spoil_array("labeled0_gt.nii.gz", label(), affine=OBLIQUE + np.outer([30, 0, 0, 0], [0, 0, 0, 1])),
        "`labeled`: 1 of 2 labels have another origin or rotation than the image; .*labeled0_gt.nii.gz",
    ),
    "empty": (spoil_array("test1_gt.nii.gz", np.zeros((6, 5, 3))), "`test`: 1 of 2 labels are empty: .*test1_gt"),
    "absent class": (
        lambda f: [f.write(f"labeled{n}_gt.nii.gz", label(1, 3)) for n in range(2)],
        "`labeled`: no label has class 2",
    ),
    "constant": (
        spoil_array("unlabeled1.nii.gz", np.full((6, 5, 3), 7.0)),
        "`unlabeled`: 1 of 2 images are constant: .*unlabeled1.nii.gz",
    ),
    "twice": (
        lambda f: f.datalist["unlabeled"].append(
            {"image": copy_of(f, "unlabeled0.nii.gz", "again.nii.gz"), "patient": "z"}
        ),
        "`unlabeled` has duplicate images: .*again.nii.gz has the voxels of .*unlabeled0.nii.gz in 3 of its 3 slices",
    ),
    "slices twice": (
        lambda f: f.datalist.update(
            unlabeled=[
                {"image": f.write(name, np.random.default_rng(int(name[0])).random((6, 5, 1))), "patient": name}
                for name in ("0.nii", "1.nii", "0_again.nii", "1_again.nii")
            ]
        ),
        "`unlabeled` has duplicate images: .*0_again.nii is a duplicate of .*/0.nii, and the same holds for 1 more; re",
    ),
    "spacing without slices": (
        spoil_array("unlabeled1.nii.gz", np.random.default_rng(0).random((6, 5, 3)), affine=np.eye(4)),
        "`unlabeled`: 1 of 2 images have a spacing that does not show their slices, which are taken axially .*led1.nii",
    ),
    "slices and volumes": (
        spoil_array("unlabeled1.nii.gz", np.random.default_rng(0).random((6, 5))),
        "`unlabeled`: 1 of 2 images are slices beside volumes, which alone the 2D bundle turns .*: .*unlabeled1.nii.gz",
    ),
    "slices in another set than volumes": (
        lambda f: [f.write(f"unlabeled{n}.nii.gz", np.random.default_rng(n).random((6, 5))) for n in range(2)],
        "`unlabeled`: 2 of 2 images are slices beside volumes, which alone the 2D bundle turns to one orientation: ",
    ),
    "turned labels": (
        lambda f: nibabel.save(
            nibabel.load(f.path / "labeled0_gt.nii.gz").as_reoriented([[0, -1], [2, 1], [1, 1]]),
            f.path / "labeled0_gt.nii.gz",
        ),
        "`labeled`: 1 of 2 labels have axes in another order or direction than the image; they are reoriented: ",
    ),
    "planes": (
        spoil_array("unlabeled0.nii.gz", np.random.default_rng(0).random((6, 5, 3)), affine=np.diag([8.0, 2, 2, 1])),
        "`unlabeled`: 1 of 2 images have slices in another plane than those of .*labeled0.nii.gz; .*: .*unlabeled0",
    ),
    "plane of the first": (
        lambda f: [
            f.write("labeled0.nii.gz", affine=np.diag([8.0, 2, 2, 1])),
            f.write("labeled0_gt.nii.gz", label(), affine=np.diag([8.0, 2, 2, 1]), dtype=np.uint8),
        ],
        "`labeled`: 1 of 2 images have slices in another plane than those of .*labeled1.nii.gz; .*: .*labeled0",
    ),
    "patient": (lambda f: f.datalist["test"][0].pop("patient"), "`test`: items have no `patient`"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_logged_and_not_raised(folder, name, caplog):
    spoil, message = WARNINGS[name]
    spoil(folder)
    report = folder.check()
    report.raise_if_wrong()
    assert len(report.warnings) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(report.warnings[0])
    assert report.warnings[0] in caplog.text


def test_short_axis_slices_that_differ_by_less_than_60_degrees_cause_no_warning(folder):
    turned = np.array([[1, 0, 0, 0], [0, 0.6, -0.8, 0], [0, 0.8, 0.6, 0], [0, 0, 0, 1]])  # by 53 degrees
    voxels = np.random.default_rng(0).random((6, 5, 3))
    folder.write("unlabeled0.nii.gz", voxels, affine=turned @ OBLIQUE)
    report = folder.check()
    assert report.rows[1][5] == "ALS SLP"  # nibabel names another plane
    assert not report.warnings


def test_unknown_and_rounded_label_spacings_cause_no_warning(folder):
    with h5py.File(folder.path / "gt.h5", "w") as file:
        file["label"] = np.moveaxis(label(), -1, 0)
    folder.datalist["test"][0]["label"] = str(folder.path / "gt.h5")
    folder.write("test1_gt.nii.gz", label(), affine=OBLIQUE * (1 + 1e-5))
    assert not folder.check().warnings


@pytest.mark.parametrize("empty", [None, "", float("nan")])
def test_empty_names_of_patients_are_not_one_patient(folder, empty):
    for items in folder.datalist.values():
        items[0]["patient"] = empty
    report = folder.check()
    assert not report.errors and [row[2] for row in report.rows] == ["1"] * 4
    assert report.warnings == [
        "`labeled`, `unlabeled`, `validation`, `test`: items have no `patient`, so scans of one patient in two sets "
        "would not be noticed."
    ]


def test_changed_voxels_beside_a_header_are_read_again(folder):
    volume = sitk.GetImageFromArray(np.random.default_rng(0).random((3, 5, 6)).astype(np.float32))
    sitk.WriteImage(volume, str(folder.path / "a.mhd"))
    folder.datalist["unlabeled"][0]["image"] = str(folder.path / "a.mhd")
    before = folder.check().contents
    voxels = np.fromfile(folder.path / "a.raw", np.float32)
    (-voxels).tofile(folder.path / "a.raw")
    assert folder.check().contents["unlabeled"][0] != before["unlabeled"][0]


def test_one_patient_may_be_labeled_and_unlabeled(folder):
    folder.datalist["unlabeled"][0]["patient"] = folder.datalist["labeled"][0]["patient"]
    assert not folder.check().errors


def test_further_faults_are_counted(folder):
    ERRORS["NaN"][0](folder)
    ERRORS["value"][0](folder)
    with pytest.raises(ValueError, match=r"labeled0_gt.nii.gz has 4; .* There are more errors, in the table above\."):
        folder.check().raise_if_wrong()


def test_of_one_complaint_about_many_files_three_are_named(folder):
    for name in ("labeled", "validation", "test"):
        for number in range(2):
            folder.write(f"{name}{number}_gt.nii.gz", label(4 + number))
    ERRORS["NaN"][0](folder)
    errors = folder.check().errors
    labels = [sentence for sentence in errors if sentence.startswith("`label`")]
    assert len(errors) == 4 and len(labels) == 3 and "labeled0_gt.nii.gz has 4;" in labels[0]
    assert labels[2].endswith(" … and 3 more.") and "more" not in labels[0] + labels[1]


@pytest.mark.parametrize("num_classes", [-1, 0, 1])
def test_fewer_than_two_classes_are_refused(folder, num_classes):
    with pytest.raises(ValueError, match=f"`num_classes` must be at least 2, .* but is {num_classes}; "):
        folder.check(num_classes=num_classes)


@pytest.mark.parametrize(
    ("num_axes", "batch_size", "message"),
    [
        (3, 2, None),
        (
            3,
            3,
            "`labeled` should have the 3 rows of a step but has 2; add items, or train with --labeled_batch_size 2.",
        ),
        (None, 12, None),  # the longest axis has 6 voxels
        (None, 13, "`labeled` should have the 13 rows of a step but has 12;"),
    ],
)
def test_sets_with_fewer_rows_than_a_step_are_warned_of(folder, num_axes, batch_size, message):
    def of_sizes(report):
        return [sentence for sentence in report.warnings if "rows of a step" in sentence]

    folder.datalist["labeled"] = folder.datalist["labeled"][:2]
    found = of_sizes(folder.check(num_axes=num_axes, batch_sizes={"labeled": batch_size}))
    assert len(found) == (message is not None) and all(sentence.startswith(message) for sentence in found)
    folder.datalist["unlabeled"] = []
    (sentence,) = of_sizes(folder.check(batch_sizes={"unlabeled": 4}))
    assert sentence.endswith("--unlabeled_batch_size 0 --mixing_weight 0 --distillation_gate none.")


def test_folder_of_a_data_list_is_told_to_give_the_list(folder):
    (folder.path / "another.json").write_text("[1]")
    with pytest.raises(ValueError, match="contains none of them; use the folder that contains one of these.$"):
        check_dataset(folder.path)
    (folder.path / "mine.json").write_text(json.dumps(folder.datalist))
    with pytest.raises(ValueError, match=f"contains none of them; use its data list {folder.path}/mine.json.$"):
        check_dataset(folder.path)
    with pytest.raises(ValueError, match="mine.json, or leave out `dataset_dir` to use the synthetic phantom.$"):
        load_datalist(folder.path, folder.path / "phantom")


def test_labeled_patients_of_a_json_is_refused(folder):
    (folder.path / "list.json").write_text(json.dumps(folder.datalist))
    with pytest.raises(ValueError, match="`labeled_patients` must be left out with a data-list JSON but is 7; "):
        check_dataset(folder.path / "list.json", labeled_patients=7)


def test_masks_of_0_and_255_are_of_two_classes(folder):
    for name in ("labeled", "validation", "test"):
        for number in range(2):
            folder.write(f"{name}{number}_gt.nii.gz", label(255, 255))
    assert "has 255" in folder.check(num_classes=3).errors[0]
    report = folder.check(num_classes=2)
    assert not report.errors and len(report.warnings) == 1
    assert report.warnings[0].startswith("6 labels are masks of 0 and 255, such as ")
    (warning,) = folder.check(num_classes=None).warnings
    assert "masks of 0 and 255; two classes read them as 0 and 1" in warning


def test_slice_with_a_number_that_training_refuses_is_wrong(folder):
    folder.write("unlabeled1.nii.gz", 2 * np.random.default_rng(0).random((6, 5)))
    folder.datalist["unlabeled"][1]["slice"] = 3
    (found,) = folder.check().errors
    item = folder.datalist["unlabeled"][1]
    with pytest.raises(ValueError) as error:
        ScaleVolumed()({**LoadCased("image", ensure_channel_first=True)(item)})
    assert found == str(error.value) and "unlabeled1.nii.gz goes from" in found


def test_slices_are_wrong_where_the_network_takes_volumes(folder):
    folder.write("unlabeled1.nii.gz", np.random.default_rng(0).random((6, 5)))
    assert not folder.check().errors
    assert "`image` must have 3 spatial axes but " in folder.check(num_axes=3).errors[0]


@pytest.mark.parametrize("exist", [True, False])
def test_time_grows_with_the_number_of_items_alone(tmp_path, exist):
    def seconds(number):
        sets = {}
        for name in SETS:
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            sets[name] = [{"image": f"{folder}/{n}.nii", "patient": f"{name}{n}"} for n in range(number // 4)]
            for item in sets[name]:
                if name in ("labeled", "validation"):
                    item["label"] = item["image"].replace(".nii", "_gt.nii")
                if exist:
                    for key in {"image", "label"} & set(item):
                        Path(item[key]).touch()
        start = time.process_time()
        report = check_datalist(sets, num_classes=4, cache_dir=tmp_path / "cache", progress=False)
        assert len(report.errors) == 3 and f"… and {number - 3} more" in report.errors[-1]
        return time.process_time() - start

    seconds(40)
    assert seconds(8000) < 16 * seconds(1000) + 1  # 8 times as many; quadratic would be 64 times


@pytest.fixture
def reads(monkeypatch):
    """The images that were read, by name."""
    names = []
    real = case_facts.CaseReader.__call__

    def call(self, item):
        names.append(os.path.basename(item["image"]))
        return real(self, item)

    monkeypatch.setattr(case_facts.CaseReader, "__call__", call)
    return names


def test_second_start_reads_what_has_changed_alone(folder, reads):
    first = folder.check()
    assert len(reads) == 8
    reads.clear()
    second = folder.check()
    assert reads == [] and second.rows == first.rows and "0 of them read, 8 known" in second.header
    folder.write("labeled1_gt.nii.gz", label(1, 4))
    assert "labeled1_gt.nii.gz has 4" in folder.check().errors[0] and reads == ["labeled1.nii.gz"]
    reads.clear()
    folder.check(num_classes=5)
    assert len(reads) == 8  # other questions


def test_lists_of_one_folder_share_what_was_read(folder, reads):
    folder.check()
    reads.clear()
    folder.datalist["unlabeled"].append(folder.datalist["labeled"].pop())
    del folder.datalist["unlabeled"][-1]["label"]
    folder.check()
    assert reads == ["labeled1.nii.gz"]  # it was known with its label
    assert len(list((folder.path / "cache").iterdir())) == 1


@pytest.mark.parametrize("spoil", ["{", "[]", '{"a": 1}', lambda text: text.replace('"fault"', '"color"')])
def test_cache_that_is_torn_or_of_another_version_is_ignored(folder, reads, spoil):
    rows = folder.check().rows
    (file,) = (folder.path / "cache").iterdir()
    file.write_text(spoil if isinstance(spoil, str) else spoil(file.read_text()))
    assert folder.check().rows == rows and len(reads) == 16


def test_cache_that_cannot_be_written_is_no_error(folder):
    (folder.path / "file").touch()
    assert not folder.check(cache_dir=folder.path / "file" / "cache").errors


def test_data_set_is_checked_by_its_list(tmp_path):
    path = write_phantom(tmp_path / "phantom", num_labeled=1, num_unlabeled=1, num_validation=1, max_size=32)
    report = check_dataset(path, num_classes=4, progress=False)
    assert not report.errors and [row[0] for row in report.rows] == list(SETS)


def test_left_atrium_is_read_with_its_own_axes(tmp_path):
    for number, case in enumerate("abcdefgh"):
        (tmp_path / case).mkdir()
        with h5py.File(tmp_path / case / "mri_norm2.h5", "w") as file:
            file["image"] = np.random.default_rng(number).random((6, 5, 3))
            file["label"] = label(1, 1).astype(np.uint8)
    (tmp_path / "train.list").write_text("a b c d e f")
    (tmp_path / "val.list").write_text("g h")
    report = check_dataset(tmp_path, labeled_patients=4, num_classes=2, progress=False)
    assert not report.errors and report.rows[0][3:5] == ("6 x 5 x 3", "?")


@pytest.mark.parametrize("variable, num_classes", [("KNOWSAM_ACDC_DIR", 4), ("KNOWSAM_LA_DIR", 2)])
def test_real_data_are_not_refused(variable, num_classes):
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no data set")
    assert not check_dataset(os.environ[variable], num_classes=num_classes, progress=False).errors
