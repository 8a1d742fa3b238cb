"""Autocast on the CPU, where MONAI's own ``amp`` does nothing."""

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
    Run another inferer under ``torch.autocast``, on the CPU too.

    Args:
        dtype: autocast type, such as ``torch.bfloat16``; None runs the inferer without autocast.
        inferer: the inferer to run, by default ``SimpleInferer``.

    Shape:
        Same as the inferer's; logits are returned in float32.

    Raises:
        ValueError: if the kernel of a 3D convolution with a gradient is deeper than its input, in bfloat16 on a CPU:
            torch (2.13, oneDNN) then computes a wrong gradient of its weights and writes out of bounds.

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
    """Make each 3D convolution refuse inputs of a size for which its gradient is wrong."""
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
    # determined by comparison with float32, for kernels of 3, 5 and 7 and inputs of 1 to 8 voxels
    if 1 < size[0] < kernel[0] or size[1] < kernel[1] // 2:
        raise KnowSAMValueError(
            f"`image_size` must give `{name}`, a convolution with kernel {kernel}, an input at least as deep as its "
            f"kernel but gives {size}, for which torch's bfloat16 gradient on a CPU is wrong; use larger images, or "
            "turn autocast off."
        )
