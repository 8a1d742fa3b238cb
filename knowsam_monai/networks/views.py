"""The one place that knows how a multi-view student stacks its views."""

from __future__ import annotations

import torch


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
        raise TypeError(
            f"`pred` must be logits or stacked views, one tensor, but is a {type(pred).__name__}; wrap the network in "
            "one that returns its logits in train mode, or name them where there is a `logits_of`."
        )
    if pred.ndim == reference.ndim:
        return (pred,)
    if pred.ndim == reference.ndim + 1:
        return tuple(pred.unbind(1))
    raise ValueError(
        f"`pred` must be logits (B, C, *spatial) or stacked views (B, V, C, *spatial) but is of shape "
        f"{tuple(pred.shape)} beside a reference of shape {tuple(reference.shape)}. Give image and label a channel "
        "dimension, and return one tensor from the network."
    )
