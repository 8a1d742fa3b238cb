"""Cross-entropy against pseudo-labels, where the prediction behind them is confident."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


class PseudoLabelLoss(nn.Module):
    """Cross-entropy against pseudo-labels; pixels below a confidence threshold are ignored.

    ``L = 1/N sum_i 1(max_c q_ic >= threshold) CE(p_i, argmax_c q_ic)`` with ``q = softmax(target)``, which gets no
    gradient. N counts all pixels, so the term grows with the network's confidence. Ignored pixels give no gradient;
    they do not count as background.

    Args:
        threshold: minimum probability for a pixel to count, 0..1; the paper uses 0.95.

    Shape:
        - student_logits, target_logits: (B, C, *spatial); one channel is a sigmoid network, treated as two classes
        - output: scalar, at least float32; 0 if no pixel reaches the threshold

    Raises:
        ValueError: if ``threshold`` is not a probability, or the shapes differ.

    Example::

        >>> target_logits = torch.tensor([[[9.0, 0.0], [0.0, 0.0]]])  # only the first pixel is confident
        >>> PseudoLabelLoss()(torch.zeros(1, 2, 2), target_logits).item()  # log 2 / 2
        0.3465735912322998

    Reference:
        Sohn et al., "FixMatch", NeurIPS 2020, arXiv:2001.07685, eq. 4, with each pixel as an example.
    """

    @check_types
    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise KnowSAMValueError(f"`threshold` must be a probability, 0..1, but is {threshold}; published: 0.95.")
        self.threshold = threshold

    def forward(self, student_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
        if student_logits.shape != target_logits.shape:
            raise KnowSAMValueError(
                f"`target_logits` must have the student's shape {tuple(student_logits.shape)} but have "
                f"{tuple(target_logits.shape)}; predict both for the same rows and geometry."
            )
        return self.masked(student_logits, *self.pseudo_label(target_logits))

    def masked(self, student_logits: torch.Tensor, pseudo_label: torch.Tensor, sure_mask: torch.Tensor) -> torch.Tensor:
        """The loss of logits (B, C, *spatial) for what :meth:`pseudo_label` returned."""
        loss_map = F.cross_entropy(class_logits(student_logits), pseudo_label, reduction="none") * sure_mask
        return loss_map.sum() / sure_mask.numel()

    def pseudo_label(self, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pseudo-labels and the mask of confident pixels, both (B, *spatial), for logits (B, C, *spatial)."""
        confidence, label = class_logits(target_logits.detach()).softmax(dim=1).max(dim=1)
        return label, confidence >= self.threshold
