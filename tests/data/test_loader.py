from __future__ import annotations

import gc
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.transforms import (
    Compose,
    Lambdad,
    MapTransform,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandSpatialCropSamplesd,
)

from knowsam_monai.data import SemiSupervisedLoader

KEYS = ["image", "label"]


class GlobalNoised(MapTransform):
    """Random from the global generators, as transforms of other libraries are."""

    def __call__(self, data):
        d = dict(data)
        d["image"] = d["image"] + np.random.rand() + random.random() + torch.rand(d["image"].shape)
        return d


def augmentation() -> Compose:
    return Compose(
        [
            RandFlipd(KEYS, prob=0.5, spatial_axis=0, allow_missing_keys=True),
            RandAffined(
                KEYS,
                prob=0.8,
                rotate_range=0.5,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
                allow_missing_keys=True,
            ),
            OneOf([RandGaussianNoised("image", prob=1.0), Compose([RandAdjustContrastd("image", prob=1.0)])]),
            GlobalNoised("image"),
        ]
    )


def dataset(name: str, count: int, labeled: bool, transform=None) -> CacheDataset:
    generator = torch.Generator().manual_seed(count)
    items = []
    for index in range(count):
        affine = torch.diag(torch.tensor([1.0 + index, 1.0, 1.0, 1.0], dtype=torch.float64))
        item = {"image": torch.rand(1, 8, 8, generator=generator)}
        if labeled:
            item["label"] = torch.randint(0, 3, (1, 8, 8), generator=generator).float()
        meta = {"filename_or_obj": f"{name}{index}"}
        images = {key: MetaTensor(image, affine=affine, meta=dict(meta)) for key, image in item.items()}
        items.append({**images, "name": f"{name}{index}"})
    return CacheDataset(items, transform or Compose([]), progress=False)


def loader(labeled=5, unlabeled=7, sizes=(2, 3), transform=None, **arguments) -> SemiSupervisedLoader:
    return SemiSupervisedLoader(
        dataset("l", labeled, True, transform), dataset("u", unlabeled, False, transform), *sizes, **arguments
    )


