"""From data-list items to a cached dataset, of slices or of whole volumes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from monai.data import CacheDataset
from monai.transforms import Compose

from knowsam_monai import ranks

__all__ = ["cached_dataset"]


def cached_dataset(
    data: Sequence[dict],
    preprocessing: Callable | Sequence[Callable],
    augmentation: Callable | Sequence[Callable] | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> CacheDataset:
    """Load and preprocess every item once, flatten volumes to slices, and augment a copy on each access.

    An item whose preprocessing gives a list (see `SplitSlicesd`) becomes as many entries; an item that stays whole,
    as a validation volume or one that 3D patches are cut from, is one entry. A random crop belongs in `augmentation`:
    with `SemiSupervisedLoader` each patch is then a function of the seed, the stream, the epoch and the index.

    Args:
        data: data-list items.
        preprocessing: deterministic transforms; their results are kept in memory.
        augmentation: random transforms, drawn anew on each access.
        num_workers: number of threads that load.
        progress: whether to show a progress bar where the output is a terminal.

    Raises:
        ValueError: what a transform found wrong with a file, as it said it.

    Example:
        >>> from monai.transforms import RandFlipd
        >>> from knowsam_monai.data import LoadCased, SplitSlicesd, cached_dataset
        >>> dataset = cached_dataset(
        ...     [{"image": "patient001_frame01.nii.gz"}],
        ...     [LoadCased("image", ensure_channel_first=True), SplitSlicesd("image")],
        ...     [RandFlipd("image", prob=0.5)],
        ... )     # doctest: +SKIP
    """
    progress = progress and sys.stderr.isatty() and ranks.rank() == 0
    try:
        loaded = CacheDataset(data, _compose(preprocessing), num_workers=num_workers, progress=progress)
        cases = [loaded[index] for index in range(len(loaded))]
    except RuntimeError as error:
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, ValueError):
            root = root.__cause__
        if not isinstance(root, ValueError):
            raise
        # MONAI's "applying transform ..." would stand last and hide the sentence.
        raise root from None
    slices = [entry for case in cases for entry in (case if isinstance(case, list) else [case])]
    return CacheDataset(slices, _compose(augmentation), progress=False)


def _compose(transform: Callable | Sequence[Callable] | None) -> Compose:
    return transform if isinstance(transform, Compose) else Compose(transform)
