"""Semi-supervised methods as Ignite handlers on MONAI's unmodified trainers, one method a file."""

from __future__ import annotations

from knowsam_monai.handlers.bidirectional_copy_paste import BidirectionalCopyPaste
from knowsam_monai.handlers.co_training import MultiViewCoTraining
from knowsam_monai.handlers.fixmatch import FixMatch
from knowsam_monai.handlers.gradient_clipping import GradientClipping
from knowsam_monai.handlers.guided_mixing import UncertaintyGuidedMixing
from knowsam_monai.handlers.loss_terms import LossTerms, scalar_terms
from knowsam_monai.handlers.mean_teacher import MeanTeacher
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.handlers.teacher_validation import TeacherValidation
from knowsam_monai.handlers.uncertainty_aware_mean_teacher import UncertaintyAwareMeanTeacher

__all__ = [
    "BidirectionalCopyPaste",
    "FixMatch",
    "GradientClipping",
    "LossTerms",
    "MeanTeacher",
    "MultiViewCoTraining",
    "SAMDistillation",
    "TeacherValidation",
    "UncertaintyAwareMeanTeacher",
    "UncertaintyGuidedMixing",
    "scalar_terms",
]
