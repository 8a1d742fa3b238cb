from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader, DistributedSampler

from knowsam_monai.distillation.watched_loader import (
    CurrentBatch,
    WatchedLoader,
    check_same_image,
    image_and_label,
    on_device,
)


def test_watched_loader_is_the_loader_in_all_else_and_announces_each_batch_before_it_returns_it():
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
    assert loader and list(copy.copy(loader)) == [1]


def test_watched_loader_passes_for_the_one_inside():
    data = DataLoader(torch.arange(6), sampler=DistributedSampler(torch.arange(6), num_replicas=1, rank=0))
    seen = []
    loader = WatchedLoader(data, seen.append)
    assert isinstance(loader, DataLoader) and vars(loader) is vars(data) and not isinstance(loader, list)
    loader.sampler.set_epoch(3)
    loader.note = "set on the loader"
    assert data.sampler.epoch == 3 and data.note == "set on the loader"
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):  # DataLoader's own
        loader.batch_size = 2
    assert len(iter(loader)) == 6 and type(pickle.loads(pickle.dumps(loader))) is DataLoader
    assert list(copy.deepcopy(loader)) == seen and len(seen) == 6
    copied = copy.deepcopy(loader)
    copied.note = "of the copy"
    assert data.note == "set on the loader"


def test_monai_trainer_shuffles_a_watched_loader_anew_in_each_epoch():
    """It looks for a DataLoader with a DistributedSampler."""
    data = DataLoader(torch.arange(6), sampler=DistributedSampler(torch.arange(6), num_replicas=1, rank=0))
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=WatchedLoader(data, lambda _: None),
        network=torch.nn.Identity(),
        optimizer=None,
        loss_function=None,
        iteration_update=lambda engine, batch: {},
    ).run()
    assert data.sampler.epoch == 3


@pytest.mark.parametrize("kind", [list, iter, lambda batches: DataLoader(batches, batch_size=None)])
def test_next_gives_the_batches_one_after_another_and_begins_anew_after_the_end(kind):
    seen = []
    loader = WatchedLoader(kind([10, 20]), seen.append)
    assert [next(loader), next(loader)] == [10, 20] == seen
    with pytest.raises(StopIteration):
        next(loader)
    if kind is not iter:
        assert next(loader) == 10 and list(loader) == [10, 20]


def test_batch_that_is_taken_by_its_index_is_announced_too():
    seen = []
    loader = WatchedLoader([10, 20, 30], seen.append)
    assert loader[1] == 20 and loader[1:] == [20, 30] and seen == [20]


def test_loader_is_watched_before_anything_is_attached():
    loader, seen = WatchedLoader([10, 20]), []
    batches = iter(loader)
    assert next(batches) == 10
    loader.watched_by.append(seen.append)
    assert next(batches) == 20 and seen == [20]


# --- the batch where the student is -----------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["image", "label"])


class Frozen(dict):
    """A batch with attributes beside its items."""


@pytest.mark.parametrize(
    "batch",
    [
        {"image": torch.zeros(2), "name": ["a", "b"], "count": 3, "nothing": None, "array": np.zeros(2)},
        OrderedDict(image=torch.zeros(2)),
        Frozen(image=MetaTensor(torch.zeros(2))),
        Pair(torch.zeros(2), "a"),
        (torch.zeros(2), [torch.zeros(3), {"label": torch.zeros(1)}]),
        torch.zeros(2),
        ["a", 1],
    ],
)
def test_batch_is_moved_tensor_by_tensor_and_not_at_all_where_it_is(batch):
    assert on_device(batch, torch.device("cpu")) is batch
    moved = on_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)

    def check(new, old):
        if isinstance(old, torch.Tensor):
            assert new.device.type == "meta" and type(new) is type(old) and old.device.type == "cpu"
        elif isinstance(old, dict):
            assert new.keys() == old.keys()
            for key in old:
                check(new[key], old[key])
        elif isinstance(old, (tuple, list)):
            for item, former in zip(new, old, strict=True):
                check(item, former)
        else:
            assert new is old

    check(moved, batch)


def test_batch_is_moved_once():
    current = CurrentBatch()
    current.take({"image": torch.zeros(2)})
    moved = current.on(torch.device("meta"))
    assert current.on(torch.device("meta")) is moved and moved["image"].device.type == "meta"
    assert current.on(torch.device("cpu")) is current.batch
    current.take({"image": torch.zeros(3)})
    assert current.on(torch.device("meta"))["image"].shape == (3,)


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
    image, label, is_same = image_and_label(batch, IMAGE)
    check_same_image(is_same, IMAGE)
    assert torch.equal(image, IMAGE) and label is LABEL


def test_image_that_is_the_batch_s_own_tensor_is_not_compared():
    assert image_and_label((IMAGE, LABEL), IMAGE)[2] is None
    assert image_and_label((MetaTensor(IMAGE), LABEL), IMAGE)[2] is None
    assert image_and_label((IMAGE, LABEL), IMAGE.clone())[2].item()
    assert not image_and_label((IMAGE, LABEL), IMAGE.transpose(-1, -2))[2].item()  # the same memory, read otherwise


def test_batch_may_have_no_label_and_an_image_of_its_own_for_sam():
    sam_image = IMAGE + 1
    assert image_and_label({"image": IMAGE, "sam_image": sam_image}, IMAGE) == (sam_image, None, None)


@pytest.mark.parametrize("batch", [IMAGE, {"volume": IMAGE}, (IMAGE,), (IMAGE, LABEL, LABEL), np.zeros(3)])
def test_anything_else_is_an_error(batch):
    with pytest.raises(ValueError, match=r"must be a mapping with 'image' and 'label' or a pair .* pass `select`"):
        image_and_label(batch, IMAGE)


@pytest.mark.parametrize("image", [IMAGE[:2], IMAGE + 0.01, IMAGE[..., :2]])
def test_image_that_differs_is_an_error(image):
    with pytest.raises(ValueError, match="must be the image of the watched batch, .* but differs"):
        check_same_image(image_and_label((IMAGE, LABEL), image)[2], image)
