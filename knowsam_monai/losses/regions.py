"""Overlapping regions: one sigmoid channel each, so C channels are C binary problems."""

from __future__ import annotations

from collections.abc import Callable

import torch

from knowsam_monai.errors import KnowSAMValueError


def region_loss(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The mean over regions of a single-channel loss.

    ``L = 1/C sum_c loss(logits_c, target_c)``. With :class:`~knowsam_monai.losses.DistillationLoss` this is ``T^2 / C
    sum_c mean(p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c)))`` with ``p = sigmoid(teacher / T)`` and ``q =
    sigmoid(student / T)``. With :func:`~knowsam_monai.losses.dice_ce_loss` it is the mean of binary cross-entropy plus
    Dice, where Dice averages the region and its complement.

    Args:
        loss: ``f(logits, target)`` of (B, 1, *spatial) each; the mean of its result is used.
        logits: (B, C, *spatial).
        target: (B, C, *spatial), logits or a label of 0 and 1.

    Raises:
        ValueError: if the numbers of channels differ.

    Example::

        >>> from knowsam_monai.losses import DistillationLoss
        >>> teacher = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)  # probabilities 3/4 and 1/2
        >>> round(region_loss(DistillationLoss(1.0), torch.zeros(1, 2, 1, 1), teacher).item(), 4)  # half of 0.1308
        0.0654

    Reference:
        Regions in place of classes: Isensee et al., "nnU-Net for Brain Tumor Segmentation", arXiv:2011.00848.
    """
    if logits.shape[1] != target.shape[1]:
        raise KnowSAMValueError(
            f"`target` must have a channel for each of the {logits.shape[1]} regions but has {target.shape[1]}; build "
            "student, teacher and labels for the same regions."
        )
    losses = [loss(ours, theirs).mean() for ours, theirs in zip(logits.split(1, 1), target.split(1, 1))]
    return torch.stack(losses).mean()