def take(iterable: SemiSupervisedLoader, count: int) -> list[dict]:
    """The next `count` batches, over as many passes as they need."""
    batches: list[dict] = []
    while len(batches) < count:
        for batch in iterable:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def names(batches: list[dict]) -> list[list[str]]:
    return [list(batch["name"]) for batch in batches]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert names(first) == names(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in KEYS:
            assert torch.equal(one[key].as_tensor(), other[key].as_tensor())


def test_labeled_rows_come_first_and_only_they_have_labels():
    for batch in take(loader(), 6):
        assert [name[0] for name in batch["name"]] == ["l", "l", "u", "u", "u"]
        assert batch["image"].shape == (5, 1, 8, 8)
        assert batch["label"].shape == (2, 1, 8, 8)


def test_each_row_keeps_its_own_metadata():
    for batch in take(loader(transform=augmentation()), 3):
        assert isinstance(batch["image"], MetaTensor)
        assert batch["image"].meta["filename_or_obj"] == batch["name"]
        assert batch["label"].meta["filename_or_obj"] == batch["name"][:2]
        assert len(batch["image"].applied_operations) == 5
    batch = take(loader(), 1)[0]
    assert batch["image"].affine[:, 0, 0].tolist() == [1.0 + int(name[1:]) for name in batch["name"]]


def test_every_item_comes_once_before_any_comes_again():
    batches = take(loader(), 35)
    labeled = [name for batch in batches for name in batch["name"][:2]]
    unlabeled = [name for batch in batches for name in batch["name"][2:]]
    for rows, count in ((labeled, 5), (unlabeled, 7)):
        passes = [rows[start : start + count] for start in range(0, len(rows), count)]
        assert all(len(set(one)) == count for one in passes)
        assert len({tuple(one) for one in passes}) > len(passes) // 2  # and in another order


def test_same_seed_gives_the_same_batches_and_another_seed_others():
    first, same, other = (take(loader(transform=augmentation(), seed=seed), 6) for seed in (3, 3, 4))
    assert_same(first, same)
    assert names(first) != names(other)


def test_global_generators_neither_matter_nor_change():
    first = take(loader(transform=augmentation()), 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert_same(first, take(loader(transform=augmentation()), 3))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_bit(num_workers):
    straight = take(loader(transform=augmentation()), 7)
    with_workers = loader(transform=augmentation(), num_workers=num_workers)
    assert_same(straight, take(with_workers, 7))
    assert with_workers._loader.num_workers == num_workers
    assert with_workers._loader._iterator is not None  # the workers live on for the next pass


def test_augmentation_of_an_item_changes_from_pass_to_pass():
    batches = take(loader(labeled=2, transform=augmentation()), 6)
    images = [batch["image"][list(batch["name"]).index("l0")].as_tensor() for batch in batches]
    assert all(not torch.equal(images[0], image) for image in images[1:])


def test_augmentation_does_not_depend_on_the_batch():
    """One batch of 6 has the rows that three batches of 2 have."""
    small = take(loader(labeled=6, unlabeled=6, sizes=(2, 2), transform=augmentation()), 3)
    large = take(loader(labeled=6, unlabeled=6, sizes=(6, 6), transform=augmentation()), 1)[0]
    assert torch.equal(torch.cat([batch["image"][:2].as_tensor() for batch in small]), large["image"][:6].as_tensor())
    assert torch.equal(torch.cat([batch["label"].as_tensor() for batch in small]), large["label"].as_tensor())


@pytest.mark.parametrize("start", [0, 1, 3, 10])
def test_set_iteration_resumes_exactly(start):
    straight = take(loader(transform=augmentation()), 12)
    resumed = loader(transform=augmentation())
    take(resumed, 2)
    resumed.set_iteration(start)
    assert_same(straight[start:], take(resumed, 12 - start))


def test_workers_start_with_many_cached_tensors_under_the_default_of_python_3_14():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        items = [{"image": torch.full((1, 4, 4), float(i)), "label": torch.zeros(1, 4, 4)} for i in range(300)]
        batches = SemiSupervisedLoader(items, None, 2, 0, num_workers=1)
        assert next(iter(batches))["image"].shape == (2, 1, 4, 4)
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_next_iteration_goes_on_where_the_last_one_stopped(num_workers):
    straight = take(loader(), 9)
    broken = loader(num_workers=num_workers)
    pieces = []
    for count in (2, 1, 3, 3):  # within a pass, to its end, over it
        iterator = iter(broken)
        pieces += [next(iterator) for _ in range(min(count, len(broken)))]
    assert names(pieces) == names(straight)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch_without_overlap_or_loss(world_size):
    arguments = {"labeled": 6, "unlabeled": 9, "sizes": (6, 6), "transform": augmentation()}
    whole = take(loader(**arguments), 4)
    parts = [take(loader(**arguments, rank=rank, world_size=world_size), 4) for rank in range(world_size)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert len(set(len(share["name"]) for share in shares)) == 1
        part = 6 // world_size
        for key in KEYS:
            rows = torch.cat([share[key][:part].as_tensor() for share in shares])
            assert torch.equal(rows, batch[key][:6].as_tensor())
        assert [name for share in shares for name in share["name"][part:]] == batch["name"][6:]


def test_rank_comes_from_torch_distributed_when_it_is_initialized_later(monkeypatch):
    late = loader(labeled=6, unlabeled=6, sizes=(2, 4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    explicit = loader(labeled=6, unlabeled=6, sizes=(2, 4), rank=1, world_size=2)
    assert names(take(late, 2)) == names(take(explicit, 2))
    assert len(take(late, 1)[0]["name"]) == 3


def test_length_shows_every_unlabeled_item_once():
    assert len(loader(unlabeled=7, sizes=(2, 3))) == 3
    assert len(list(loader(unlabeled=7, sizes=(2, 3)))) == 3
    assert len(loader(labeled=4, unlabeled=8, sizes=(4, 2))) == 4


@pytest.mark.parametrize("unlabeled", [None, [], dataset("u", 7, False)])
def test_supervised_floor_has_labeled_rows_only(unlabeled):
    floor = SemiSupervisedLoader(dataset("l", 5, True), unlabeled, 2, 0)
    assert len(floor) == 3
    for batch in floor:
        assert batch["image"].shape[0] == batch["label"].shape[0] == 2


def test_lists_of_samples_are_flattened_within_their_stream():
    crop = Compose([RandSpatialCropSamplesd(KEYS, (4, 4), num_samples=2, random_size=False, allow_missing_keys=True)])
    batch = take(loader(transform=crop), 1)[0]
    assert [name[0] for name in batch["name"]] == ["l"] * 4 + ["u"] * 6
    assert batch["image"].shape == (10, 1, 4, 4) and batch["label"].shape == (4, 1, 4, 4)


@pytest.mark.parametrize("epoch_length, max_epochs", [(2, 5), (3, 3), (5, 2)])
def test_trainer_sees_one_seamless_stream_whatever_its_epoch_length(epoch_length, max_epochs):
    straight = take(loader(), epoch_length * max_epochs)
    network, seen = torch.nn.Conv2d(1, 3, 1), []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=loader(),
        epoch_length=epoch_length,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=lambda pred, label: pred[: len(label)].mean(),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch))
    trainer.run()
    assert names(seen) == names(straight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labeled": 0}, "`labeled` must have at least one item but is empty"),
        ({"sizes": (6, 3)}, "`labeled_batch_size` must be at most the number of labeled items, 5, but is 6"),
        ({"sizes": (2, 8)}, "`unlabeled_batch_size` must be at most the number of unlabeled items, 7, but is 8"),
        ({"sizes": (0, 3)}, "`labeled_batch_size` must be at least 1 but is 0"),
        ({"sizes": (2, -1)}, "`unlabeled_batch_size` must be at least 1 but is -1"),
        ({"unlabeled": 0}, "`unlabeled_batch_size` must be 0 without unlabeled items but is 3"),
        ({"rank": 2, "world_size": 2}, "`rank` must be from 0 to 1 but is 2"),
        ({"rank": 0, "world_size": 2}, "`unlabeled_batch_size` must be a multiple of the 2 processes"),
    ],
)
def test_bad_argument_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        loader(**arguments)


def test_negative_iteration_is_refused():
    with pytest.raises(ValueError, match="`iteration` must be at least 0 but is -1"):
        loader().set_iteration(-1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_stop_at_once_when_the_loader_goes(num_workers):
    """In a reference cycle torch waits 5 seconds for each."""
    with_workers = loader(num_workers=num_workers)
    take(with_workers, 2)
    started = time.monotonic()
    del with_workers
    gc.collect()
    assert time.monotonic() - started < 4


def test_label_on_an_unlabeled_item_and_none_on_a_labeled_one_are_errors():
    labeled, unlabeled = dataset("l", 4, True), dataset("u", 4, False)
    with pytest.raises(ValueError, match="`unlabeled` items must have no 'label' key but item . has one"):
        take(SemiSupervisedLoader(labeled, labeled, 2, 2), 1)
    with pytest.raises(ValueError, match="`labeled` items must have a 'label' key but item . has none"):
        take(SemiSupervisedLoader(unlabeled, unlabeled, 2, 2), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("key", KEYS)
def test_another_shape_later_in_the_data_is_one_sentence(key, num_workers):
    labeled = list(dataset("l", 6, True))
    labeled[5][key] = MetaTensor(torch.zeros(1, 6, 8), meta={"filename_or_obj": "late.nii"})
    batches = SemiSupervisedLoader(labeled, dataset("u", 6, False), 3, 1, num_workers=num_workers)
    with pytest.raises(ValueError) as error:
        take(batches, 2)
    message = str(error.value)
    assert message.startswith(f"`{key}` must have one shape in all rows of a batch but has (1, ")
    assert "(1, 6, 8) in late.nii" in message and "a resize (Resized)" in message and "\n" not in message


def test_other_keys_of_labeled_items_are_collated_with_the_labels():
    labeled = dataset("l", 4, True, Compose([Lambdad("label", lambda label: label.amax(), overwrite="highest")]))
    batch = take(SemiSupervisedLoader(labeled, dataset("u", 4, False), 2, 2), 1)[0]
    assert batch["highest"].shape == (2,)


def test_keys_of_unlabeled_items_alone_are_collated_for_as_many_rows():
    strong = Compose([Lambdad("image", lambda image: image + 1, overwrite="image_strong")])
    batch = take(SemiSupervisedLoader(dataset("l", 4, True), dataset("u", 4, False, strong), 2, 2), 1)[0]
    assert torch.equal(batch["image_strong"].as_tensor(), batch["image"].as_tensor()[2:] + 1)
