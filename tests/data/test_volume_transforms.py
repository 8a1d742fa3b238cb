from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from knowsam_monai.data import CropCenterd, OrientVolumed, PadVolumed, ResampleVolumed
from knowsam_monai.data.transforms import AXES


def volume(array: torch.Tensor, spacing=(1.0, 1.0, 1.0), **meta) -> MetaTensor:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return MetaTensor(array, affine=affine, meta={"filename_or_obj": "case.nrrd", **meta})


def test_volume_whose_spacing_is_in_another_unit_is_refused_by_name():
    """0.6 mm, written in micrometers."""
    with pytest.raises(
        ValueError, match=r"`image` must take at most 2 GiB at .* but case.nrrd, .* of 600 x 600 x 600 mm"
    ):
        ResampleVolumed("image", mode="bilinear")({"image": volume(torch.zeros(1, 9, 9, 9), spacing=(600, 600, 600))})


def test_volume_is_resampled_to_cubic_voxels_and_goes_back_to_its_own_grid():
    image = volume(torch.arange(5.0).expand(1, 4, 6, 5).clone(), spacing=(1.0, 0.5, 2.0))
    label = volume((image.as_tensor() >= 2).float(), spacing=(1.0, 0.5, 2.0))
    resample = ResampleVolumed(pixdim=(1.0, 1.0, 1.0))
    case = resample({"image": image, "label": label})
    # From the first voxel's center to the last one's it is 3, 2.5 and 8 mm.
    assert case["image"].shape == case["label"].shape == (1, 4, 4, 9)
    assert case["image"].pixdim.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(case["image"][0, 1, 1].as_tensor(), torch.arange(9.0) / 2)
    assert set(case["label"].unique().tolist()) == {0.0, 1.0}
    back = resample.inverse(case)
    assert back["image"].shape == image.shape
    torch.testing.assert_close(back["image"].affine, image.affine)


def test_zero_keeps_an_axis_as_it_is():
    image = volume(torch.rand(1, 4, 6, 5), spacing=(1.0, 0.5, 2.0))
    case = ResampleVolumed("image", pixdim=(0, 0, 1.0), mode="bilinear")({"image": image})
    assert case["image"].shape == (1, 4, 6, 9)
    assert case["image"].pixdim.tolist() == [1.0, 0.5, 1.0]


def test_volume_of_unknown_spacing_is_neither_resampled_nor_cropped_and_comes_back():
    image = volume(torch.rand(1, 4, 6, 5), spacing_known=False)
    for transform in (ResampleVolumed("image", pixdim=(0.5, 0.5, 0.5), mode="bilinear"), CropCenterd("image", size=2)):
        case = transform({"image": image})
        assert torch.equal(case["image"], image)
        assert torch.equal(transform.inverse(case)["image"], image)


def bright_at(*places: tuple[int, int, int], shape=(20, 20, 6)) -> torch.Tensor:
    array = torch.zeros(1, *shape)
    for place in places:
        array[(0, *place)] = 1
    return array


@pytest.mark.parametrize(
    "places, spacing, corner, shape",
    [
        # 8 mm are 8 voxels around 10: 6 to 13 (to 14 would be as good); the depth is shorter and stays whole
        ([(10, 10, 3)], (1.0, 1.0, 1.0), (6, 6, 0), (8, 8, 6)),
        # 8 mm are 4 voxels of 2 mm, and 16 of 0.5 mm
        ([(10, 10, 3)], (2.0, 0.5, 1.0), (8, 2, 0), (4, 16, 6)),
        # 8 mm are 3 voxels of 3 mm, and not even one of 20 mm
        ([(10, 10, 3)], (3.0, 20.0, 1.0), (9, 10, 0), (3, 1, 6)),
        # in a corner the cube stays inside
        ([(0, 19, 0)], (1.0, 1.0, 1.0), (0, 12, 0), (8, 8, 6)),
        # in the middle of two
        ([(4, 9, 0), (16, 11, 0)], (1.0, 1.0, 1.0), (6, 6, 0), (8, 8, 6)),
        # an image without contrast: its middle
        ([], (1.0, 1.0, 1.0), (6, 6, 0), (8, 8, 6)),
    ],
)
def test_cube_lies_around_the_center_of_brightness(places, spacing, corner, shape):
    image = volume(bright_at(*places) + 3, spacing)
    case = CropCenterd(size=8)({"image": image, "label": volume(torch.arange(2400.0).reshape(1, 20, 20, 6), spacing)})
    assert tuple(case["image"].shape[1:]) == tuple(case["label"].shape[1:]) == shape
    assert case["label"][0, 0, 0, 0] == torch.arange(2400.0).reshape(20, 20, 6)[corner]
    torch.testing.assert_close(case["image"].affine[:3, 3].tolist(), [i * s for i, s in zip(corner, spacing)])
    assert case.keys() == {"image", "label"}


