"""The border of every loss: what networks return, as plain class logits that are precise enough."""

from __future__ import annotations

import torch
from monai.data import MetaTensor


def class_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of at least two classes, in float32 at least, without metadata.

    One channel is a sigmoid network: its softmax form has the logits ``(0, z)``. The gradient passes through.
    TorchScript compiles it.

    Args:
        logits: (B, C, *spatial), any floating dtype and memory format.

    Returns:
        (B, max(C, 2), *spatial), float64 when ``logits`` is, else float32.

    Example::

        >>> class_logits(torch.tensor([[1.5]])).tolist()
        [[0.0, 1.5]]
    """
    logits = at_least_float32(logits)
    if logits.shape[1] == 1:
        logits = torch.cat((torch.zeros_like(logits), logits), dim=1)
    return logits


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor in float64 when it is float64, else in float32, which autocast leaves as it is."""
    tensor = without_meta(tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor: a MetaTensor runs Python code at every operation, which training has no use for."""
    if not torch.jit.is_scripting():
        tensor = _as_tensor(tensor)
    return tensor


@torch.jit.unused
def _as_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
