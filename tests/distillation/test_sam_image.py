"""The check that a cached encoder sees each image as its embedding was made."""

from __future__ import annotations

import pytest
import torch
from monai.data import Dataset
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Flipd,
    MixUpd,
    OneOf,
    Rand2DElasticd,
    RandAffined,
    RandCoarseDropoutd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGridDistortiond,
    RandRotate90d,
    RandSimulateLowResolutiond,
    RandSmoothDeformd,
    RandSpatialCropd,
    ScaleIntensityd,
)
from torch.utils.data import ConcatDataset, DataLoader, Subset

from knowsam_monai.data import RandOrientationd
from knowsam_monai.distillation.sam_image import check_orientations, sam_image_for
from tests.oriented import BOTH, SQUARE, loader


def test_intensities_after_the_orientation_and_all_that_is_not_random_before_it_are_accepted(caplog):
    noise = OneOf([RandGaussianNoised("image"), RandSimulateLowResolutiond("image")])
    before = Flipd(["image", "label"], 0), ScaleIntensityd("image")
    check_orientations(loader(*before, RandOrientationd(**BOTH), noise, Flipd("atlas", 0)))
    check_orientations([{"image": SQUARE}])  # no transforms to be read
    assert not caplog.messages


@pytest.mark.parametrize("sam_image", [torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 5)])
def test_image_for_sam_of_other_rows_or_another_size_is_an_error(sam_image):
    image = torch.ones(2, 1, 4, 4)
    assert sam_image_for(image, torch.zeros(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`sam_image` must have the rows and the size of the image, \(2, 1, 4, 4\)"):
        sam_image_for(image, sam_image)


class OwnFlipd(RandFlipd):
    """Of another module than MONAI's."""


@pytest.mark.parametrize(
    "transform",
    [
        RandFlipd("image"),
        OwnFlipd("image"),
        RandRotate90d("image"),
        RandAffined("image"),
        Rand2DElasticd("image", spacing=(2, 2), magnitude_range=(1, 2)),
        RandGridDistortiond("image"),
        RandSmoothDeformd("image", spatial_size=(8, 8), rand_size=(2, 2)),
        RandSpatialCropd("image", roi_size=(4, 4)),
        RandCropByPosNegLabeld("image", label_key="label", spatial_size=(4, 4)),
    ],
    ids=lambda transform: type(transform).__name__,
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_random_flip_turn_deformation_or_crop_is_named(transform, inside):
    other = OneOf([RandGaussianNoised("image"), Compose([transform])]) if inside else transform
    with pytest.raises(ValueError, match=f"only random flip.* but the augmentation has {type(transform).__name__};"):
        check_orientations(loader(RandOrientationd(**BOTH), other))


@pytest.mark.parametrize(
    ("transforms", "found"),
    [
        ([], "no random transform"),
        ([CenterSpatialCropd("image", (8, 8))], "no random transform"),
        ([RandGaussianNoised("image")], "RandGaussianNoised"),
        ([RandGaussianNoised("image"), RandOrientationd(**BOTH)], "RandGaussianNoised, RandOrientationd"),
        ([RandOrientationd(**BOTH)] * 2, "RandOrientationd, RandOrientationd"),
    ],
)
def test_orientation_that_is_not_first_and_once_is_an_error(transforms, found):
    with pytest.raises(ValueError, match=f"one RandOrientationd before all other random transforms .* has {found};"):
        check_orientations(loader(*transforms))


@pytest.mark.parametrize("wrap", [lambda d: Subset(d, [0]), lambda d: ConcatDataset([d, d])])
def test_datasets_inside_others_are_looked_into(wrap):
    inner = Dataset([{"image": SQUARE}], Compose([RandOrientationd(**BOTH), RandFlipd("image")]))
    with pytest.raises(ValueError, match="the augmentation has RandFlipd"):
        check_orientations(DataLoader(wrap(inner)))


class Around(Subset):
    """A dataset whose transform follows that of another."""

    def __init__(self, dataset, transform):
        super().__init__(dataset, [0])
        self.transform = transform


@pytest.mark.parametrize("around", [Around, Dataset])
def test_transforms_of_a_dataset_around_another_come_after_those_inside(around):
    inner = Dataset([{"image": SQUARE}], RandOrientationd(**BOTH))
    check_orientations(DataLoader(around(inner, RandGaussianNoised("image"))))
    with pytest.raises(ValueError, match="the augmentation has RandFlipd"):
        check_orientations(DataLoader(around(inner, RandFlipd("image"))))


def test_holes_in_the_label_are_an_error():
    holes = RandCoarseDropoutd(**BOTH, holes=1, spatial_size=2)
    with pytest.raises(
        ValueError, match="RandOrientationd as the only random transform of 'label' but RandCoarseDropoutd"
    ):
        check_orientations(loader(RandOrientationd(**BOTH), holes))


def test_noise_on_the_image_for_sam_is_an_error():
    noise = RandGaussianNoised(["image", "sam_image"])
    with pytest.raises(ValueError, match="must see 'sam_image' as RandOrientationd returns it but RandGaussianNoised"):
        check_orientations(loader(RandOrientationd(**BOTH), noise))


@pytest.mark.parametrize("transform", [Flipd(["image", "label"], 0), Flipd("label", 0), MixUpd("image", batch_size=1)])
def test_what_is_not_random_and_leaves_the_image_for_sam_behind_is_an_error(transform):
    with pytest.raises(ValueError, match=f"{type(transform).__name__}"):
        check_orientations(loader(RandOrientationd(**BOTH), transform))


def test_flip_of_the_image_for_sam_too_is_accepted_and_intensities_without_it_are_warned_of(caplog):
    check_orientations(loader(RandOrientationd(**BOTH), Flipd(["image", "label", "sam_image"], 0)))
    assert not caplog.messages
    check_orientations(loader(RandOrientationd(**BOTH), ScaleIntensityd("image")))
    assert "ScaleIntensityd comes after RandOrientationd, so SAM sees the image without it." in caplog.messages
