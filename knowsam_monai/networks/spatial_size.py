"""The sizes that a network with pooling and skip connections takes."""

from __future__ import annotations

import torch

from knowsam_monai.errors import KnowSAMValueError


def check_spatial_size(image: torch.Tensor, divisor: int) -> None:
    """Raise an error that names size and remedy when an image does not halve evenly down to the deepest level.

    TorchScript compiles it; a trace, which fixes the sizes anyway, leaves it out.

    Args:
        image: (B, channels, *spatial).
        divisor: what each spatial size must be a multiple of, 2 ** (number of levels - 1).

    Raises:
        ValueError: when a spatial size is no positive multiple of ``divisor``.

    Example::

        >>> check_spatial_size(torch.zeros(1, 1, 32, 48), divisor=16)
    """
    if torch.jit.is_tracing():
        return
    for size in image.shape[2:]:
        if size % divisor != 0:
            raise KnowSAMValueError(
                f"`image` must have spatial sizes that are multiples of {divisor} but has {list(image.shape[2:])}. "
                f"Resize it, or pad it with monai.transforms.DivisiblePad(k={divisor})."
            )
