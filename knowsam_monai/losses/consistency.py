"""Mutual consistency: each of two networks learns from the other's prediction."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


class MutualConsistencyLoss(nn.Module):
    """Cross-entropy of each network against the other's prediction, which gets no gradient.

    ``L_mut = CE(A, stopgrad of B) + CE(B, stopgrad of A)``, over all classes, mean over all pixels and rows. The target
    is the other's argmax (``"hard"``: the paper, which follows Cross Pseudo Supervision) or its probabilities
    (``"soft"``: the authors' code).

    Args:
        target: ``"hard"`` or ``"soft"``.

    Shape:
        - logits_a, logits_b: (B, C, *spatial); one channel is taken as a sigmoid network
        - output: scalar, float32 at least

    Raises:
        ValueError: when ``target`` is neither, or the shapes differ.

    Example::

        >>> a, b = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
        >>> round(MutualConsistencyLoss()(a, b).item(), 4)  # 2 log 2
        1.3863

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 5; Chen et al., CPS, CVPR 2021, arXiv:2106.01226.
    """

    def __init__(self, target: str = "hard") -> None:
        super().__init__()
        if target not in ("hard", "soft"):
            raise KnowSAMValueError(f'`target` must be "hard" or "soft" but is {target!r}. "hard" is the paper\'s.')
        self.target = target

    def forward(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        if logits_a.shape != logits_b.shape:
            raise KnowSAMValueError(
                f"`logits_b` must be of the shape of `logits_a`, {tuple(logits_a.shape)}, but is "
                f"{tuple(logits_b.shape)}. Mutual consistency needs two views of the same rows."
            )
        log_a, log_b = (class_logits(logits).log_softmax(dim=1) for logits in (logits_a, logits_b))
        return self._cross_entropy(log_a, log_b.detach()) + self._cross_entropy(log_b, log_a.detach())

    def _cross_entropy(self, log_probs: torch.Tensor, target_log_probs: torch.Tensor) -> torch.Tensor:
        if self.target == "hard":
            return F.nll_loss(log_probs, target_log_probs.max(dim=1).indices)
        return -(target_log_probs.exp() * log_probs).sum(dim=1).mean()
