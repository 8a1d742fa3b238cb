import os

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, SaveImage

from knowsam_monai.data.nifti_writer import is_label_map
from knowsam_monai.errors import root_cause

WRITER = "knowsam_monai.data.nifti_writer.NiftiGeometryWriter"
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, 9, 7], [0, 0, 0, 1]])


def save(image, folder, **meta):
    image.meta.update(meta)
    SaveImage(folder, output_dtype=np.uint8, resample=False, separate_folder=False, print_log=False, writer=WRITER)(
        image
    )
    return nibabel.load(next(folder.glob("*.nii.gz")))


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_forms_and_their_codes_are_those_of_the_source(tmp_path, image_class):
    source = image_class(np.ones((4, 5, 3), np.int16), None)
    source.header.set_qform(AFFINE, 2)
    source.header.set_sform(AFFINE @ np.diag([1, 1, 2, 1]), 3)
    nibabel.save(image_class(np.asarray(source.dataobj), None, source.header), tmp_path / "a.nii")
    written = save(LoadImage(ensure_channel_first=True)(tmp_path / "a.nii"), tmp_path)
    assert type(written) is image_class
    for matrix, code in (written.get_qform(coded=True), written.get_sform(coded=True)):
        assert code in (2, 3)
        expected = source.get_qform() if code == 2 else source.get_sform()
        np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize("name", ["a.nii", "a.h5"])
def test_header_says_that_it_is_a_label_map(tmp_path, name):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3), np.int16), AFFINE), tmp_path / "a.nii")
    save(MetaTensor(torch.ones(1, 4, 5, 3), affine=AFFINE), tmp_path, filename_or_obj=str(tmp_path / name))
    assert is_label_map(tmp_path / "a_trans.nii.gz") and not is_label_map(tmp_path / "a.nii")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "a_trans.nii.gz").read_bytes()[:40])
    os.mkfifo(tmp_path / "pipe.nii")
    assert not any(is_label_map(tmp_path / other) for other in ("cut.nii.gz", "pipe.nii", "missing.nii"))


def test_a_map_of_a_source_with_channels_has_none(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3, 2), np.int16), AFFINE), tmp_path / "a.nii")
    image = LoadImage(ensure_channel_first=True)(tmp_path / "a.nii")
    assert image.shape == (2, 4, 5, 3)
    written = save(image[:1], tmp_path)
    assert written.shape == (4, 5, 3)
    np.testing.assert_allclose(written.affine, AFFINE)


def test_another_grid_is_written_with_its_own_affine(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3), np.int16), AFFINE), tmp_path / "a.nii")
    half = MetaTensor(torch.ones(1, 2, 5, 3), affine=AFFINE @ np.diag([2, 1, 1, 1]))
    written = save(half, tmp_path, filename_or_obj=str(tmp_path / "a.nii"))
    assert written.shape == (2, 5, 3)
    np.testing.assert_allclose(written.affine, AFFINE @ np.diag([2, 1, 1, 1]))


@pytest.mark.parametrize("name", ["volume.h5", "scan.mha"])
def test_a_source_that_is_no_nifti_file_is_written_with_monai_s_affine_in_mm(tmp_path, name):
    (tmp_path / name).write_bytes(b"not nifti")
    written = save(MetaTensor(torch.ones(1, 4, 5, 3), affine=AFFINE), tmp_path, filename_or_obj=str(tmp_path / name))
    np.testing.assert_allclose(written.affine, AFFINE)
    assert all(code == 1 for _, code in (written.get_qform(coded=True), written.get_sform(coded=True)))
    assert written.header.get_xyzt_units()[0] == "mm" and len(list(tmp_path.iterdir())) == 2  # no part of a file


def test_input_is_not_written_over(tmp_path):
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.float32), np.eye(4)), path)
    before = path.read_bytes()
    save = SaveImage(tmp_path, "", ".nii.gz", separate_folder=False, resample=False, writer=WRITER, print_log=False)
    with pytest.raises(Exception) as error:
        save(LoadImage(ensure_channel_first=True)(path))
    assert "`filename` must not be the input file but is" in str(root_cause(error.value))
    assert path.read_bytes() == before


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 1, 5), (1, 4, 5)])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [1, 2, 0]], ids=["axial", "coronal", "sagittal"])
def test_single_slice_of_any_plane_keeps_its_grid(tmp_path, shape, order):
    affine = np.eye(4)
    affine[:3, :3] = np.diag([1.5, 2, 8])[order]
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.int16), affine), tmp_path / "a.nii")
    written = save(LoadImage(ensure_channel_first=True)(tmp_path / "a.nii"), tmp_path)
    assert written.shape == shape and written.get_fdata().all()
    np.testing.assert_array_equal(written.affine, affine)
