from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    RandCoarseDropoutd,
    RandScaleIntensityd,
)

from knowsam_monai.data import RandOrientationd
from knowsam_monai.data.orientation import orient
from tests.oriented import BOTH, SQUARE, loader


def test_the_eight_orientations_are_written_down():
    found = [orient(SQUARE, orientation).flatten().int().tolist() for orientation in range(8)]
    turns = [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
    assert found == turns + [[c, d, a, b] for a, b, c, d in turns]
    assert len({tuple(one) for one in found}) == 8


def test_affine_of_an_image_follows_it():
    image = MetaTensor(torch.rand(1, 4, 4), affine=torch.eye(4, dtype=torch.float64))
    flipped = orient(image, 4)
    assert flipped.affine[:2, :2].tolist() == [[-1, 0], [0, 1]] and flipped.affine[0, 3] == 3


@pytest.mark.parametrize("kind", [torch.Tensor, MetaTensor])
def test_all_orientations_are_of_the_type_of_the_image(kind):
    """A loader collates only rows of one type."""
    image = torch.rand(1, 4, 4)
    given = MetaTensor(image) if kind is MetaTensor else image
    assert all(type(orient(given, orientation)) is kind for orientation in range(8))


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


def test_another_image_key_is_an_error():
    with pytest.raises(ValueError, match=r"`image_key` must be one of `keys`, \['label'\], but is 'image'"):
        RandOrientationd("label")
