"""Learning from one's own sure predictions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


class PseudoLabelLoss(nn.Module):
    """Cross-entropy against the labels of a prediction where it is sure; unsure pixels are ignored.

    ``L = 1/N sum_i 1(max_c q_ic >= threshold) CE(p_i, argmax_c q_ic)`` with ``q = softmax(target)``, which gets no
    gradient. N counts all pixels (the paper: the term grows as the network gets sure) or the sure ones. An unsure
    pixel gives no gradient; it is not taken for background.

    Args:
        threshold: least probability of a sure pixel, 0..1; the paper has 0.95.
        average: ``"all"`` or ``"sure"``, what N counts.

    Shape:
        - student_logits, target_logits: (B, C, *spatial); one channel is taken as a sigmoid network
        - output: scalar, float32 at least; 0 where no pixel is sure

    Raises:
        ValueError: when ``threshold`` or ``average`` is none of these, or the shapes differ.

    Example::

        >>> target_logits = torch.tensor([[[9.0, 0.0], [0.0, 0.0]]])  # the second pixel is unsure
        >>> PseudoLabelLoss(average="sure")(torch.zeros(1, 2, 2), target_logits).item()  # log 2
        0.6931471824645996

    Reference:
        Sohn et al., "FixMatch", NeurIPS 2020, arXiv:2001.07685, eq. 4, each pixel an example.
    """

    def __init__(self, threshold: float = 0.95, average: str = "all") -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise KnowSAMValueError(f"`threshold` must be a probability, 0..1, but is {threshold}. The paper has 0.95.")
        if average not in ("all", "sure"):
            raise KnowSAMValueError(f'`average` must be "all" or "sure" but is {average!r}. "all" is the paper\'s.')
        self.threshold = threshold
        self.average = average

    def forward(self, student_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
        if student_logits.shape != target_logits.shape:
            raise KnowSAMValueError(
                f"`target_logits` must be of the student's shape {tuple(student_logits.shape)} but is "
                f"{tuple(target_logits.shape)}. Pseudo-labels and student must be of the same rows and geometry."
            )
        pseudo_label, sure_mask = self.pseudo_label(target_logits)
        loss_map = F.cross_entropy(class_logits(student_logits), pseudo_label, reduction="none") * sure_mask
        num_pixels = sure_mask.numel() if self.average == "all" else sure_mask.sum().clamp(min=1)
        return loss_map.sum() / num_pixels

    def pseudo_label(self, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and mask of the sure pixels, both (B, *spatial), for logits (B, C, *spatial)."""
        confidence, label = class_logits(target_logits.detach()).softmax(dim=1).max(dim=1)
        return label, confidence >= self.threshold