def test_brightness_is_that_of_all_channels():
    image = volume(torch.cat([bright_at(), bright_at((19, 0, 3))]))
    cropped = CropCenterd("image", size=8)({"image": image})["image"]
    assert cropped.affine[:3, 3].tolist() == [12.0, 0.0, 0.0]


def test_crop_looks_at_no_label():
    image = volume(bright_at((10, 10, 3)))
    cropped = [
        CropCenterd(size=8)({"image": image, "label": volume(bright_at(place))})["image"]
        for place in [(0, 0, 0), (19, 19, 5)]
    ]
    assert torch.equal(cropped[0], cropped[1])
    assert torch.equal(CropCenterd(size=8)({"image": image})["image"], cropped[0])


def test_crop_goes_back_to_the_whole_grid_with_zeros_around():
    image = volume(bright_at((2, 15, 3)) + 1)
    crop = CropCenterd("image", size=8)
    back = crop.inverse(crop({"image": image}))["image"]
    assert back.shape == image.shape and back[0, 2, 15, 3] == 2
    assert (back != 0).sum() == 8 * 8 * 6
    torch.testing.assert_close(back.affine, image.affine)


@pytest.mark.parametrize(("place", "is_cut"), [((11, 9, 3), False), ((0, 0, 0), True)])
def test_crop_that_cuts_into_the_label_is_warned_of_with_the_file(caplog, place, is_cut):
    image, label = volume(bright_at((10, 10, 3))), volume(bright_at(place, (10, 10, 2)))
    label.meta["filename_or_obj"] = "case07_seg.nii.gz"
    CropCenterd(size=8)({"image": image, "label": label})
    warnings = [message for message in caplog.messages if "labeled voxels to the crop" in message]
    assert len(warnings) == is_cut
    assert not is_cut or "case07_seg.nii.gz loses 1 of its 2 labeled voxels to the crop of 8 mm" in warnings[0]


def test_without_a_size_nothing_is_cropped():
    case = {"image": volume(bright_at((0, 0, 0)))}
    crop = CropCenterd(size=None)
    assert crop(case)["image"] is case["image"] and crop.inverse(case)["image"] is case["image"]


def test_cube_must_have_a_size():
    with pytest.raises(ValueError, match="`size` must be a length above 0 mm or None but is 0"):
        CropCenterd(size=0)


def test_volume_smaller_than_the_patch_is_padded_and_said_and_comes_back(caplog):
    pad = PadVolumed(spatial_size=(8, 4, 4))
    image = volume(torch.ones(1, 5, 6, 3))
    case = pad({"image": image, "label": volume(torch.ones(1, 5, 6, 3))})
    assert case["image"].shape == case["label"].shape == (1, 8, 6, 4)
    assert case["image"].sum() == case["label"].sum() == 5 * 6 * 3
    assert "case.nrrd has (5, 6, 3) voxels, fewer than a patch, (8, 4, 4), and is padded" in caplog.text
    assert torch.equal(pad.inverse(case)["image"], image)


def test_volume_as_large_as_the_patch_passes_unsaid(caplog):
    image = volume(torch.rand(1, 8, 8, 4))
    assert torch.equal(PadVolumed(spatial_size=(8, 4, 4))({"image": image})["image"], image)
    assert caplog.text == ""


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SAR", "PIL"])
def test_volume_is_seen_the_same_way_however_it_was_stored(axcodes):
    torch.manual_seed(0)
    image = volume(torch.rand(1, 4, 5, 3), (1.0, 2.0, 3.0))
    stored = Orientation(axcodes=axcodes, labels=AXES)(image)
    orient = OrientVolumed("image")
    seen = orient({"image": stored})["image"]
    assert torch.equal(seen.as_tensor(), image.flip(1, 2).as_tensor())  # the identity runs to R, A, S
    back = orient.inverse({"image": seen})["image"]
    assert torch.equal(back.as_tensor(), stored.as_tensor()) and torch.equal(back.affine, stored.affine)


def test_volume_of_unknown_geometry_is_not_turned():
    image = volume(torch.rand(1, 4, 5, 3), spacing_known=False)
    orient = OrientVolumed("image")
    assert orient({"image": image})["image"] is image and orient.inverse({"image": image})["image"] is image
    case = {"image": volume(torch.rand(1, 4, 5, 3)), "label": image}
    assert OrientVolumed()(case) == case
