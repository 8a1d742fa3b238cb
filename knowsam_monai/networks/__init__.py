"""Networks of KnowSAM: the student of two views, and the SAM teacher."""

from __future__ import annotations

from knowsam_monai.networks.adapter import Adapter
from knowsam_monai.networks.aggregation import HybridAggregation
from knowsam_monai.networks.embedding_cache import EmbeddingCache
from knowsam_monai.networks.intensity_window import IntensityWindow
from knowsam_monai.networks.multi_view import MultiViewNet
from knowsam_monai.networks.prompt import LearnablePrompt
from knowsam_monai.networks.sam import build_sam
from knowsam_monai.networks.sam_teacher import SAMTeacher
from knowsam_monai.networks.slice_selection import SliceSelection
from knowsam_monai.networks.slice_teacher import SliceTeacher
from knowsam_monai.networks.stacked import StackedNetworks
from knowsam_monai.networks.unet import UNet
from knowsam_monai.networks.views import unstack_views
from knowsam_monai.networks.vnet import VNet

__all__ = [
    "Adapter",
    "EmbeddingCache",
    "HybridAggregation",
    "LearnablePrompt",
    "IntensityWindow",
    "MultiViewNet",
    "SAMTeacher",
    "SliceSelection",
    "SliceTeacher",
    "StackedNetworks",
    "UNet",
    "VNet",
    "build_sam",
    "unstack_views",
]
