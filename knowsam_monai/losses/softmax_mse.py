"""Consistency of two predictions: the squared difference of their probabilities."""

from __future__ import annotations

import torch
import torch.nn as nn

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


class SoftmaxMSELoss(nn.Module):
    """Mean squared difference of the class probabilities, over all classes of all pixels or of the pixels in a mask.

    ``L_con = sum_i m_i sum_c (p_ic - q_ic)^2 / (C sum_i m_i)`` with ``p = softmax(student)``, ``q = softmax(target)``
    and a mask m of pixels i; 0 if the mask is empty. The target gets no gradient. The original Mean Teacher code also
    divides by C; the public UA-MT code always divides by 2.

    Args:
        num_classes: C in the divisor, 2 or more; ``None``: the number of classes of the logits.

    Shape:
        - student_logits, target_logits: (B, C, *spatial); one channel is a sigmoid network, treated as two classes
        - mask: bool (B, 1, *spatial), or ``None`` for all pixels
        - output: scalar, at least float32

    Raises:
        ValueError: if ``num_classes`` is below 2, or the shapes differ.

    Example::

        >>> sure_of_0, sure_of_1 = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
        >>> SoftmaxMSELoss()(sure_of_0, sure_of_1).item()
        1.0

    Reference:
        Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780; Yu et al., UA-MT, MICCAI 2019, arXiv:1907.07034.
    """

    @check_types
    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise KnowSAMValueError(
                f"`num_classes` must be 2 or more but is {num_classes}; a student of one channel has two classes."
            )
        self.num_classes = num_classes

    def forward(
        self, student_logits: torch.Tensor, target_logits: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if student_logits.shape != target_logits.shape:
            raise KnowSAMValueError(
                f"`target_logits` must have the student's shape {tuple(student_logits.shape)} but have "
                f"{tuple(target_logits.shape)}; consistency needs two predictions of the same rows."
            )
        student_probs, target_probs = (
            class_logits(logits).softmax(dim=1) for logits in (student_logits, target_logits.detach())
        )
        squared_map = (student_probs - target_probs).square().sum(dim=1, keepdim=True)
        num_classes = student_probs.shape[1] if self.num_classes is None else self.num_classes
        if mask is None:
            return squared_map.mean() / num_classes
        return (squared_map * mask).sum() / (num_classes * mask.sum().clamp(min=1))
