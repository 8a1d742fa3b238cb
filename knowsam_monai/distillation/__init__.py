"""SAM-induced knowledge distillation (SKD): the distiller, its gate, and the ways to attach it."""

from __future__ import annotations

from knowsam_monai.distillation.attachment import Attachment
from knowsam_monai.distillation.distiller import Distillation, SAMDistiller
from knowsam_monai.distillation.gate import TeacherGate
from knowsam_monai.distillation.optimizer_hooks import FollowHandle, follow
from knowsam_monai.distillation.sam_image import check_orientations
from knowsam_monai.distillation.watched_loader import WatchedLoader

__all__ = [
    "Attachment",
    "Distillation",
    "FollowHandle",
    "SAMDistiller",
    "TeacherGate",
    "WatchedLoader",
    "check_orientations",
    "follow",
]
