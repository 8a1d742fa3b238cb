"""Which rows make which batch of two endless streams: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.seeds import derive_seed

__all__ = ["LABELED", "UNLABELED", "RowKey", "TwoStreamSampler", "derive_seed"]

LABELED, UNLABELED = 0, 1


class RowKey(NamedTuple):
    """One row: its stream, how often the stream has been through before, and the item's index."""

    stream: int
    epoch: int
    index: int


class TwoStreamSampler:
    """Batch sampler that goes on from `next_iteration` for `len(self)` batches, labelled rows first.

    Pass e over the n items of a stream is a permutation drawn from (seed, stream, e): every item comes once before any
    comes again. Rank r of w takes the r-th of w equal, contiguous parts of the labelled rows of a batch and of the
    unlabelled ones.

    Args:
        sizes: number of labelled and of unlabelled items.
        batch_sizes: labelled and unlabelled rows of the whole batch, over all ranks.
        seed: of the order.
        rank: part that is made here. Default: from `torch.distributed` where it is initialised by then, else 0.
        world_size: number of parts. Default as for `rank`.

    Raises:
        ValueError: if `rank` is no part of `world_size`, or a batch size is not a multiple of `world_size`.

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
        self.shard()  # what is already known to be wrong is said here

    def __len__(self) -> int:
        stream = UNLABELED if self.batch_sizes[UNLABELED] else LABELED
        return -(-self.sizes[stream] // self.batch_sizes[stream])

    def __iter__(self) -> Iterator[list[RowKey]]:
        first = self.next_iteration  # workers run ahead of it afterwards
        rank, world_size = self.shard()
        for iteration in range(first, first + len(self)):
            yield self.keys(iteration, rank, world_size)

    def shard(self) -> tuple[int, int]:
        """This process's rank and the number of ranks."""
        rank, world_size = self.rank, self.world_size
        if world_size is None:
            world_size = ranks.world_size()
        if rank is None:
            rank = ranks.rank()
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
        """The rows of one rank in batch number `iteration` of the run."""
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
            self._orders.pop((stream, epoch - 2), None)  # a batch reaches into two passes at most
            # RandomState's streams are frozen by numpy; a Generator's may change with its version.
            generator = np.random.RandomState(derive_seed(self.seed, stream, epoch))
            self._orders[stream, epoch] = generator.permutation(self.sizes[stream]).tolist()
        return self._orders[stream, epoch]
