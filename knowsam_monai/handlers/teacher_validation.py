"""Validation of the teacher beside the student, for the "validation" gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

from knowsam_monai.arguments import check_types
from knowsam_monai.data.orientation import SAM_IMAGE
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.sam_image import sam_image_for
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.handlers.supervision import logits_from
from knowsam_monai.tensors import without_meta

TEACHER_PRED = "teacher_pred"


class TeacherValidation:
    """
    Segment the validation images with the teacher too, prompted by the student, and set the "validation" gate.

    The evaluator's inferer passes slices or windows to the teacher as it does to the student. If a batch has a
    `"sam_image"`, the teacher sees that. The handler writes the teacher's logits into
    ``engine.state.output["teacher_pred"]``: add this key beside ``pred`` to the postprocessing, and to a metric. For
    overlapping regions both metrics need ``include_background=True``, since channel 0 is a region too.

    Args:
        distiller: has the teacher and the gate.
        student_metric: name of the evaluator's metric for the student's mean Dice.
        teacher_metric: name of the metric for the teacher's mean Dice.
        logits_of: picks the logits from the network's output, as in
            :class:`~knowsam_monai.handlers.SAMDistillation`; None: the output is the logits.

    Raises:
        ValueError: after the validation, if the evaluator lacks one of these metrics.

    Example::

        def dice(key):
            return MeanDice(include_background=False, output_transform=from_engine([key, "label"]))

        SupervisedEvaluator(
            ...,
            key_val_metric={"val_mean_dice": dice("pred")},
            additional_metrics={"val_teacher_dice": dice("teacher_pred")},
            val_handlers=[TeacherValidation(distiller)],
        )
    """

    @check_types
    def __init__(
        self,
        distiller: SAMDistiller,
        student_metric: str = "val_mean_dice",
        teacher_metric: str = "val_teacher_dice",
        logits_of: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        self.distiller = distiller
        self.student_metric = student_metric
        self.teacher_metric = teacher_metric
        self.logits_of = logits_of

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI evaluator."""
        engine.add_event_handler(Events.STARTED, lambda e: self.distiller.move(e.state.device))
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        pred, batch = logits_from(engine.state.output[Keys.PRED], self.logits_of), engine.state.batch
        sam_image = batch.get(SAM_IMAGE) if isinstance(batch, Mapping) else None
        image = sam_image_for(engine.state.output[Keys.IMAGE], sam_image)
        channels = image.shape[1]

        def teacher(x: torch.Tensor) -> torch.Tensor:
            x = without_meta(x)
            return self.distiller.ask_teacher(x[:, :channels], x[:, channels:])

        engine.state.output[TEACHER_PRED] = engine.inferer(torch.cat([image, pred], dim=1), teacher)

    def completed(self, engine: Engine) -> None:
        """Update the gate with both Dice values."""
        metrics = engine.state.metrics
        missing = [name for name in (self.student_metric, self.teacher_metric) if name not in metrics]
        if missing:
            raise KnowSAMValueError(
                f"`student_metric` and `teacher_metric` must be metrics of the evaluator but {missing[0]!r} is not one "
                f"of {', '.join(metrics)}; add a MeanDice with that name."
            )
        if self.distiller.gate.mode == "validation":
            self.distiller.gate.update(metrics[self.student_metric], metrics[self.teacher_metric])
