"""The two-stream loader for semi-supervised training: labeled rows first, all randomness from the seed."""

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
from knowsam_monai.data.transforms import image_name, rows_of
from knowsam_monai.errors import KnowSAMError, KnowSAMValueError
from knowsam_monai.seeds import derive_seed


class SemiSupervisedLoader:
    """Batches of labeled and unlabeled rows for a trainer, labeled rows first.

    Each stream repeats its items endlessly: pass e over n items is a permutation drawn from (seed, stream, e). The
    random transforms of a row are seeded with (seed, stream, e, index). Order and augmentation therefore do not depend
    on workers, ranks, restarts or the global generators.

    An iteration over the loader yields `len(loader)` batches and continues where the last one stopped. After
    `set_iteration(k)` the next iteration starts with batch k, as for resuming.

    Args:
        labeled: map-style dataset of items with a label, with its random transforms in `.transform`, as MONAI's
            datasets have them; see `cached_dataset`.
        unlabeled: dataset of items without a label key. None or empty for supervised training.
        labeled_batch_size: number of labeled rows in a batch, summed over all ranks.
        unlabeled_batch_size: number of unlabeled rows in a batch, summed over all ranks; 0 without `unlabeled`.
        seed: seed of order and augmentation.
        num_workers: number of loading processes; 0 loads in the main process.
        rank: this process's part of each batch. Default: from `torch.distributed` if it is initialized, else 0.
        world_size: number of parts. Default: as for `rank`.
        label_key: the key that only labeled items have.
        pin_memory: whether to use page-locked memory, which speeds up the copy to a GPU.

    Shape:
        A batch is a dict with image (B, ch, *spatial) for B labeled and unlabeled rows, and label (B_l, 1, *spatial).
        Other keys of all rows are (B, ...) or lists of length B. Keys that only labeled or only unlabeled rows have
        (FixMatch's `image_strong`) contain just these rows.

    Raises:
        ValueError: if a batch size is less than 1, larger than its dataset, or not a multiple of `world_size`; if the
            labeled dataset is empty; if an unlabeled item has a label or a labeled one has none; if the rows of a batch
            differ in shape.

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
                "`labeled` must have at least one item but is empty; check the `labeled` data list."
            )
        for name, size, batch_size in zip(("labeled", "unlabeled"), sizes, batch_sizes):
            if size == 0 and batch_size != 0:
                raise KnowSAMValueError(
                    f"`{name}_batch_size` must be 0 without {name} items but is {batch_size}; add {name} items, or set "
                    "it to 0 for supervised training (in a bundle: --unlabeled_batch_size 0 --mixing_weight 0 "
                    "--distillation_gate none, with the method knowsam or supervised)."
                )
            if size > 0 and batch_size < 1 and not (name == "unlabeled" and batch_size == 0):
                raise KnowSAMValueError(f"`{name}_batch_size` must be at least 1 but is {batch_size}.")
            if batch_size > size:
                raise KnowSAMValueError(
                    f"`{name}_batch_size` must be at most the number of {name} items, {size}, but is {batch_size}; "
                    f"lower it, or add {name} items."
                )
        self.datasets = (labeled, unlabeled)
        # No reference from the sampler to this object: with a reference cycle torch's workers take seconds to stop.
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
        """Number of batches in one pass over the unlabeled items, or over the labeled ones if there are no others."""
        return len(self._sampler)

    def set_iteration(self, iteration: int) -> None:
        """Start the next iteration over the loader with batch number `iteration` of the run, counted from 0."""
        if iteration < 0:
            raise KnowSAMValueError(f"`iteration` must be at least 0 but is {iteration}.")
        self._sampler.next_iteration = iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            if isinstance(batch, KnowSAMError):
                raise batch
            self._sampler.next_iteration += 1
            yield batch


def _forks() -> bool:
    """
    Whether workers are to be forked though the default is "forkserver", as on Linux from Python 3.14 on.

    A forked worker shares the cached items. Any other gets a copy, by way of a file descriptor for every tensor of it.
    """
    return multiprocessing.get_start_method() == "forkserver"


class _SeededRows(Dataset):
    """The rows of both streams by key; the key seeds a row's random transforms."""

    def __init__(self, datasets: tuple[Any, Any], seed: int, label_key: str) -> None:
        self.datasets = datasets
        self.seed = seed
        self.label_key = label_key

    def __getitem__(self, key: RowKey) -> tuple[int, list[dict]]:
        dataset = self.datasets[key.stream]
        seed = derive_seed(self.seed, *key)
        set_rnd(getattr(dataset, "transform", dataset), seed)
        with _seeded_globals(seed):
            rows = rows_of(dataset[key.index])
        is_labeled = key.stream == LABELED
        if any((self.label_key in row) != is_labeled for row in rows):
            if is_labeled:
                raise KnowSAMValueError(
                    f"`labeled` items must have a {self.label_key!r} key but item {key.index} has none; add its label."
                )
            raise KnowSAMValueError(
                f"`unlabeled` items must have no {self.label_key!r} key but item {key.index} has one; remove it."
            )
        return key.stream, rows


class _Collate:
    """Collate keys that all rows share, such as images, for the whole batch, and other keys for their stream only."""

    def __init__(self, label_key: str) -> None:
        self.label_key = label_key

    def __call__(self, items: list[tuple[int, list[dict]]]) -> dict[str, Any] | KnowSAMError:
        """A batch, or the error to raise: torch would add the traceback of a worker to its message."""
        try:
            return self._batch(items)
        except RuntimeError:
            rows = [row for _, rows in items for row in rows]
            unequal = next(filter(None, (_unequal_shapes(key, rows) for key in rows[0])), None)
            if unequal is None:
                raise
            return unequal

    def _batch(self, items: list[tuple[int, list[dict]]]) -> dict[str, Any]:
        labeled = [row for stream, rows in items if stream == LABELED for row in rows]
        all_rows = labeled + [row for stream, rows in items if stream == UNLABELED for row in rows]
        shared = [key for key in all_rows[0] if key != self.label_key and all(key in row for row in all_rows)]
        batch = list_data_collate([{key: row[key] for key in shared} for row in all_rows])
        for rows in (labeled, all_rows[len(labeled) :]):
            own = [key for key in (rows[0] if rows else ()) if key not in batch and all(key in row for row in rows)]
            if own:
                batch.update(list_data_collate([{key: row[key] for key in own} for row in rows]))
        return batch


def _unequal_shapes(key: str, rows: Sequence[dict]) -> KnowSAMValueError | None:
    values = [row[key] for row in rows if isinstance(row.get(key), torch.Tensor)]
    files = {tuple(value.shape): image_name(value) for value in values}
    if len(files) < 2:
        return None
    one, other, *_ = (f"{shape} in {file}" for shape, file in files.items())
    return KnowSAMValueError(
        f"`{key}` must have one shape in all rows of a batch but has {one} and {other}; end the training transforms "
        "with a crop (RandSpatialCropd) or a resize (Resized) to a fixed size."
    )


@contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Temporarily seed the global generators, for transforms that use them."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed CUDA
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
