from __future__ import annotations

import pytest
import torch
from monai.data import Dataset, MetaTensor
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
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
    RandSmoothDeformd,
    RandSpatialCropd,
    ScaleIntensityd,
)
from torch.utils.data import ConcatDataset, DataLoader, Subset

from knowsam_monai.data import RandOrientationd, SemiSupervisedLoader
from knowsam_monai.data.orientation import orient
from knowsam_monai.distillation.sam_image import check_orientations

BOTH = {"keys": ["image", "label"], "allow_missing_keys": True}
SQUARE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])


def items(num: int, labeled: bool) -> list[dict]:
    rows = [{"image": MetaTensor(torch.rand(1, 8, 8))} for _ in range(num)]
    return [{**row, "label": row["image"].round()} for row in rows] if labeled else rows


def loader(*transforms, num_workers: int = 0) -> SemiSupervisedLoader:
    torch.manual_seed(0)
    pipelines = [Compose(transforms), Compose(transforms)]
    datasets = [Dataset(items(4, labeled), pipeline) for labeled, pipeline in zip((True, False), pipelines)]
    return SemiSupervisedLoader(*datasets, 2, 2, num_workers=num_workers)


def test_the_eight_orientations_are_written_down():
    found = [orient(SQUARE, orientation).flatten().int().tolist() for orientation in range(8)]
    turns = [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
    assert found == turns + [[c, d, a, b] for a, b, c, d in turns]
    assert len({tuple(one) for one in found}) == 8


def test_affine_of_an_image_follows_it():
    image = MetaTensor(torch.rand(1, 4, 4), affine=torch.eye(4, dtype=torch.float64))
    flipped = orient(image, 4)
    assert flipped.affine[:2, :2].tolist() == [[-1, 0], [0, 1]] and flipped.affine[0, 3] == 3


def test_image_and_label_move_together_and_the_image_for_sam_is_theirs():
    transform = RandOrientationd(**BOTH).set_random_state(0)
    seen = set()
    for _ in range(60):
        image = torch.rand(1, 4, 4)
        item = transform({"image": image, "label": image * 2})
        assert torch.equal(item["image"], orient(image, item["orientation"]))
        assert torch.equal(item["label"], 2 * item["image"]) and torch.equal(item["sam_image"], item["image"])
        assert item["sam_image"].data_ptr() != item["image"].data_ptr()
        seen.add(item["orientation"])
    assert seen == set(range(8))


def test_only_the_orientations_that_are_given_are_drawn():
    transform = RandOrientationd("image", orientations=(2, 4)).set_random_state(0)
    assert {transform({"image": SQUARE})["orientation"] for _ in range(20)} == {2, 4}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_brings_the_image_before_its_intensities_were_augmented(num_workers):
    batches = loader(
        RandOrientationd(**BOTH),
        RandScaleIntensityd("image", factors=(1.0, 1.0), prob=1.0),
        RandCoarseDropoutd("image", holes=1, spatial_size=2, fill_value=0, prob=1.0),
        num_workers=num_workers,
    )
    originals = [row["image"] for dataset in batches.datasets for row in dataset.data]
    for batch in batches:
        assert batch["orientation"].shape == (4,) and batch["sam_image"].shape == (4, 1, 8, 8)
        for sam_image, image, orientation in zip(batch["sam_image"], batch["image"], batch["orientation"]):
            assert any(torch.equal(sam_image, orient(one, int(orientation))) for one in originals)
            kept = image != 0
            torch.testing.assert_close(image[kept], 2 * sam_image[kept])
            assert not kept.all()
        assert torch.equal(batch["label"], batch["sam_image"][:2].round())


@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 4, 4, 4)])
def test_image_that_is_not_2d_and_square_is_an_error(shape):
    with pytest.raises(ValueError, match="`image` must be 2D and square"):
        RandOrientationd("image")({"image": torch.rand(shape)})


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"keys": "label"}, r"`image_key` must be one of `keys`, \['label'\], but is 'image'"),
        ({"orientations": (0, 8)}, r"`orientations` must be numbers from 0 to 7 but is \[0, 8\]"),
        ({"orientations": ()}, "`orientations` must be numbers"),
    ],
)
def test_a_wrong_argument_is_an_error(kwargs, words):
    with pytest.raises(ValueError, match=words):
        RandOrientationd(**kwargs)


def test_intensities_after_the_orientation_are_accepted():
    noise = OneOf([RandGaussianNoised("image"), RandSimulateLowResolutiond("image")])
    check_orientations(loader(ScaleIntensityd("image"), RandOrientationd(**BOTH), noise))
    check_orientations([{"image": SQUARE}])  # no transforms to be read


@pytest.mark.parametrize(
    "transform",
    [
        RandFlipd("image"),
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


@pytest.mark.parametrize("transform", [Flipd(["image", "label"], 0), MixUpd("image", batch_size=1)])
def test_what_is_not_random_and_leaves_the_image_for_sam_behind_is_an_error(transform):
    with pytest.raises(ValueError, match=f"{type(transform).__name__}"):
        check_orientations(loader(RandOrientationd(**BOTH), transform))


def test_flip_of_the_image_for_sam_too_is_accepted_and_intensities_without_it_are_warned_of(caplog):
    check_orientations(loader(RandOrientationd(**BOTH), Flipd(["image", "label", "sam_image"], 0)))
    assert not caplog.messages
    check_orientations(loader(RandOrientationd(**BOTH), ScaleIntensityd("image")))
    assert "ScaleIntensityd comes after RandOrientationd, so SAM sees the image without it." in caplog.messages
