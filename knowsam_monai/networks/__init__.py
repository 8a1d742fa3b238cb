"""Students: U-Net, V-Net, both fused by the aggregation module, and the EMA of a student."""

from __future__ import annotations

from knowsam_monai.networks.aggregation import HybridAggregation
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.multi_view import MultiViewNet
from knowsam_monai.networks.noisy_passes import NoisyPasses
from knowsam_monai.networks.stacked import StackedNetworks
from knowsam_monai.networks.unet import UNet
from knowsam_monai.networks.vnet import VNet

__all__ = [
    "EMAStudent",
    "HybridAggregation",
    "MultiViewNet",
    "NoisyPasses",
    "StackedNetworks",
    "UNet",
    "VNet",
]
