"""The entropy of a segmentation: as a map, and as a loss."""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import class_logits


def entropy_map(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the class probabilities at each pixel, in nats.

    ``H = -sum_c p_c log p_c`` (eq. 1) with ``p = softmax(logits)``. The authors' code uses ``log(p + 1e-6)`` to keep
    the logarithm finite; the log-softmax used here is finite and exact, and differs by at most ``C * 1e-6``.
    TorchScript can compile this function.

    Args:
        logits: (B, C, *spatial); one channel is a sigmoid network, treated as two classes.

    Returns:
        (B, 1, *spatial) in 0..log C, at least float32.

    Example::

        >>> entropy_map(torch.zeros(1, 4, 1, 1)).item()  # log 4
        1.3862943649291992

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 1.
    """
    log_probs = class_logits(logits).log_softmax(dim=1)
    return -(log_probs.exp() * log_probs).sum(dim=1, keepdim=True)


class EntropyLoss(nn.Module):
    """Mean entropy over all pixels and rows as a fraction of its maximum, summed over the sub-networks.

    ``L_ent = mean(H_a + H_b) / log C``, in 0..1 for each sub-network. The authors' code always divides by log 2.

    Shape:
        - logits: any number of tensors (B, C, *spatial), one for each sub-network
        - output: scalar

    Raises:
        ValueError: if no logits are given.

    Example::

        >>> EntropyLoss()(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)).item()
        2.0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 13.
    """

    def forward(self, *logits: torch.Tensor) -> torch.Tensor:
        if not logits:
            raise KnowSAMValueError(
                "`logits` must be one tensor or more but is empty; pass the logits of each sub-network."
            )
        return torch.stack([entropy_map(view).mean() / math.log(max(view.shape[1], 2)) for view in logits]).sum()
