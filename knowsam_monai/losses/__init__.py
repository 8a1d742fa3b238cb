"""Losses of KnowSAM and of the semi-supervised methods around it."""

from __future__ import annotations

from knowsam_monai.losses.consistency import MutualConsistencyLoss
from knowsam_monai.losses.distillation import DistillationLoss
from knowsam_monai.losses.entropy import EntropyLoss, entropy_map
from knowsam_monai.losses.pseudo_label import PseudoLabelLoss
from knowsam_monai.losses.ramp_up import SigmoidRampUp
from knowsam_monai.losses.regions import region_loss
from knowsam_monai.losses.softmax_mse import SoftmaxMSELoss
from knowsam_monai.losses.supervised import PartiallyLabeledLoss, dice_ce_loss

__all__ = [
    "DistillationLoss",
    "EntropyLoss",
    "MutualConsistencyLoss",
    "PartiallyLabeledLoss",
    "PseudoLabelLoss",
    "SigmoidRampUp",
    "SoftmaxMSELoss",
    "dice_ce_loss",
    "entropy_map",
    "region_loss",
]
