"""Scaling of a window of intensities to SAM's range, 0..1."""

from __future__ import annotations

import torch

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError


def is_sam_range(image: torch.Tensor) -> bool:
    """
    Whether intensities are in 0..1, apart from what augmentation adds. It waits for the device.

    Example::

        >>> is_sam_range(torch.linspace(-0.1, 1.2, 100)), is_sam_range(torch.linspace(-1, 1, 100))
        (True, False)
    """
    outside = ((image < -0.5) | (image > 1.5)).float().mean()
    return bool((outside < 0.01) & (image.min() >= -1) & (image.max() <= 2))


class IntensityWindow:
    """
    Scale a window of intensities to 0..1, clamp the rest, and repeat the channel three times: a ``to_rgb`` for
    teachers.

    .. math:: rgb = clamp((x - low) / (high - low), 0, 1)

    Use -2..4 for late-enhancement MR that was normalized to zero mean and unit variance, and a window in HU for CT.

    Args:
        low: intensity that becomes 0.
        high: intensity that becomes 1.
        channel: index of the image channel.

    Shape:
        - image: (B, channels, H, W)
        - output: (B, 3, H, W)

    Raises:
        ValueError: if `high` is not above `low`, or an image has no such `channel`.

    Example::

        >>> IntensityWindow(-2, 2)(torch.tensor([[[[-3.0, 0.0, 1.0]]]]))[0, :, 0].tolist()
        [[0.0, 0.5, 0.75], [0.0, 0.5, 0.75], [0.0, 0.5, 0.75]]
    """

    @check_types
    def __init__(self, low: float = -2.0, high: float = 4.0, channel: int = 0) -> None:
        if not high > low:
            raise KnowSAMValueError(f"`high` must be above `low`, {low}, but is {high}.")
        self.low = low
        self.high = high
        self.channel = channel

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if not -image.shape[1] <= self.channel < image.shape[1]:
            raise KnowSAMValueError(
                f"`channel` must be below {image.shape[1]}, the channels of the image, but is {self.channel}."
            )
        window = ((image[:, self.channel, None] - self.low) / (self.high - self.low)).clamp(0, 1)
        return window.expand(-1, 3, -1, -1)
