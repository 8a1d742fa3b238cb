"""Sampling of batches from two endless streams, as a function of the seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.seeds import derive_seed

LABELED, UNLABELED = 0, 1


class RowKey(NamedTuple):
    """One row: its stream, the number of earlier passes over the stream, and the item's index."""

    stream: int
    epoch: int
    index: int


class TwoStreamSampler:
    """Sample `len(self)` batches from `next_iteration` on, labeled rows first.

    Pass e over the items of a stream is a permutation drawn from (seed, stream, e). Rank r of w takes the r-th of w
    equal, contiguous parts of a batch's labeled rows, and of its unlabeled rows.

    Args:
        sizes: numbers of labeled and of unlabeled items.
        batch_sizes: numbers of labeled and of unlabeled rows in a batch, summed over all ranks.
        seed: seed of the order.
        rank: this process's part. Default: from `torch.distributed` if it is initialized by then, else 0.
        world_size: number of parts. Default: as for `rank`.

    Raises:
        ValueError: if `rank` is not below `world_size`, or if a batch size is not a multiple of `world_size`.

    Example:
        >>> sampler = TwoStreamSampler(sizes=(2, 3), batch_sizes=(1, 2))
        >>> [[key.stream for key in keys] for keys in sampler]
        [[0, 1, 1], [0, 1, 1]]
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        batch_sizes: tuple[int, int],
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.sizes = sizes
        self.batch_sizes = batch_sizes
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.next_iteration = 0
        self._orders: dict[tuple[int, int], list[int]] = {}
        self.shard()  # checks the arguments early

    def __len__(self) -> int:
        stream = UNLABELED if self.batch_sizes[UNLABELED] else LABELED
        return -(-self.sizes[stream] // self.batch_sizes[stream])

    def __iter__(self) -> Iterator[list[RowKey]]:
        first = self.next_iteration  # workers prefetch, so it changes during the loop
        rank, world_size = self.shard()
        for iteration in range(first, first + len(self)):
            yield self.keys(iteration, rank, world_size)

    def shard(self) -> tuple[int, int]:
        """Return this process's rank and the number of ranks."""
        rank = ranks.rank() if self.rank is None else self.rank
        world_size = ranks.world_size() if self.world_size is None else self.world_size
        if not 0 <= rank < world_size:
            raise KnowSAMValueError(f"`rank` must be from 0 to {world_size - 1} but is {rank}.")
        for name, batch_size in zip(("labeled", "unlabeled"), self.batch_sizes):
            if batch_size % world_size:
                raise KnowSAMValueError(
                    f"`{name}_batch_size` must be a multiple of the {world_size} processes that share it "
                    f"but is {batch_size}."
                )
        return rank, world_size

    def keys(self, iteration: int, rank: int, world_size: int) -> list[RowKey]:
        """Return the rows of one rank in batch number `iteration` of the run."""
        keys = []
        for stream, (size, batch_size) in enumerate(zip(self.sizes, self.batch_sizes)):
            part = batch_size // world_size
            first = iteration * batch_size + rank * part
            for position in range(first, first + part):
                epoch, offset = divmod(position, size)
                keys.append(RowKey(stream, epoch, self._order(stream, epoch)[offset]))
        return keys

    def _order(self, stream: int, epoch: int) -> list[int]:
        if (stream, epoch) not in self._orders:
            self._orders.pop((stream, epoch - 2), None)  # a batch spans two passes at most
            # NumPy guarantees the streams of RandomState, but not those of Generator.
            generator = np.random.RandomState(derive_seed(self.seed, stream, epoch))
            self._orders[stream, epoch] = generator.permutation(self.sizes[stream]).tolist()
        return self._orders[stream, epoch]
