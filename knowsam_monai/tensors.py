"""What everything here knows of tensors: views of a student, class logits, plain tensors, and modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from monai.data import MetaTensor
from torch import nn

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError


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


def unstack_views(pred: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a prediction into the logits of its views; a plain network's logits are its only view.

    In train mode a multi-view student stacks its views at dimension 1, as MONAI's ``DynUNet`` does with its deep
    supervision heads: ``pred`` then has one dimension more than the image. Each view returned shares memory with
    ``pred``.

    Args:
        pred: logits (B, C, *spatial), or stacked views (B, V, C, *spatial).
        reference: the image (B, channels, *spatial) or the label (B_l, 1, *spatial) that belongs to ``pred``; only its
            number of dimensions counts.

    Returns:
        One tensor (B, C, *spatial) for each view, the view of the deployed student first.

    Raises:
        TypeError: when ``pred`` is not one tensor.
        ValueError: when ``pred`` has neither as many dimensions as ``reference`` nor one more.

    Example::

        >>> fused, unet, vnet = unstack_views(torch.zeros(2, 3, 4, 32, 32), torch.zeros(2, 1, 32, 32))
        >>> tuple(fused.shape)
        (2, 4, 32, 32)
    """
    if not isinstance(pred, torch.Tensor):
        raise KnowSAMTypeError(
            f"`pred` must be logits or stacked views, one tensor, but is a {type(pred).__name__}; wrap the network in "
            "one that returns its logits in train mode, or name them where there is a `logits_of`."
        )
    if pred.ndim == reference.ndim:
        return (pred,)
    if pred.ndim == reference.ndim + 1:
        return tuple(pred.unbind(1))
    raise KnowSAMValueError(
        f"`pred` must be logits (B, C, *spatial) or stacked views (B, V, C, *spatial) but is of shape "
        f"{tuple(pred.shape)} beside a reference of shape {tuple(reference.shape)}. Give image and label a channel "
        "dimension, and return one tensor from the network."
    )


@contextmanager
def all_in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode for a while; what the host keeps in eval mode (frozen normalisation) stays in it afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
