"""Mutual consistency: each of two networks learns from the other's prediction."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice
from knowsam_monai.tensors import class_logits


class MutualConsistencyLoss(nn.Module):
    """Cross-entropy of each network against the other's prediction, which gets no gradient.

    ``L_mut = CE(A, stopgrad(B)) + CE(B, stopgrad(A))``, averaged over all pixels and rows. The target is the other
    network's argmax (``"hard"``, as in the paper, which follows Cross Pseudo Supervision) or its probabilities
    (``"soft"``, as in the authors' code).

    Args:
        target: ``"hard"`` or ``"soft"``.

    Shape:
        - logits_a, logits_b: (B, C, *spatial); one channel is a sigmoid network, treated as two classes
        - output: scalar, at least float32

    Raises:
        ValueError: if ``target`` is unknown or the shapes differ.

    Example::

        >>> a, b = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
        >>> round(MutualConsistencyLoss()(a, b).item(), 4)  # 2 log 2
        1.3863

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 5; Chen et al., CPS, CVPR 2021, arXiv:2106.01226.
    """

    @check_types
    def __init__(self, target: str = "hard") -> None:
        super().__init__()
        check_choice("target", target, ("hard", "soft"))
        self.target = target

    def forward(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        if logits_a.shape != logits_b.shape:
            raise KnowSAMValueError(
                f"`logits_b` must have the shape of `logits_a`, {tuple(logits_a.shape)}, but has "
                f"{tuple(logits_b.shape)}; mutual consistency needs two views of the same rows."
            )
        log_a, log_b = (class_logits(logits).log_softmax(dim=1) for logits in (logits_a, logits_b))
        return self._cross_entropy(log_a, log_b.detach()) + self._cross_entropy(log_b, log_a.detach())

    def _cross_entropy(self, log_probs: torch.Tensor, target_log_probs: torch.Tensor) -> torch.Tensor:
        if self.target == "hard":
            return F.nll_loss(log_probs, target_log_probs.max(dim=1).indices)
        return -(target_log_probs.exp() * log_probs).sum(dim=1).mean()
