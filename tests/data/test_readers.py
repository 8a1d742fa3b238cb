from __future__ import annotations

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, Resized
from PIL import Image

from knowsam_monai.data import H5Reader, LoadCased

AFFINE = np.diag([1.5, 1.5, 8.0, 1.0])


def write_h5(path: Path, shape=(3, 4, 5)) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["image"] = rng.random(shape, dtype=np.float32)
        file["label"] = rng.integers(0, 4, shape, dtype=np.uint8)
    return path


def write_nifti(path: Path, shape=(4, 5, 3)) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random(shape, dtype=np.float32), AFFINE), path)
    return path


def test_h5_slice_files_are_stacked_in_their_order(tmp_path):
    paths = [write_h5(tmp_path / f"{index}.h5", shape=(4, 5)) for index in range(3)]
    with h5py.File(paths[2], "a") as file:
        file["image"][:] = 7
    volume = LoadCased("image")({"image": [str(path) for path in paths]})["image"]
    assert volume.shape == (4, 5, 3)
    assert (volume[..., 2] == 7).all() and not (volume[..., :2] == 7).any()


def test_unknown_spacing_survives_collation_decollation_and_inversion(tmp_path):
    path = str(write_h5(tmp_path / "a.h5"))
    transform = Compose([LoadCased("image"), EnsureChannelFirstd("image"), Resized("image", (8, 8, -1))])
    batch = list_data_collate([transform({"image": path}) for _ in range(2)])
    batch["pred"] = torch.zeros_like(batch["image"])
    for case in decollate_batch(batch):
        assert case["image"].meta["spacing_known"] is False
        inverted = Invertd("pred", transform=transform, orig_keys="image")(case)["pred"]
        assert inverted.shape == (1, 4, 5, 3)
        assert inverted.meta["spacing_known"] is False
    nifti = LoadCased("image")({"image": write_nifti(tmp_path / "a.nii.gz")})["image"]
    assert "spacing_known" not in nifti.meta


def test_one_loader_reads_h5_and_nifti_each_with_its_own_reader(tmp_path):
    load = LoadCased(["image", "label"], allow_missing_keys=True)
    h5, nifti = str(write_h5(tmp_path / "a.h5")), str(write_nifti(tmp_path / "a.nii.gz"))
    case = load({"image": h5, "label": h5, "patient": "a"})
    assert case["patient"] == "a"
    assert case["label"].max() == 3 and case["image"].max() < 1
    case = load({"image": nifti})
    assert "label" not in case
    np.testing.assert_array_equal(case["image"].affine, AFFINE)
    assert case["image"].meta["filename_or_obj"] == nifti


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png", "a.bmp", "a.h5"])
def test_formats_without_spacing_say_so(tmp_path, name):
    array = np.random.default_rng(0).integers(0, 255, (5, 4), dtype=np.uint8)
    save = {
        ".npy": np.save,
        ".npz": np.savez,
        ".h5": lambda path, x: h5py.File(path, "w").create_dataset("image", data=x),
    }
    path, save_picture = tmp_path / name, lambda path, x: Image.fromarray(x.T).save(path)
    save.get(path.suffix, save_picture)(path, array)
    image = LoadCased("image", ensure_channel_first=True)({"image": str(path)})["image"]
    assert image.meta["spacing_known"] is False and image.affine.equal(torch.eye(4, dtype=torch.float64))
    np.testing.assert_array_equal(image[0], array)


def test_axes_of_length_1_are_dropped_from_npy_files(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((5, 4, 3, 1, 1), np.float32))
    image = LoadCased("image", ensure_channel_first=True)({"image": str(tmp_path / "a.npy")})["image"]
    assert image.shape == (1, 5, 4, 3)


def test_left_atrium_h5_is_height_width_depth_and_acdc_h5_has_its_slices_first(tmp_path):
    path = write_h5(tmp_path / "a.h5")
    with h5py.File(path) as file:
        stored = file["image"][()]
    case = {"image": str(path), "label": str(path)}
    for slice_axis, expected in [(-1, stored), (0, stored.transpose(1, 2, 0))]:
        loaded = LoadCased(["image", "label"], slice_axis=slice_axis, ensure_channel_first=True)(case)
        np.testing.assert_array_equal(loaded["image"][0], expected)
        assert loaded["label"].shape == loaded["image"].shape


