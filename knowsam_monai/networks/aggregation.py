"""The hybrid aggregation module (HAM): it fuses two views, guided by their entropy and disagreement."""

from __future__ import annotations

import torch
import torch.nn as nn
from monai.networks.layers.factories import Conv

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.losses.entropy import entropy_map
from knowsam_monai.networks.convolution import ConvNormAct, channels_last
from knowsam_monai.tensors import class_logits

SLOPE = 0.2  # of the paper's LeakyReLU


class HybridAggregation(nn.Module):
    """Fuse the logits of two sub-networks, guided by maps of their entropy and dissimilarity.

    ``Y_f = Conv(CBL(cat{CBL(1 - H_a, 1 - H_b), CBL(1 - M), CBL(logits_a, logits_b)}))``, where ``H`` is the entropy map
    in nats (eq. 1), ``M = [Y_a > 0.5] xor [Y_b > 0.5]`` per class (eq. 2) and CBL is Conv-BatchNorm-LeakyReLU(0.2).
    Each branch is a 3x3 and a 1x1 CBL. ``M`` has no gradient; both sub-networks get theirs through the logits and the
    entropies. ``1 -`` and the raw logits follow the authors' code. Eq. 3 ends with a CBL, which would standardize the
    fused logits over the batch and shrink the negative ones; this module ends with a plain convolution instead.

    Args:
        spatial_dims: 2 or 3.
        num_classes: C, the channels of each sub-network's logits; 1 for sigmoid students, treated as two classes in
            the maps.
        dissimilarity_channels: width of the dissimilarity branch. All three widths are those of the authors' code.
        entropy_channels: width of the entropy branch.
        logits_channels: width of the logits branch.

    Shape:
        - logits_a, logits_b: (B, C, *spatial)
        - output: fused logits (B, C, *spatial)

    Raises:
        ValueError: if the shapes differ.

    Example::

        >>> fuse = HybridAggregation(spatial_dims=2, num_classes=4)
        >>> fuse(torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16, 16)).shape
        torch.Size([2, 4, 16, 16])

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 1-3.
    """

    @check_types
    def __init__(
        self,
        spatial_dims: int = 2,
        num_classes: int = 4,
        dissimilarity_channels: int = 16,
        entropy_channels: int = 16,
        logits_channels: int = 32,
    ) -> None:
        super().__init__()
        memory_format = channels_last(spatial_dims)
        width = dissimilarity_channels + entropy_channels + logits_channels
        self.entropy_branch = branch(spatial_dims, 2, entropy_channels)
        self.dissimilarity_branch = branch(spatial_dims, max(num_classes, 2), dissimilarity_channels)
        self.logits_branch = branch(spatial_dims, 2 * num_classes, logits_channels)
        self.mix = ConvNormAct(spatial_dims, width, width, kernel_size=3, negative_slope=SLOPE)
        self.head = Conv["conv", spatial_dims](width, num_classes, kernel_size=3, padding=1, bias=False)
        self.to(memory_format=memory_format)

    def forward(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        if logits_a.shape != logits_b.shape:
            raise KnowSAMValueError(
                f"`logits_b` must have the shape of `logits_a`, {logits_a.shape}, but has {logits_b.shape}; give both "
                "sub-networks the same rows and classes."
            )
        # the maps need at least float32; the convolutions run in the dtype of the logits
        certainty = 1 - torch.cat((entropy_map(logits_a), entropy_map(logits_b)), dim=1)
        agreement = binarized(logits_a) == binarized(logits_b)  # 1 - M
        features = (
            self.entropy_branch(certainty.to(logits_a.dtype)),
            self.dissimilarity_branch(agreement.to(logits_a.dtype)),
            self.logits_branch(torch.cat((logits_a, logits_b), dim=1)),
        )
        return self.head(self.mix(torch.cat(features, dim=1)))


def binarized(logits: torch.Tensor) -> torch.Tensor:
    """B(Y) of eq. 2: whether a class has a probability above 0.5. Without gradient."""
    return class_logits(logits.detach()).softmax(dim=1) > 0.5


def branch(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 CBL and a 1x1 CBL."""
    return nn.Sequential(
        ConvNormAct(spatial_dims, in_channels, out_channels, kernel_size=3, negative_slope=SLOPE),
        ConvNormAct(spatial_dims, out_channels, out_channels, kernel_size=1, negative_slope=SLOPE),
    )
