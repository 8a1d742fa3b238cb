"""Random selection of slices of volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knowsam_monai import ranks
from knowsam_monai.losses.entropy import entropy_map
from knowsam_monai.seeds import derive_seed


class SliceSelection(NamedTuple):
    """
    The slices of each volume of a batch that one step uses.

    :meth:`take` returns thin volumes with only these k slices along `axis`.

    Example::

        >>> selection = SliceSelection(axis=2, index=torch.tensor([[0, 3], [1, 2]]))
        >>> selection.take(torch.zeros(2, 1, 8, 8, 4)).shape
        torch.Size([2, 1, 8, 8, 2])
    """

    axis: int  # spatial, 0..2
    index: Tensor  # (B, k), ascending in each row

    def take(self, tensor: Tensor, rows: slice = slice(None)) -> Tensor:
        """
        Select each row's slices from a tensor. Only these slices get a gradient.

        Args:
            tensor: (B, channels, *spatial), or only the batch rows in `rows`.
            rows: the rows of the batch in `tensor`.
        """
        shape = [1] * tensor.ndim
        shape[0], shape[self.axis + 2] = self.index[rows].shape
        return torch.take_along_dim(tensor, self.index[rows].view(shape), dim=self.axis + 2)


def draw_axis(axes: Sequence[int], seed: int, iteration: int) -> int:
    """Draw one axis for the whole batch, as a function of (seed, iteration)."""
    # the last number separates this stream from the streams of the rows
    return axes[np.random.RandomState(derive_seed(seed, iteration, 0, 1)).randint(len(axes))]


def draw_uniform(size: int, num_slices: int, num_rows: int, seed: int, iteration: int) -> Tensor:
    """
    Draw one slice from each of `num_slices` equal parts of the depth, (num_rows, num_slices), ascending.

    Args:
        size: number of slices of the volume. If it is not a multiple of `num_slices`, some parts have one slice more.
        num_rows: rows of the batch. The draw is a function of (seed, iteration, row of the batch over all ranks).
    """
    edges = np.arange(num_slices + 1) * size // num_slices
    return torch.from_numpy((edges[:-1] + _noise(num_slices, num_rows, seed, iteration) * np.diff(edges)).astype(int))


def draw_by_entropy(logits: Tensor, axis: int, num_slices: int, seed: int, iteration: int) -> Tensor:
    """
    Draw slices without replacement, in proportion to their mean entropy, (B, num_slices), ascending.

    The draw takes the largest values of log H + Gumbel noise. If the entropy is zero, all slices are equally likely.

    Args:
        logits: the student's logits (B, C, *spatial).
    """
    slice_entropy = entropy_map(logits.detach()).movedim(axis + 2, 1).flatten(2).mean(2)
    noise = _noise(slice_entropy.shape[1], len(logits), seed, iteration).clip(1e-12, 1 - 1e-12)
    gumbel = torch.from_numpy(-np.log(-np.log(noise))).to(slice_entropy, non_blocking=True)
    score = slice_entropy.clamp(min=torch.finfo(slice_entropy.dtype).tiny).log() + gumbel
    return score.topk(num_slices, dim=1).indices.sort(dim=1).values


def _noise(count: int, num_rows: int, seed: int, iteration: int) -> np.ndarray:
    """Draw numbers in 0..1, (num_rows, count), as a function of (seed, iteration, row of the batch over all ranks)."""
    first_row = ranks.rank() * num_rows
    # NumPy guarantees the streams of RandomState, but not those of Generator.
    states = (np.random.RandomState(derive_seed(seed, iteration, first_row + row)) for row in range(num_rows))
    return np.stack([state.random_sample(count) for state in states])
