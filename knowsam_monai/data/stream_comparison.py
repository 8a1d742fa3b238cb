"""Do labeled and unlabeled images look alike to a network? Their intensities and voxels, side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knowsam_monai.data.transforms import known_spacing
from knowsam_monai.tensors import without_meta

logger = logging.getLogger(__name__)

SPACING_RATIO = 1.25  # of the voxels along an axis, from which on streams differ
CONTRAST_RATIO = 3.0  # of the standard deviations; crops of one stream differ by less


class StreamStatistics(NamedTuple):
    """Mean and standard deviation of the intensities of some images, and the mean size of their voxels.

    Args:
        mean: of all images and channels.
        deviation: their standard deviation.
        spacing: along each spatial axis; empty where images do not know it.

    Example::

        >>> str(StreamStatistics(0.5, 0.25, (1.0, 2.0)))
        'mean 0.5, standard deviation 0.25, voxels 1 x 2 mm'
    """

    mean: float
    deviation: float
    spacing: tuple[float, ...] = ()

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> StreamStatistics:
        """
        Args:
            images: (channels, *spatial) each; a MetaTensor knows its spacing.
        """
        values = torch.cat([without_meta(image).double().flatten() for image in images])
        spacings = [spacing for spacing in map(known_spacing, images) if spacing is not None]
        spacing = torch.stack(spacings).double().mean(0).tolist() if spacings else ()
        return cls(float(values.mean()), float(values.std()), tuple(spacing))

    def __str__(self) -> str:
        voxels = f", voxels {' x '.join(f'{size:.3g}' for size in self.spacing)} mm" if self.spacing else ""
        return f"mean {self.mean:.3g}, standard deviation {self.deviation:.3g}{voxels}"


def compare_streams(labeled: Sequence[Tensor], unlabeled: Sequence[Tensor]) -> list[str]:
    """
    Log the statistics of both streams, and warn where they differ.

    Args:
        labeled: a few images, (channels, *spatial) each, as the network gets them.
        unlabeled: the same of the other stream.

    Returns:
        What differs: the mean by more than a standard deviation, the standard deviation by more than a factor of 3, the
        voxels by more than a factor of 1.25 along an axis.

    Example::

        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.rand((2, 1, 8, 8), generator=generator)
        >>> compare_streams(images, images), compare_streams(images, 100 * images)
        ([], ['mean', 'standard deviation'])
    """
    ours, theirs = StreamStatistics.of(labeled), StreamStatistics.of(unlabeled)
    logger.info("Labeled images: %s. Unlabeled images: %s.", ours, theirs)
    different = []
    if abs(ours.mean - theirs.mean) > max(ours.deviation, theirs.deviation):
        different.append("mean")
    if _ratio(ours.deviation, theirs.deviation) > CONTRAST_RATIO:
        different.append("standard deviation")
    if any(_ratio(*sizes) > SPACING_RATIO for sizes in zip(ours.spacing, theirs.spacing)):
        different.append("voxel size")
    if different:
        logger.warning(
            "Labeled and unlabeled images differ in %s, so what the student learns from one may not help with the "
            "other: labeled %s; unlabeled %s. Use scans of the same kind, and the same transforms for both.",
            ", ".join(different),
            ours,
            theirs,
        )
    return different


def _ratio(first: float, second: float) -> float:
    low, high = sorted((abs(first), abs(second)))
    return high / low if low > 0 else 1.0 if high == 0 else float("inf")
