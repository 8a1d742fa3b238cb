from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.utils.data import DataLoader

from knowsam_monai.watched_loader import WatchedLoader, image_and_label


def test_watched_loader_is_the_loader_in_all_else_and_tells_of_each_batch_before_it_gives_it():
    data = DataLoader(torch.arange(6), batch_size=2)
    seen = []
    loader = WatchedLoader(data, seen.append)
    assert len(loader) == 3 and loader.batch_size == 2 and loader.dataset is data.dataset
    batches = iter(loader)
    for count in (1, 2, 3):
        assert next(batches) is seen[-1] and len(seen) == count
    assert torch.equal(torch.cat(seen), torch.arange(6))
    assert len(list(loader)) == 3  # once more


def test_watched_loader_has_no_length_and_no_attribute_that_the_loader_has_not():
    loader = WatchedLoader(iter([1]), lambda _: None)
    with pytest.raises(TypeError):
        len(loader)
    with pytest.raises(AttributeError):
        loader.batch_size
    assert list(copy.copy(loader)) == [1]


IMAGE, LABEL = torch.rand(3, 1, 4, 4), torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGE, "label": LABEL},
        {"image": MetaTensor(IMAGE), "label": LABEL, "name": ["a", "b", "c"]},
        (IMAGE, LABEL),
        [IMAGE.double(), LABEL],
        (IMAGE.numpy(), LABEL),
    ],
)
def test_image_and_label_of_a_mapping_or_a_pair(batch):
    image, label = image_and_label(batch, IMAGE)
    assert torch.equal(image, IMAGE) and label is LABEL


def test_batch_may_have_no_label_and_an_image_of_its_own_for_sam():
    sam_image = IMAGE + 1
    assert image_and_label({"image": IMAGE, "sam_image": sam_image}, IMAGE) == (sam_image, None)


@pytest.mark.parametrize("batch", [IMAGE, {"volume": IMAGE}, (IMAGE,), (IMAGE, LABEL, LABEL), np.zeros(3)])
def test_anything_else_is_an_error(batch):
    with pytest.raises(ValueError, match=r"must be a mapping with 'image' and 'label' or a pair .* give `select`"):
        image_and_label(batch, IMAGE)


@pytest.mark.parametrize("image", [IMAGE[:2], IMAGE + 0.01, IMAGE[..., :2]])
def test_image_that_differs_is_an_error(image):
    with pytest.raises(ValueError, match="must be the image of the watched batch, .* but differs"):
        image_and_label((IMAGE, LABEL), image)
