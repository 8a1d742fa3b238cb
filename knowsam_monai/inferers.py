"""What MONAI's inferers lack here: autocast on the CPU, where MONAI's own ``amp`` does nothing."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn


class AutocastInferer(Inferer):
    """
    Run another inferer under ``torch.autocast``; on the CPU too, with bfloat16.

    Args:
        dtype: autocast type, such as ``torch.bfloat16``; None runs the inferer as it is.
        inferer: default ``SimpleInferer``.

    Shape:
        As the inferer's; logits come back in float32.

    Example::

        >>> AutocastInferer(torch.bfloat16)(torch.rand(1, 1, 8, 8), nn.Conv2d(1, 4, 1)).dtype
        torch.float32
    """

    def __init__(self, dtype: torch.dtype | None = torch.bfloat16, inferer: Inferer | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.inferer = SimpleInferer() if inferer is None else inferer

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is None:
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, dtype=self.dtype):
            pred = self.inferer(inputs, network, *args, **kwargs)
        return pred.float()
