"""Scanner effects of the phantoms: blur, noise of magnitude images, and an oblique affine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by FFT, in 2D or 3D; `sigma` in voxels."""
    *others, last = image.shape
    axes = [np.fft.fftfreq(size) for size in others] + [np.fft.rfftfreq(last)]
    frequencies = np.meshgrid(*axes, indexing="ij", sparse=True)
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * sum(frequency**2 for frequency in frequencies))
    return np.fft.irfftn(np.fft.rfftn(image) * transfer, s=image.shape, axes=range(image.ndim))


def unit_deviation(field: np.ndarray) -> np.ndarray:
    """The field with a standard deviation of 1."""
    return field / field.std()


def magnitude(rng: np.random.Generator, image: np.ndarray, noise: float) -> np.ndarray:
    """The image with Rician noise: the magnitude of a complex signal."""
    real, imaginary = (rng.normal(0, noise, image.shape) for _ in range(2))
    return np.hypot(image + real, imaginary)


def oblique_affine(
    rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], turns: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Voxel to world (RAS, mm) of a volume rotated against the scanner's axes and centered near its origin.

    Args:
        rng: generator of the rotations and the origin.
        shape: voxels along each axis.
        spacing: mm along each axis.
        turns: range of the rotation around each axis, degrees.
    """
    angles = np.deg2rad([rng.uniform(*turn) for turn in turns])
    flips = np.diag([-1.0, -1.0, 1.0])  # scanner files use LPS coordinates
    affine = np.eye(4)
    affine[:3, :3] = turn_matrix(angles) @ flips @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-30, 30, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def turn_matrix(angles: Sequence[float]) -> np.ndarray:
    """Rotation matrix (3, 3) for rotations around the three axes, one after the other; radians."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    return turn
