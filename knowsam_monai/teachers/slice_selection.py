"""Slices of volumes: which ones, and a tensor of volumes cut down to them."""

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
    The slices of each volume of a batch that a step is about.

    :meth:`take` cuts volumes down to them: what comes out is a thin volume, whose `axis` has k instead of all slices.

    Example::

        >>> selection = SliceSelection(axis=2, index=torch.tensor([[0, 3], [1, 2]]))
        >>> selection.take(torch.zeros(2, 1, 8, 8, 4)).shape
        torch.Size([2, 1, 8, 8, 2])
    """

    axis: int  # spatial, 0..2
    index: Tensor  # (B, k), ascending in each row

    def take(self, tensor: Tensor, rows: slice = slice(None)) -> Tensor:
        """
        These slices of a tensor, each row its own; the gradient passes to them alone.

        Args:
            tensor: (B, channels, *spatial), or of those rows of the batch that `rows` names.
            rows: the rows of the batch that `tensor` holds.
        """
        shape = [1] * tensor.ndim
        shape[0], shape[self.axis + 2] = self.index[rows].shape
        return torch.take_along_dim(tensor, self.index[rows].view(shape), dim=self.axis + 2)


def draw_axis(axes: Sequence[int], seed: int, iteration: int) -> int:
    """One of several axes for the whole batch, a function of (seed, iteration)."""
    # the last number: another stream than the slices of any row
    return axes[np.random.RandomState(derive_seed(seed, iteration, 0, 1)).randint(len(axes))]


def draw_uniform(size: int, num_slices: int, num_rows: int, seed: int, iteration: int) -> Tensor:
    """
    One slice of each of `num_slices` equal parts of the depth, (num_rows, num_slices), ascending.

    Args:
        size: slices of the volume. Where it is no multiple of `num_slices`, some parts have one slice more.
        num_rows: rows of the batch; the draw is a function of (seed, iteration, row of the batch over all ranks).
    """
    edges = np.arange(num_slices + 1) * size // num_slices
    return torch.from_numpy((edges[:-1] + _noise(num_slices, num_rows, seed, iteration) * np.diff(edges)).astype(int))


def draw_by_entropy(logits: Tensor, axis: int, num_slices: int, seed: int, iteration: int) -> Tensor:
    """
    Slices without repetition, each draw in proportion to the slice's mean entropy, (B, num_slices), ascending.

    The largest of log H + Gumbel noise are such a draw. Where all is sure, every slice is as likely as the next.

    Args:
        logits: (B, C, *spatial) of the student.
    """
    slice_entropy = entropy_map(logits.detach()).movedim(axis + 2, 1).flatten(2).mean(2)
    noise = _noise(slice_entropy.shape[1], len(logits), seed, iteration).clip(1e-12, 1 - 1e-12)
    gumbel = torch.from_numpy(-np.log(-np.log(noise))).to(slice_entropy)
    score = slice_entropy.clamp(min=torch.finfo(slice_entropy.dtype).tiny).log() + gumbel
    return score.topk(num_slices, dim=1).indices.sort(dim=1).values


def _noise(count: int, num_rows: int, seed: int, iteration: int) -> np.ndarray:
    """Numbers in 0..1, (num_rows, count), a function of (seed, iteration, row of the whole batch over all ranks)."""
    first_row = ranks.rank() * num_rows
    # RandomState's streams are frozen by numpy; a Generator's may change with its version.
    states = (np.random.RandomState(derive_seed(seed, iteration, first_row + row)) for row in range(num_rows))
    return np.stack([state.random_sample(count) for state in states])
