from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from knowsam_monai.data import phantom, phantom_datalist, write_phantom

SMALL = {"num_labeled": 2, "num_unlabeled": 1, "num_validation": 1, "num_test": 1, "max_size": 40}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", **SMALL)


def voxels(list_path: Path) -> dict[str, np.ndarray]:
    folder = list_path.parent
    return {str(path.relative_to(folder)): np.asarray(nibabel.load(path).dataobj) for path in folder.rglob("*.nii.gz")}


def test_list_has_ed_and_es_of_every_patient(written):
    datalist = phantom_datalist(written)
    assert {name: len(items) for name, items in datalist.items()} == {
        "labeled": 4,
        "unlabeled": 2,
        "validation": 2,
        "test": 2,
    }
    assert [item["frame"] for item in datalist["labeled"]] == ["ED", "ES", "ED", "ES"]
    assert len({item["patient"] for items in datalist.values() for item in items}) == 5


def test_unlabeled_patients_have_no_label_file(written):
    for item in phantom_datalist(written)["unlabeled"]:
        assert "label" not in item
        assert [path.name for path in Path(item["image"]).parent.glob("*_gt*")] == []


def test_same_seed_gives_the_same_voxels_and_another_seed_others(written, tmp_path):
    same = voxels(write_phantom(tmp_path / "same", **SMALL))
    first = voxels(written)
    assert same.keys() == first.keys()
    assert all(np.array_equal(same[name], first[name]) for name in first)
    other = nibabel.load(phantom_datalist(write_phantom(tmp_path / "other", seed=1, **SMALL))["labeled"][0]["image"])
    assert other.shape != first["phantom001/phantom001_ED.nii.gz"].shape or not np.array_equal(
        other.dataobj, first["phantom001/phantom001_ED.nii.gz"]
    )


def test_nibabel_and_simpleitk_agree_on_the_oblique_anisotropic_geometry(written):
    sitk = pytest.importorskip("SimpleITK")
    item = phantom_datalist(written)["labeled"][0]
    image, itk = nibabel.load(item["image"]), sitk.ReadImage(item["image"])
    spacing = image.header.get_zooms()
    np.testing.assert_allclose(itk.GetSpacing(), spacing, rtol=1e-5)
    assert spacing[0] == pytest.approx(spacing[1], rel=1e-5) and spacing[2] > 1.5 * spacing[0]
    to_lps = np.diag([-1.0, -1.0, 1.0])
    direction = to_lps @ np.array(itk.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(direction * spacing, image.affine[:3, :3], atol=1e-4)
    np.testing.assert_allclose(to_lps @ itk.GetOrigin(), image.affine[:3, 3], atol=1e-3)
    assert np.abs(direction - np.eye(3)).max() > 0.2
    np.testing.assert_array_equal(image.affine, nibabel.load(item["label"]).affine)


def test_whole_phantom_is_left_as_it_is(written):
    before = {path: path.stat().st_mtime_ns for path in written.parent.rglob("*")}
    assert write_phantom(written.parent, **SMALL) == written
    assert {path: path.stat().st_mtime_ns for path in written.parent.rglob("*")} == before


def test_phantom_with_a_missing_file_or_of_other_arguments_is_written_anew(tmp_path):
    arguments = {**SMALL, "num_labeled": 1, "num_test": 0}
    item = phantom_datalist(write_phantom(tmp_path / "phantom", **arguments))["labeled"][0]
    Path(item["label"]).unlink()
    write_phantom(tmp_path / "phantom", **arguments)
    assert Path(item["label"]).is_file()
    datalist = phantom_datalist(write_phantom(tmp_path / "phantom", **{**arguments, "num_unlabeled": 0}))
    assert datalist["unlabeled"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_folder_is_not_replaced_while_files_of_somebody_lie_in_it(tmp_path, caplog):
    arguments = {**SMALL, "num_labeled": 1, "num_test": 0}
    write_phantom(tmp_path / "phantom", **arguments)
    mine = tmp_path / "phantom" / "phantom001" / "segmentations" / "mine.nii.gz"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="contains mine.nii.gz; choose another folder"):
        write_phantom(tmp_path / "phantom", **{**arguments, "num_unlabeled": 0})
    assert mine.read_text() == "mine"
    mine.unlink()
    assert not caplog.records
    write_phantom(tmp_path / "phantom", **{**arguments, "num_unlabeled": 0})
    assert "which is replaced" in caplog.text


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw = phantom.draw_patient

    def interrupted(seed, number, max_size):
        if number == 2:
            raise KeyboardInterrupt
        return draw(seed, number, max_size)

    monkeypatch.setattr(phantom, "draw_patient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "phantom", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_may_write_the_same_phantom(tmp_path):
    arguments = {**SMALL, "num_labeled": 1, "num_test": 0}
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: write_phantom(tmp_path / "phantom", **arguments), range(3)))
    assert set(paths) == {tmp_path / "phantom" / "dataset.json"}
    assert len(voxels(paths[0])) == 2 * (2 + 1 + 2)
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`folder` must be empty or contain only an earlier phantom but"):
        write_phantom(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_file_in_place_of_the_folder_is_called_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be a folder but .*/file is a file; choose another name."):
        write_phantom(tmp_path / "file", **SMALL)


def test_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="`folder` must be writable but .*file/phantom is not"):
        write_phantom(tmp_path / "file" / "phantom", **SMALL)


@pytest.mark.parametrize("arguments", [{"num_labeled": 0}, {"num_test": -1}, {"max_size": 8}])
def test_bad_counts_and_sizes_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least"):
        write_phantom(tmp_path / "phantom", **{**SMALL, **arguments})


def test_left_atrium_phantom_has_one_volume_a_patient_in_the_same_layout(tmp_path):
    counts = {**SMALL, "max_size": 32, "anatomy": "left_atrium"}
    path = write_phantom(tmp_path / "phantom", **counts)
    datalist = phantom_datalist(path)
    assert {name: len(items) for name, items in datalist.items()} == {
        "labeled": 2,
        "unlabeled": 1,
        "validation": 1,
        "test": 1,
    }
    for name, items in datalist.items():
        for item in items:
            assert item["frame"] == "LGE" and ("label" in item) == (name != "unlabeled")
    image, label = (nibabel.load(datalist["labeled"][0][key]) for key in ("image", "label"))
    assert image.shape == label.shape and set(np.unique(label.dataobj)) == {0, 1}
    np.testing.assert_array_equal(image.affine, label.affine)
    before = voxels(path)
    assert all(
        np.array_equal(before[name], array) for name, array in voxels(write_phantom(path.parent, **counts)).items()
    )


def test_each_anatomy_has_its_own_default_size_and_another_anatomy_is_refused(tmp_path):
    counts = {"num_labeled": 1, "num_unlabeled": 0, "num_validation": 0, "num_test": 0}
    for anatomy, size in (("short_axis", 128), ("left_atrium", 64)):
        item = phantom_datalist(write_phantom(tmp_path / anatomy, **counts, anatomy=anatomy))["labeled"][0]
        assert all(3 * size // 4 <= length <= size for length in nibabel.load(item["image"]).shape[:2])
    with pytest.raises(ValueError, match="`anatomy` must be 'short_axis' or 'left_atrium' but is 'knee'"):
        write_phantom(tmp_path / "knee", anatomy="knee")
