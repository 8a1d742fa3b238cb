from __future__ import annotations

import os

import pytest

from knowsam_monai.data.overlap import labels_as_images, patient_key, shared_contents, shared_names


def items(*images, **keys):
    return [{"image": image, **keys} for image in images]


def test_image_in_two_sets_is_found_once_for_each_set():
    sets = {"labeled": items("a.nii", "b.nii"), "unlabeled": items("c.nii", "a.nii"), "test": items("b.nii", "b.nii")}
    assert list(shared_names(sets)) == [
        "`unlabeled` must share no image with `labeled` but both list a.nii",
        "`test` must share no image with `labeled` but both list b.nii",
    ]
    assert list(shared_names({"labeled": items("a.nii", "a.nii"), "test": items(["b.nii", "c.nii"])})) == []
    (found,) = shared_names({"labeled": items(["a.nii", "b.nii"]), "test": items(["c.nii", "b.nii"])})
    assert found.endswith("both list b.nii")


@pytest.mark.parametrize("link", ["file", "folder"])
def test_image_behind_a_link_is_the_same_image(tmp_path, link):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii").touch()
    if link == "file":
        os.symlink(tmp_path / "scans" / "a.nii", tmp_path / "b.nii")
        other = tmp_path / "b.nii"
    else:
        os.symlink(tmp_path / "scans", tmp_path / "linked")
        other = tmp_path / "linked" / "a.nii"
    sets = {"labeled": items(str(tmp_path / "scans" / "a.nii")), "test": items(str(other))}
    assert list(shared_names(sets)) == [f"`test` must share no image with `labeled` but both list {other}"]
    labels = {"labeled": items(str(tmp_path / "scans" / "a.nii"), label=str(other))}
    assert len(list(labels_as_images(labels))) == 1


def test_patient_may_be_labeled_and_unlabeled_but_not_in_training_and_elsewhere():
    sets = {
        "labeled": items("1.nii", patient="Ann") + items("2.nii", patient=None) + items("3.nii", patient=float("nan")),
        "unlabeled": items("4.nii", patient="Ann"),
        "test": items("5.nii", patient=None) + items("6.nii", patient=float("nan")) + items("7.nii", patient="Ann"),
        "validation": items("8.nii", patient=" ann") + items("9.nii", patient="Ann"),
    }
    assert list(shared_names(sets)) == [
        "`test` must share no patient with `labeled` or `unlabeled` but both have 'Ann'",
        "`validation` must share no patient with `labeled` or `unlabeled` but both have ' ann', spelled 'Ann' in "
        "`labeled` or `unlabeled`",
    ]


@pytest.mark.parametrize(
    ("patient", "key"),
    [
        ("Patient 01 ", "patient01"),
        ("\uff21", "a"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        (7, "7"),
        (None, ""),
    ],
)
def test_names_of_patients_are_compared_without_case_spaces_and_form(patient, key):
    assert patient_key(patient) == key


def test_file_that_is_label_and_image_is_found_once_unless_it_holds_both():
    sets = {
        "labeled": items("a.nii", label="b.nii") + items("c.h5", label="c.h5") + items("d.nii", label="b.nii"),
        "unlabeled": items("b.nii"),
    }
    assert list(labels_as_images(sets)) == [
        "`label` must not be an image file but `labeled` has b.nii, an image of `unlabeled`"
    ]


def test_voxels_of_another_image_are_found_and_those_of_the_same_file_are_none():
    sets = {
        "labeled": items("a.nii", "b.nii", "c.png", "c.png"),
        "test": items("d.nii", "e.nii", "f.png", "g.nii"),
    }
    hashes = {
        "labeled": [["1", "2", "3"], ["4", "4"], ["5"], ["5"]],
        "test": [["2", "6", "3", "4"], ["1"], ["5"], ["7"]],
    }
    assert list(shared_contents(sets, hashes)) == [
        (
            True,
            "`test` must share no image with `labeled` but d.nii has the voxels of a.nii in 3 of its 4 slices, and the "
            "same holds for 2 more",
        )
    ]
    hashes["test"] = [["6"], ["8", "9"], ["6"], ["8"]]
    assert list(shared_contents(sets, hashes)) == [
        (False, "`test` has duplicate images: f.png is a duplicate of d.nii, and the same holds for 1 more")
    ]
