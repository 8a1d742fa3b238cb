"""Ignite handlers for MONAI's unmodified trainers and evaluators, one method or duty a file.

Every `start` is the first iteration with the term, counted from 1 as ``engine.state.iteration`` is; 0 and 1 both mean
from the beginning.
"""

from .bidirectional_copy_paste import BidirectionalCopyPaste
from .case_metrics import CaseMetrics
from .co_training import MultiViewCoTraining
from .fixmatch import FixMatch
from .guided_mixing import UncertaintyGuidedMixing
from .last_iteration import LastIteration
from .loss_terms import LossTerms, scalar_terms
from .mean_teacher import MeanTeacher
from .preflight import Preflight
from .resume import Resume
from .run_record import RunRecord
from .sam_distillation import SAMDistillation
from .teacher_validation import TeacherValidation
from .tracking import track_terms
from .training_progress import TrainingProgress
from .uncertainty_aware_mean_teacher import UncertaintyAwareMeanTeacher
from .validation_history import ValidationHistory
from .validation_report import ValidationReport
from .whole_checkpoint_saver import WholeCheckpointSaver

__all__ = [
    "BidirectionalCopyPaste",
    "CaseMetrics",
    "FixMatch",
    "LastIteration",
    "LossTerms",
    "MeanTeacher",
    "MultiViewCoTraining",
    "Preflight",
    "Resume",
    "RunRecord",
    "SAMDistillation",
    "TeacherValidation",
    "TrainingProgress",
    "UncertaintyAwareMeanTeacher",
    "UncertaintyGuidedMixing",
    "ValidationHistory",
    "ValidationReport",
    "WholeCheckpointSaver",
    "scalar_terms",
    "track_terms",
]
