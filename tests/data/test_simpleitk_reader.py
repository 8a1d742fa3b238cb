from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage, SaveImage

from knowsam_monai.data import LoadCased, SimpleITKReader

sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 4, 3)
VOXELS = np.arange(60, dtype=np.int16).reshape(SHAPE)
TO_RAS = np.diag([-1.0, -1.0, 1.0])
OBLIQUE = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
DIRECTIONS = {
    "plain": np.eye(3),
    "flipped": np.diag([1.0, -1.0, 1.0]),
    "mirrored": np.diag([1.0, 1.0, -1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]]),
    "oblique": OBLIQUE,
}


def write(path: Path, direction=DIRECTIONS["plain"], spacing=(0.6, 0.7, 2.5), origin=(-10.0, 20.0, 30.0)) -> Path:
    image = sitk.GetImageFromArray(VOXELS.T)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(np.asarray(direction).ravel())
    sitk.WriteImage(image, str(path))
    return path


def load(path) -> object:
    loader = LoadImage(ensure_channel_first=True)
    loader.register(SimpleITKReader())
    return loader(path)


@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_voxels_are_in_the_order_of_the_file_s_axes(tmp_path, suffix):
    image = load(write(tmp_path / f"a.{suffix}"))
    assert image.shape == (1, *SHAPE)
    np.testing.assert_array_equal(image[0], VOXELS)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_affine_takes_a_voxel_to_where_simpleitk_has_it(tmp_path, name):
    path = write(tmp_path / "a.nrrd", DIRECTIONS[name])
    image, itk = load(path), sitk.ReadImage(str(path))
    for index in [(0, 0, 0), (4, 0, 0), (0, 3, 0), (1, 2, 2)]:
        place = image.affine.numpy() @ [*index, 1.0]
        np.testing.assert_allclose(place[:3], TO_RAS @ itk.TransformIndexToPhysicalPoint(index), atol=1e-9)
    assert image.meta["space"] == "RAS"
    np.testing.assert_allclose(image.pixdim, (0.6, 0.7, 2.5))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_nrrd_saved_as_nifti_has_the_same_geometry_for_nibabel_and_simpleitk(tmp_path, name):
    source = sitk.ReadImage(str(write(tmp_path / "a.nrrd", DIRECTIONS[name])))
    image = load(tmp_path / "a.nrrd")
    writer = "knowsam_monai.data.nifti_writer.NiftiGeometryWriter"
    SaveImage(tmp_path, "out", ".nii.gz", separate_folder=False, resample=False, writer=writer, print_log=False)(image)
    saved = tmp_path / "a_out.nii.gz"
    itk = sitk.ReadImage(str(saved))
    np.testing.assert_allclose(itk.GetOrigin(), source.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(itk.GetSpacing(), source.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(itk.GetDirection(), source.GetDirection(), atol=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), VOXELS.T)
    nifti = nibabel.load(saved)
    np.testing.assert_allclose(nifti.affine, image.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(nifti.dataobj), VOXELS)


def test_header_that_counts_toward_right_and_anterior_is_read_in_the_same_place(tmp_path):
    """The words of an NRRD header, which SimpleITK never writes itself."""
    write(tmp_path / "lps.nrrd")
    (tmp_path / "ras.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 5 4 3\nendian: little\n"
        b"space directions: (-0.6,0,0) (0,-0.7,0) (0,0,2.5)\nkinds: domain domain domain\nencoding: raw\n"
        b"space origin: (10,-20,30)\n\n" + VOXELS.astype("<i2").tobytes(order="F")
    )
    one, other = load(tmp_path / "lps.nrrd"), load(tmp_path / "ras.nrrd")
    np.testing.assert_allclose(one.affine, other.affine)
    np.testing.assert_array_equal(one, other)


def test_voxels_of_several_values_and_several_files_are_channels(tmp_path):
    channels = np.stack([VOXELS, VOXELS + 100], axis=-1)
    sitk.WriteImage(sitk.GetImageFromArray(channels.transpose(2, 1, 0, 3), isVector=True), str(tmp_path / "v.nrrd"))
    np.testing.assert_array_equal(load(tmp_path / "v.nrrd"), np.moveaxis(channels, -1, 0))
    paths = [write(tmp_path / f"{name}.nrrd") for name in "ab"]
    np.testing.assert_array_equal(load(paths), np.stack([VOXELS, VOXELS]))
    np.testing.assert_array_equal(load([paths[0], paths[0]]), np.stack([VOXELS, VOXELS]))
    moved = write(tmp_path / "c.nrrd", origin=(0.0, 0.0, 0.0))
    with pytest.raises(
        ValueError, match="c.nrrd has another shape, orientation or position than .*a.nrrd; resample one"
    ):
        load([paths[0], moved])


def test_2d_image_is_read_and_a_series_in_time_is_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS[:, :, 0].T), str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(load(tmp_path / "a.mha")[0], VOXELS[:, :, 0])
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(VOXELS)] * 2), str(tmp_path / "t.nrrd"))
    with pytest.raises(ValueError, match="must be 2D or 3D but .*t.nrrd has 4 axes"):
        load(tmp_path / "t.nrrd")


def test_broken_file_is_named_in_one_sentence(tmp_path):
    path = write(tmp_path / "half.nrrd")
    path.write_bytes(path.read_bytes()[:-40])
    for name in ("half.nrrd", "missing.nrrd"):
        with pytest.raises(ValueError, match=f"`image` must be a readable image but .*{name} is not: ") as caught:
            LoadCased("image")({"image": str(tmp_path / name)})
        assert "\n" not in str(caught.value)
