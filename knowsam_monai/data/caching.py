"""Cached datasets of slices or whole volumes from data-list items."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from monai.data import CacheDataset, get_track_meta, set_track_meta

from knowsam_monai import ranks
from knowsam_monai.data.transforms import rows_of
from knowsam_monai.errors import root_cause
from knowsam_monai.tensors import without_meta


def cached_dataset(
    data: Sequence[dict],
    preprocessing: Callable | Sequence[Callable],
    augmentation: Callable | Sequence[Callable] | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> CacheDataset:
    """Load and preprocess every item once, split volumes into slices, and augment a copy on each access.

    If preprocessing turns an item into a list (see `SplitSlicesd`), each element becomes an entry; otherwise the item
    is one entry. Put random crops into `augmentation`: with `SemiSupervisedLoader` each patch is then a function of the
    seed, the stream, the epoch and the index.

    With `augmentation` the entries are plain tensors, since copying and updating metadata would take a quarter to a
    half of its time. Put transforms that need spacing or orientation into `preprocessing`.

    Args:
        data: data-list items.
        preprocessing: deterministic transforms; their results are cached in memory.
        augmentation: random transforms, applied on each access.
        num_workers: number of loading threads.
        progress: whether to show a progress bar on a terminal.

    Raises:
        ValueError: if a transform refuses a file; MONAI's wrapping error is removed.

    Example:
        >>> from monai.transforms import RandFlipd
        >>> from knowsam_monai.data import LoadCased, SplitSlicesd, TurnSlicesd, cached_dataset
        >>> dataset = cached_dataset(
        ...     [{"image": "patient001_frame01.nii.gz"}],
        ...     [LoadCased("image", ensure_channel_first=True), TurnSlicesd("image"), SplitSlicesd("image")],
        ...     [RandFlipd("image", prob=0.5)],
        ... )     # doctest: +SKIP
    """
    progress = progress and sys.stderr.isatty() and ranks.rank() == 0
    try:
        loaded = CacheDataset(data, preprocessing, num_workers=num_workers, progress=progress)
        cases = [loaded[index] for index in range(len(loaded))]
    except RuntimeError as error:
        cause = root_cause(error)
        if not isinstance(cause, ValueError):
            raise
        raise cause from None  # without MONAI's "applying transform ..."
    slices = [entry for case in cases for entry in rows_of(case)]
    if augmentation is None:
        return CacheDataset(slices, None, progress=False)
    slices = [{key: without_meta(value) for key, value in entry.items()} for entry in slices]
    return _Augmented(slices, augmentation, progress=False)


class _Augmented(CacheDataset):
    """Cached entries whose transforms keep no metadata."""

    def _transform(self, index: int) -> Any:
        tracked = get_track_meta()
        set_track_meta(False)
        try:
            return super()._transform(index)
        finally:
            set_track_meta(tracked)
