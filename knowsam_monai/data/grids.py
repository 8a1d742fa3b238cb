"""Whether images have their voxels at the same places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from knowsam_monai.errors import KnowSAMValueError


def is_same_grid(affine: Any, other: Any, shape: Sequence[int]) -> bool:
    """Whether two affines put the voxels of an image at the same places, within half a voxel along each axis.

    Headers hold rounded numbers, so two files of one grid seldom have equal affines.

    Args:
        affine: (n + 1, n + 1), invertible, from voxel indices to mm.
        other: of the same shape, otherwise the grids differ.
        shape: number of voxels along each axis.

    Example:
        >>> is_same_grid(np.eye(4), np.diag([1, 1, 1.001, 1]), (8, 8, 8))
        True
        >>> is_same_grid(np.eye(4), np.diag([1, 1, 1.1, 1]), (8, 8, 8))
        False
    """
    affine, other = np.asarray(affine, dtype=float), np.asarray(other, dtype=float)
    if affine.shape != other.shape:
        return False
    corners = np.zeros((2 ** len(shape), len(affine)))
    corners[:, : len(shape)] = list(product(*((0, size - 1) for size in shape)))
    corners[:, -1] = 1
    moved = corners @ np.linalg.solve(affine, other).T  # indices in the first grid
    return bool(np.abs(moved - corners).max() < 0.5)


def check_one_grid(files: Mapping[str, tuple[Sequence[int], Any]]) -> None:
    """Refuse files that cannot be the channels of one image.

    Args:
        files: path -> number of voxels along each spatial axis, and affine.

    Raises:
        ValueError: if two of them have different grids.

    Example:
        >>> check_one_grid({"t1.nii": ((8, 8, 8), np.eye(4)), "t2.nii": ((8, 8, 8), np.eye(4))})
    """
    (first, (shape, affine)), *others = files.items()
    for name, (other_shape, other_affine) in others:
        if tuple(other_shape) != tuple(shape) or not is_same_grid(affine, other_affine, shape):
            raise KnowSAMValueError(
                f"{name} has another shape, orientation or position than {first}; resample one to the other's "
                "grid, or correct the list (they may be of two patients)."
            )