def test_labeled_h5_without_a_label_is_one_clear_error(tmp_path):
    path = write_h5(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file["label"]
    with pytest.raises(
        ValueError,
        match=r"`label` must be .*a.h5 is not: `dataset` must be in .* but is .label.*has \[.image.\]",
    ):
        LoadCased(["image", "label"])({"image": str(path), "label": str(path)})


def test_several_nifti_files_are_the_channels_of_one_image(tmp_path):
    paths = [str(write_nifti(tmp_path / f"{name}.nii.gz")) for name in "ab"]
    case = Compose([LoadCased("image"), EnsureChannelFirstd("image")])({"image": paths})
    assert case["image"].shape == (2, 4, 5, 3)


@pytest.mark.parametrize("differs", ["shape", "affine"])
def test_several_nifti_files_of_different_grids_are_named_with_a_remedy(tmp_path, differs):
    """As of another patient, or stored with its axes in another order."""
    first = str(write_nifti(tmp_path / "a.nii.gz"))
    second = str(write_nifti(tmp_path / "b.nii.gz", (5, 4, 3) if differs == "shape" else (4, 5, 3)))
    if differs == "affine":
        nibabel.save(nibabel.Nifti1Image(nibabel.load(second).get_fdata(), 2 * np.eye(4)), second)
    with pytest.raises(ValueError, match="b.nii.gz has another shape, .* position than .*a.nii.gz; resample one to"):
        LoadCased("image")({"image": [first, second]})


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_broken_file_is_named_in_one_sentence(tmp_path):
    page = tmp_path / "page.nii.gz"
    page.write_text("<html>not found</html>")
    unknown = tmp_path / "a.xyz"
    unknown.touch()
    broken = [
        truncate(write_nifti(tmp_path / "half.nii.gz", (32, 32, 8))),
        truncate(write_nifti(tmp_path / "half.nii", (32, 32, 8))),
        truncate(write_h5(tmp_path / "half.h5", (8, 32, 32))),
        tmp_path / "missing.nii.gz",
        tmp_path / "missing.h5",
        page,
        unknown,
    ]
    for path in broken:
        message = f"`image` must be a readable image but .*{path.name} is not: .+"
        with pytest.raises(ValueError, match=message) as caught:
            LoadCased("image")({"image": str(path)})
        assert "\n" not in str(caught.value)


def test_slices_of_different_shapes_are_no_volume(tmp_path):
    paths = [write_h5(tmp_path / "a.h5", (4, 5)), write_h5(tmp_path / "b.h5", (5, 5))]
    with pytest.raises(ValueError, match=r"must be slices of one shape \(H, W\) but their shapes are"):
        H5Reader().read(paths)


@pytest.mark.parametrize("palette", ["gray", "color"])
def test_palette_is_the_colors_of_an_image_and_the_numbers_of_a_label(tmp_path, palette):
    numbers = np.arange(12, dtype=np.uint8).reshape(4, 3) % 3
    colors = [(200, 200, 200), (0, 0, 0), (90, 90, 90)] if palette == "gray" else [(9, 0, 0), (0, 200, 7), (1, 2, 3)]
    picture = Image.fromarray(numbers, mode="P")
    picture.putpalette([value for color in colors for value in color])
    picture.save(tmp_path / "a.png")
    case = LoadCased(["image", "label"], ensure_channel_first=True)(
        {key: tmp_path / "a.png" for key in ("image", "label")}
    )
    np.testing.assert_array_equal(case["label"][0], numbers.T)
    expected = np.asarray(colors)[numbers.T].transpose(2, 0, 1)
    np.testing.assert_array_equal(case["image"], expected[:1] if palette == "gray" else expected)


def test_upper_case_suffix_is_compressed_as_well(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", (32, 32, 8)).rename(tmp_path / "A.NII.GZ")
    assert LoadCased("image")({"image": tmp_path / "A.NII.GZ"})["image"].shape == (32, 32, 8)


def test_channels_whose_headers_are_rounded_are_one_image(tmp_path):
    paths = [write_nifti(tmp_path / f"{name}.nii.gz") for name in "ab"]
    image = nibabel.load(paths[1])
    affine = image.affine + 1e-3 * np.eye(4)[[1, 0, 2, 3]]
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), affine), paths[1])
    assert LoadCased("image", ensure_channel_first=True)({"image": list(map(str, paths))})["image"].shape[0] == 2
