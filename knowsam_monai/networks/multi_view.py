"""The KnowSAM student: two sub-networks and the fusion of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

from knowsam_monai.arguments import check_types
from knowsam_monai.networks.aggregation import HybridAggregation
from knowsam_monai.networks.unet import UNet
from knowsam_monai.networks.vnet import VNet


class MultiViewNet(nn.Module):
    """U-Net and V-Net on the same image, and the hybrid aggregation of their logits.

    In train mode the output is all views, stacked; in eval mode, as at deployment, the fused logits alone.
    :func:`knowsam_monai.tensors.unstack_views` splits the stack.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes C; 1 for a sigmoid student.
        channels: features of each level of both sub-networks, from full resolution down.
        dropout: dropout probability of each encoder level of the U-Net.
        num_convs: convolutions of each level of the V-Net.
        dissimilarity_channels: width of the aggregation's dissimilarity branch.
        entropy_channels: width of its entropy branch.
        logits_channels: width of its logits branch.

    Shape:
        - image: (B, in_channels, *spatial), every size a multiple of 2 ** (len(channels) - 1), 16 by default
        - output in train mode: (B, 3, C, *spatial), the views in the order of ``VIEWS``: fused, unet, vnet
        - output in eval mode: fused logits (B, C, *spatial)

    Raises:
        ValueError: if ``channels``, ``dropout`` and ``num_convs`` differ in length, or a spatial size is not such a
            multiple.

    Example::

        >>> network = MultiViewNet()
        >>> network.train()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 3, 4, 32, 32])
        >>> network.eval()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 4, 32, 32])

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, section III.
    """

    VIEWS = ("fused", "unet", "vnet")

    @check_types
    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 4,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        num_convs: Sequence[int] = (1, 2, 3, 3, 3),
        dissimilarity_channels: int = 16,
        entropy_channels: int = 16,
        logits_channels: int = 32,
    ) -> None:
        super().__init__()
        self.unet = UNet(spatial_dims, in_channels, out_channels, channels, dropout)
        self.vnet = VNet(spatial_dims, in_channels, out_channels, channels, num_convs)
        self.aggregation = HybridAggregation(
            spatial_dims, out_channels, dissimilarity_channels, entropy_channels, logits_channels
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        unet_logits = self.unet(image)
        vnet_logits = self.vnet(image)
        fused_logits = self.aggregation(unet_logits, vnet_logits)
        if self.training:
            return torch.stack((fused_logits, unet_logits, vnet_logits), dim=1)
        return fused_logits
