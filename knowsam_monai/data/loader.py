"""The two-stream loader of semi-supervised training: labelled rows first, every draw a function of its seed."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.data.utils import list_data_collate, set_rnd
from torch.utils.data import DataLoader, Dataset

from knowsam_monai.data.sampling import LABELED, UNLABELED, RowKey, TwoStreamSampler
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.seeds import derive_seed

__all__ = ["SemiSupervisedLoader"]


class SemiSupervisedLoader:
    """Batches of labelled and unlabelled rows for a trainer, labelled rows first.

    Each stream repeats its items for ever: pass e over n items is a permutation drawn from (seed, stream, e), so every
    item comes once before any comes again. The random transforms of a row are seeded with (seed, stream, e, index).
    Order and augmentation therefore depend on nothing else: not on workers, ranks, restarts or the global generators.

    The stream is endless in pieces of `len(loader)` batches: each new iteration over the loader goes on where the last
    one stopped, and `set_iteration(k)` makes the next one start with batch k, as resuming does.

    Args:
        labeled: map-style dataset of items with a label, with its random transforms in `.transform`
            (MONAI's datasets; see `cached_dataset`).
        unlabeled: dataset of items that have no label key at all. None or empty for supervised training.
        labeled_batch_size: labelled rows of the whole batch, over all ranks together.
        unlabeled_batch_size: unlabelled rows of the whole batch, 0 without `unlabeled`.
        seed: of order and augmentation.
        num_workers: processes that load; 0 loads in this one.
        rank: which part of the batch is made here. Default: from `torch.distributed` where it is initialised, else 0.
        world_size: number of parts. Default as for `rank`.
        label_key: the key that only labelled items have.
        pin_memory: page-locked memory, for a faster copy to a GPU.

    Shape:
        A batch is a dict: image (B, ch, *spatial) with B = labelled + unlabelled rows, label (B_l, 1, *spatial), each
        further key that all rows have, (B, ...) or a list of B, and each that only labelled or only unlabelled rows
        have, with as many (FixMatch's `image_strong`).

    Raises:
        ValueError: if a batch size is less than 1, larger than its dataset, or not a multiple of `world_size`; if the
            labelled dataset is empty; if an unlabelled item has a label or a labelled one has none.

    Example:
        >>> labeled = [{"image": torch.rand(1, 8, 8), "label": torch.zeros(1, 8, 8)} for _ in range(4)]
        >>> unlabeled = [{"image": torch.rand(1, 8, 8)} for _ in range(6)]
        >>> loader = SemiSupervisedLoader(labeled, unlabeled, labeled_batch_size=2, unlabeled_batch_size=3)
        >>> batch = next(iter(loader))
        >>> tuple(batch["image"].shape), tuple(batch["label"].shape), len(loader)
        ((5, 1, 8, 8), (2, 1, 8, 8), 2)
    """

    def __init__(
        self,
        labeled: Dataset | Sequence,
        unlabeled: Dataset | Sequence | None,
        labeled_batch_size: int,
        unlabeled_batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        label_key: str = "label",
        pin_memory: bool = False,
    ) -> None:
        unlabeled = [] if unlabeled is None else unlabeled
        sizes, batch_sizes = (len(labeled), len(unlabeled)), (labeled_batch_size, unlabeled_batch_size)
        if sizes[LABELED] == 0:
            raise KnowSAMValueError(
                "`labeled` must have at least one item but is empty. Check the `labeled` data list."
            )
        for name, size, batch_size in zip(("labeled", "unlabeled"), sizes, batch_sizes):
            if size == 0 and batch_size != 0:
                raise KnowSAMValueError(
                    f"`{name}_batch_size` must be 0 without {name} items but is {batch_size}. "
                    f"Set it to 0 for supervised training, or give {name} items."
                )
            if size > 0 and batch_size < 1 and not (name == "unlabeled" and batch_size == 0):
                raise KnowSAMValueError(f"`{name}_batch_size` must be at least 1 but is {batch_size}.")
            if batch_size > size:
                raise KnowSAMValueError(
                    f"`{name}_batch_size` must be at most the number of {name} items, {size}, but is {batch_size}. "
                    f"Lower it, or give more {name} items."
                )
        self.datasets = (labeled, unlabeled)
        # The sampler knows nothing of this object: in a reference cycle torch's workers take seconds to stop.
        self._sampler = TwoStreamSampler(sizes, batch_sizes, seed, rank, world_size)
        self._loader = DataLoader(
            _SeededRows((labeled, unlabeled), seed, label_key),
            batch_sampler=self._sampler,
            collate_fn=_Collate(label_key),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers > 0 and _forks() else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # torch would draw the workers' seed from the global generator
        )

    def __len__(self) -> int:
        """Number of batches that show every unlabelled item once (every labelled one without unlabelled rows)."""
        return len(self._sampler)

    def set_iteration(self, iteration: int) -> None:
        """Make the next iteration over the loader start with batch number `iteration` (from 0) of the whole run."""
        if iteration < 0:
            raise KnowSAMValueError(f"`iteration` must be at least 0 but is {iteration}.")
        self._sampler.next_iteration = iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self._sampler.next_iteration += 1
            yield batch


def _forks() -> bool:
    """
    Whether workers are to be forked though the default is "forkserver", as on Linux from Python 3.14 on.

    A forked worker shares the cached items. Any other gets a copy, by way of a file descriptor for every tensor of it.
    """
    return multiprocessing.get_start_method() == "forkserver"


class _SeededRows(Dataset):
    """The rows of both streams by key, each drawn with random transforms seeded by its key."""

    def __init__(self, datasets: tuple[Any, Any], seed: int, label_key: str) -> None:
        self.datasets = datasets
        self.seed = seed
        self.label_key = label_key

    def __getitem__(self, key: RowKey) -> tuple[int, list[dict]]:
        dataset = self.datasets[key.stream]
        seed = derive_seed(self.seed, *key)
        set_rnd(getattr(dataset, "transform", dataset), seed)
        with _seeded_globals(seed):
            item = dataset[key.index]
        rows = list(item) if isinstance(item, (list, tuple)) else [item]  # a multi-sample transform gives a list
        is_labeled = key.stream == LABELED
        if any((self.label_key in row) != is_labeled for row in rows):
            if is_labeled:
                raise KnowSAMValueError(
                    f"`labeled` items must have a {self.label_key!r} key but item {key.index} has none."
                )
            raise KnowSAMValueError(
                f"`unlabeled` items must have no {self.label_key!r} key but item {key.index} has one."
            )
        return key.stream, rows


class _Collate:
    """Images and all else that every row has in one collation, so that each row keeps its metadata; labels apart."""

    def __init__(self, label_key: str) -> None:
        self.label_key = label_key

    def __call__(self, items: list[tuple[int, list[dict]]]) -> dict[str, Any]:
        labeled = [row for stream, rows in items if stream == LABELED for row in rows]
        all_rows = labeled + [row for stream, rows in items if stream == UNLABELED for row in rows]
        shared = [key for key in all_rows[0] if key != self.label_key and all(key in row for row in all_rows)]
        batch = list_data_collate([{key: row[key] for key in shared} for row in all_rows])
        for rows in (labeled, all_rows[len(labeled) :]):
            apart = [key for key in (rows[0] if rows else ()) if key not in batch and all(key in row for row in rows)]
            if apart:
                batch.update(list_data_collate([{key: row[key] for key in apart} for row in rows]))
        return batch


@contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators for transforms that draw from them, and put them back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
