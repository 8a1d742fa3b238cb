"""The image sizes that a network with pooling and skip connections accepts."""

from __future__ import annotations

import torch

from knowsam_monai.errors import KnowSAMValueError


def check_spatial_size(image: torch.Tensor, divisor: int) -> None:
    """Raise a clear error if an image cannot be halved evenly down to the deepest level.

    TorchScript can compile this function. Tracing skips it, since a trace fixes the sizes anyway.

    Args:
        image: (B, channels, *spatial).
        divisor: every spatial size must be a multiple of it; 2 ** (number of levels - 1).

    Raises:
        ValueError: if a spatial size is not a multiple of ``divisor``.

    Example::

        >>> check_spatial_size(torch.zeros(1, 1, 32, 48), divisor=16)
    """
    if torch.jit.is_tracing():
        return
    for size in image.shape[2:]:
        if size % divisor != 0:
            raise KnowSAMValueError(
                f"`image` must have spatial sizes that are multiples of {divisor} but has {list(image.shape[2:])}; "
                f"resize it, or pad it with monai.transforms.DivisiblePad(k={divisor})."
            )
