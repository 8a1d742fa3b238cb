from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, get_track_meta
from monai.transforms import Compose, Lambdad, RandFlipd, RandShiftIntensityd

from knowsam_monai.data import CheckDatad, SplitSlicesd, cached_dataset


class Load:
    """Stands for reading a file, and counts."""

    def __init__(self, depths=(2, 3)) -> None:
        self.depths = depths
        self.count = 0

    def __call__(self, item: dict) -> dict:
        self.count += 1
        return {**item, "image": MetaTensor(torch.full((1, 4, 4, self.depths[item["number"]]), float(item["number"])))}


ITEMS = [{"number": 0}, {"number": 1}]


def test_volumes_are_flattened_to_slices_in_order():
    dataset = cached_dataset(ITEMS, [Load(), SplitSlicesd()], progress=False)
    assert [(item["number"], item["slice"]) for item in dataset] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert all(item["image"].shape == (1, 4, 4) for item in dataset)


def test_volumes_stay_whole_without_a_split():
    dataset = cached_dataset(ITEMS, Compose([Load()]), progress=False)
    assert [item["image"].shape for item in dataset] == [(1, 4, 4, 2), (1, 4, 4, 3)]


def test_preprocessing_runs_once_an_item():
    load = Load()
    dataset = cached_dataset(ITEMS, [load, SplitSlicesd()], progress=False)
    for _ in range(2):
        list(dataset)
    assert load.count == 2


def test_augmentation_is_drawn_on_each_access_and_leaves_the_cache():
    augmentation = [
        RandShiftIntensityd("image", offsets=5.0, prob=1.0),
        Lambdad("image", lambda image: image.add_(100)),  # in place
    ]
    dataset = cached_dataset(ITEMS, [Load(), SplitSlicesd()], augmentation, progress=False)
    first, second = dataset[0]["image"], dataset[0]["image"]
    assert not torch.equal(first, second)
    assert 95 <= second.min() and second.max() <= 105


def test_no_items_give_an_empty_dataset():
    assert len(cached_dataset([], [Load()], progress=False)) == 0


def test_error_of_a_transform_stays_the_last_line():
    def spoil(item: dict) -> dict:
        item["image"][..., 0] = float("nan")
        return item

    with pytest.raises(ValueError, match="`image` must be finite but an image in memory has") as caught:
        cached_dataset(ITEMS, [Load(), spoil, CheckDatad()], progress=False)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError) as caught:
        cached_dataset(ITEMS, [Load(depths=())], progress=False)
    assert isinstance(caught.value.__cause__, IndexError)


def test_augmented_entries_carry_no_metadata_but_others_do():
    augmentation = [RandFlipd("image", prob=1.0, spatial_axis=0)]  # makes a MetaTensor of a tensor, as a rule
    dataset = cached_dataset(ITEMS, [Load(), SplitSlicesd()], augmentation, progress=False)
    assert type(dataset[0]["image"]) is torch.Tensor and get_track_meta()
    assert type(cached_dataset(ITEMS, [Load(), SplitSlicesd()], progress=False)[0]["image"]) is MetaTensor


def test_tracking_of_metadata_is_as_before_after_a_failed_transform():
    augmentation = [RandFlipd("image"), Lambdad("image", lambda image: image.missing)]
    dataset = cached_dataset(ITEMS, [Load()], augmentation, progress=False)
    with pytest.raises(RuntimeError):
        dataset[0]
    assert get_track_meta()
