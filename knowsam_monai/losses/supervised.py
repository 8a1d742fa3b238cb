"""Supervision of the labelled rows of a batch, for each view of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from monai.losses import DiceCELoss

from knowsam_monai.losses.class_logits import at_least_float32, without_meta
from knowsam_monai.networks.views import unstack_views


def dice_ce_loss(num_classes: int = 4) -> DiceCELoss:
    """The supervised loss of KnowSAM: cross-entropy + Dice, weights 1 + 1.

    Background included, Dice over the whole batch with squared denominator.

    Args:
        num_classes: C, the channels of the logits; 1 gives the same loss for a sigmoid network.

    Example::

        >>> loss = dice_ce_loss()
        >>> loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)).ndim
        0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 4 and 12.
    """
    if num_classes == 1:
        return DiceCELoss(sigmoid=True, batch=True, squared_pred=True)
    return DiceCELoss(softmax=True, to_onehot_y=True, batch=True, squared_pred=True)


class PartiallyLabeledLoss(nn.Module):
    """A supervised loss on the labelled rows, which come first in the batch, summed over the student's views.

    ``L_sup = sum_v w_v * loss(pred_v[:B_l], label)``, in float32 at least, under autocast too.

    Args:
        loss: loss(logits (B_l, C, *spatial), label (B_l, 1, *spatial)) -> scalar; ``None`` is :func:`dice_ce_loss`, of
            softmax logits.
        view_weights: w_v of each view, in the order of the stack; ``None`` is 1 for each (eq. 12). The authors' code has
            (1, 0.5, 0.5) for fused, U-Net and V-Net.

    Shape:
        - pred: logits (B, C, *spatial), or stacked views (B, V, C, *spatial)
        - label: class indices (B_l, 1, *spatial), or whatever of (B_l, C, *spatial) ``loss`` takes, 1 <= B_l <= B
        - output: scalar

    Raises:
        ValueError: when there is no label or more labels than rows, spatial shapes differ, a label is outside the
            classes, or ``view_weights`` are not as many as the views.

    Example::

        >>> supervised_loss = PartiallyLabeledLoss()
        >>> supervised_loss(torch.zeros(4, 3, 2, 8, 8), torch.zeros(2, 1, 8, 8)).ndim
        0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 4 and 12.
    """

    def __init__(
        self,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        view_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.loss = dice_ce_loss() if loss is None else loss
        self.view_weights = None if view_weights is None else tuple(view_weights)

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        pred, label = without_meta(pred), without_meta(label)
        views = unstack_views(pred, label)
        check_label(views[0], label)
        weights = (1.0,) * len(views) if self.view_weights is None else self.view_weights
        if len(weights) != len(views):
            raise ValueError(
                f"`view_weights` must be one weight for each of the {len(views)} views but is {weights}. "
                "A plain network has one view, MultiViewNet three: fused, unet, vnet."
            )
        losses = [
            weight * self.loss(at_least_float32(view[: len(label)]), label)
            for view, weight in zip(views, weights)
            if weight
        ]
        return torch.stack(losses).sum() if losses else pred.sum() * 0.0


def check_label(logits: torch.Tensor, label: torch.Tensor) -> None:
    """Raise an error that names the fault when a label cannot belong to the first rows of the logits.

    Args:
        logits: (B, C, *spatial).
        label: (B_l, 1 or C, *spatial).
    """
    num_rows, num_classes = logits.shape[:2]
    if len(label) == 0:
        raise ValueError("`label` must have one row or more but has none. Put a labeled row into every batch.")
    if len(label) > num_rows:
        raise ValueError(
            f"`label` must have at most the {num_rows} rows of `pred` but has {len(label)}. Labeled rows come first "
            "in the batch, and each label has its image."
        )
    if label.shape[1] not in (1, num_classes) or label.shape[2:] != logits.shape[2:]:
        raise ValueError(
            f"`label` must be of shape (labeled rows, 1, {', '.join(map(str, logits.shape[2:]))}) but is "
            f"{tuple(label.shape)}. Load it with a channel dimension and resize it with its image."
        )
    # read on the CPU only: on an accelerator it would make every step wait, and the data pipeline has checked it
    if label.device.type == "cpu" and label.shape[1] == 1:
        lowest, highest = (bound.item() for bound in label.aminmax())
        if lowest < 0 or highest >= max(num_classes, 2):
            raise ValueError(
                f"`label` must be in 0..{max(num_classes, 2) - 1} for {num_classes} classes but has values from "
                f"{lowest:g} to {highest:g}. Build the network for the classes of the labels, or map the labels."
            )
