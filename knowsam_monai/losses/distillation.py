"""SAM-induced knowledge distillation: the student learns the teacher's class probabilities."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DiceLoss

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


class DistillationLoss(nn.Module):
    """Kullback-Leibler divergence of the softened student from the softened teacher.

    ``L_kd = T^2 * mean(sum_c p_c (log p_c - log q_c))`` with ``p = softmax(teacher / T)`` and ``q = softmax(student /
    T)``, averaged over all pixels and rows. The teacher gets no gradient. ``T^2`` (Hinton; the authors' code) keeps the
    scale of the gradient independent of T. At large T the loss becomes a regression on logits, ``sum_c (difference of
    centered logits)^2 / 2C``, and is unbounded. One channel (a sigmoid network) counts as two classes, so it may learn
    from a teacher with two channels. A teacher's logit of -inf is a probability of exactly 0 and contributes 0.

    Most pixels are background, so an untrained student can lose small structures to the mean over pixels. `dice_weight`
    adds a second term, ``dice_weight * (1 - Dice(q, p))`` at T = 1, in which all classes count equally: MONAI's
    `DiceLoss` for soft labels over the whole batch. It is 0 when the student agrees exactly.

    Args:
        temperature: T > 0, in the bundles and by default 2. The paper does not state it; the authors' code uses 10, at
            which a teacher with large logits dominates.
        dice_weight: weight of the Dice term; 0 (the paper) leaves it out.

    Shape:
        - student_logits, teacher_logits: (B, C, *spatial)
        - output: scalar, at least float32

    Raises:
        ValueError: if ``temperature`` is not positive, ``dice_weight`` is negative, either is infinite, or the shapes
            differ.

    Example::

        >>> loss = DistillationLoss(temperature=2.0)
        >>> loss(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)).item()  # softmax ignores a constant
        0.0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 9 and 10; Hinton et al., arXiv:1503.02531. Dice of soft labels:
        Wang et al., "Dice Semimetric Losses", MICCAI 2023.
    """

    @check_types
    def __init__(self, temperature: float = 2.0, dice_weight: float = 0.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise KnowSAMValueError(f"`temperature` must be positive but is {temperature}; the default is 2.")
        if not 0 <= dice_weight < math.inf:
            raise KnowSAMValueError(
                f"`dice_weight` must be 0 or more but is {dice_weight}; 0 leaves the Dice term out."
            )
        self.temperature = temperature
        self.dice_weight = dice_weight
        self.dice_loss = DiceLoss(softmax=True, squared_pred=True, batch=True, soft_label=True)

    def forward(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        student, teacher = class_logits(student_logits), class_logits(teacher_logits.detach())
        if student.shape != teacher.shape:
            raise KnowSAMValueError(
                f"`teacher_logits` must have the student's shape {tuple(student_logits.shape)} but have "
                f"{tuple(teacher_logits.shape)}; build teacher and student for the same classes and image size."
            )
        log_p = (teacher / self.temperature).log_softmax(dim=1)
        divergence = F.kl_div(
            input=(student / self.temperature).log_softmax(dim=1),
            target=log_p.clamp(min=torch.finfo(log_p.dtype).min),  # of a certain zero; 0 times infinity would be NaN
            reduction="sum",
            log_target=True,
        )
        num_pixels = student.numel() // student.shape[1]
        loss = self.temperature**2 * divergence / num_pixels
        if self.dice_weight > 0:
            loss = loss + self.dice_weight * self.dice_loss(student, teacher.softmax(dim=1))
        return loss
