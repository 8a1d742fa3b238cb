"""How an image that is not 0..1 becomes what SAM takes."""

from __future__ import annotations

import torch

from knowsam_monai.errors import KnowSAMValueError


class IntensityWindow:
    """
    Three channels of one, a range of intensities scaled to 0..1 and what lies outside cut off: ``to_rgb`` of a teacher.

    .. math:: rgb = clamp((x - low) / (high - low), 0, 1)

    Volumes normalised to zero mean and unit variance need it, -2..4 for late-enhancement MR; CT a window in HU.

    Args:
        low: intensity that becomes 0.
        high: intensity that becomes 1.
        channel: which channel of the image.

    Shape:
        - image: (B, channels, H, W)
        - output: (B, 3, H, W)

    Raises:
        ValueError: when `high` is not above `low`.

    Example::

        >>> IntensityWindow(-2, 2)(torch.tensor([[[[-3.0, 0.0, 1.0]]]]))[0, :, 0].tolist()
        [[0.0, 0.5, 0.75], [0.0, 0.5, 0.75], [0.0, 0.5, 0.75]]
    """

    def __init__(self, low: float = -2.0, high: float = 4.0, channel: int = 0) -> None:
        if not high > low:
            raise KnowSAMValueError(f"`high` must be above `low`, {low}, but is {high}.")
        self.low = low
        self.high = high
        self.channel = channel

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        window = ((image[:, self.channel, None] - self.low) / (self.high - self.low)).clamp(0, 1)
        return window.expand(-1, 3, -1, -1)
