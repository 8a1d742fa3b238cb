"""What MONAI's inferers lack here: autocast on the CPU, where MONAI's own ``amp`` does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMValueError


class AutocastInferer(Inferer):
    """
    Run another inferer under ``torch.autocast``; on the CPU too, with bfloat16.

    Args:
        dtype: autocast type, such as ``torch.bfloat16``; None runs the inferer as it is.
        inferer: default ``SimpleInferer``.

    Shape:
        As the inferer's; logits come back in float32.

    Raises:
        ValueError: when on a CPU in bfloat16 a 3D convolution with a gradient is deeper than its input: torch (2.13,
            oneDNN) then computes the gradient of its weights wrong, and writes where it must not.

    Example::

        >>> AutocastInferer(torch.bfloat16)(torch.rand(1, 1, 8, 8), nn.Conv2d(1, 4, 1)).dtype
        torch.float32
    """

    def __init__(self, dtype: torch.dtype | None = torch.bfloat16, inferer: Inferer | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.inferer = SimpleInferer() if inferer is None else inferer
        self._seen_sizes: set[torch.Size] = set()

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is None:
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, dtype=self.dtype):
            if inputs.device.type == "cpu" and torch.is_grad_enabled() and inputs.shape[1:] not in self._seen_sizes:
                with _depths_are_checked(network):
                    pred = self.inferer(inputs, network, *args, **kwargs)
                self._seen_sizes.add(inputs.shape[1:])
            else:
                pred = self.inferer(inputs, network, *args, **kwargs)
        return pred.float()


@contextmanager
def _depths_are_checked(network: nn.Module) -> Iterator[None]:
    """Let each 3D convolution refuse an input for whose size its gradient is wrong."""
    handles = [
        module.register_forward_pre_hook(partial(_check_depth, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv3d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_depth(name: str, convolution: nn.Conv3d, inputs: tuple[Tensor, ...]) -> None:
    size, kernel = tuple(inputs[0].shape[2:]), convolution.kernel_size
    # found by comparing with float32, for kernels of 3, 5 and 7 and inputs of 1 to 8 voxels
    if 1 < size[0] < kernel[0] or size[1] < kernel[1] // 2:
        raise KnowSAMValueError(
            f"`image_size` must leave `{name}`, a convolution of {kernel}, an input of its depth or more in bfloat16 "
            f"on a CPU, where torch's gradient is wrong otherwise, but leaves {size}; take larger, or no autocast."
        )
