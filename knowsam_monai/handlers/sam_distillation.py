from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.metrics import DiceHelper
from monai.utils import CommonKeys as Keys
from torch import Tensor

from knowsam_monai.data.orientation import SAM_IMAGE
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.labeled_rows import Rows, labeled_slice
from knowsam_monai.distillation.sam_image import check_orientations, is_cached, sam_image_for
from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.handlers.supervision import check_supervision
from knowsam_monai.tensors import all_in_eval_mode, unstack_views, without_meta


class SAMDistillation:
    """
    Attach SAM-induced knowledge distillation to a MONAI trainer: ``loss + L_kd + L_sam``, nothing else changes.

    Put it into the ``train_handlers`` of any ``SupervisedTrainer`` whose ``pred`` are logits, or have them as a part
    (`logits_of`). The teacher's optimizer follows the trainer's, under AMP and gradient accumulation too. Every step
    writes `distillation_loss`, `sam_loss` (of a teacher that learns) and `gate_weight` (detached) and `teacher_logits`
    into ``engine.state.output``, and every `log_interval` steps `teacher_labeled_dice` and `student_labeled_dice`:
    foreground Dice on the labeled rows, which the teacher learns from and which therefore does not judge it.

    A teacher that draws slices of volumes (:class:`knowsam_monai.teachers.SliceTeacher`) draws by the iteration. Terms
    and Dice are then those of the slices, and there are no `teacher_logits`, which are of whole images or none.

    A batch with a `"sam_image"` (:class:`knowsam_monai.data.RandOrientationd`) has that shown to the teacher: the image
    before its intensities were augmented. A teacher whose encoder is "cached" needs it, and the pipeline is checked
    when the run starts. A handler that replaces the image must replace or remove `"sam_image"` too.

    Args:
        distiller: the core, with teacher, optimizer and gate.
        weight: factor of the distillation loss, a number or a function of ``engine.state.iteration``.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. The teacher
            learns from the beginning, whatever it is.
        labeled_rows: rows whose labels SAM learns from: an int n (the first n), a slice, a callable of the batch that
            returns one of these, or "all" labels there are. None: the first ``len(label)``, which must not be all
            rows where the SAM loss has no `ignore_index`.
        every: the teacher runs at every k-th iteration only, the k-th, the 2k-th and so on. At all others it does
            no work and neither learns nor teaches. `weight` is not scaled: on average a k-th of it is left, and k times
            the weight makes up for that.
        gate_interval: runs of the teacher between two measurements of the "agreement" gate.
        log_interval: iterations between two logs of the labeled Dice.
        logits_of: picks the logits, (B, C, *spatial) or stacked views, from what the network returns, as
            ``operator.itemgetter(0)`` from a tuple; None: they are all of it. The trainer's loss sees all.

    Raises:
        ValueError: when an interval is below 1; at a step when the teacher needs a `"sam_image"` that is not there or
            does not fit, when classes and rows of student, teacher and labels do not agree, or when every row has a
            label and nobody says that all are labeled; at the start when both optimizers step the same parameters.
        RuntimeError: at a step when the distiller is attached to a student besides.

    Example::

        SupervisedTrainer(..., train_handlers=[MyMethod(), SAMDistillation(SAMDistiller(teacher, optimizer))])

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 8 to 10.
    """

    def __init__(
        self,
        distiller: SAMDistiller,
        weight: float | Callable[[int], float] = 1.0,
        start: int = 0,
        labeled_rows: Rows | Callable[[Any], Rows] = None,
        gate_interval: int = 50,
        log_interval: int = 50,
        every: int = 1,
        logits_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if every < 1:
            raise KnowSAMValueError(f"`every` must be at least 1 iteration but is {every}; remove SKD to never run it.")
        if gate_interval < 1 or log_interval < 1:
            raise KnowSAMValueError("`gate_interval` and `log_interval` must be at least 1 iteration.")
        self.distiller = distiller
        self.weight = weight
        self.start = start
        self.labeled_rows = labeled_rows
        self.gate_interval = gate_interval
        self.log_interval = log_interval
        self.every = every
        self.logits_of = logits_of
        self._handle: Any = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer that has ``optimizer``, ``network`` and MONAI's iteration events."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_supervision)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Move the teacher to the trainer's device and let it follow the trainer's optimizer."""
        self.completed(engine)
        if is_cached(self.distiller.teacher):
            check_orientations(engine.data_loader)
        self.distiller.to(engine.state.device).train()
        if self.distiller.optimizer is not None:
            trainer = weakref.proxy(engine)  # its optimizer must not keep it, and thereby the distiller, alive
            self._handle = self.distiller.follow(engine.optimizer, lambda: trainer.scaler if trainer.amp else None)

    def completed(self, engine: Engine) -> None:
        """Leave the trainer's optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, engine: Engine) -> None:
        output, iteration = engine.state.output, engine.state.iteration
        if iteration % self.every:
            return
        label, pred = output[Keys.LABEL], self._logits(output[Keys.PRED])
        batch = engine.state.batch
        sam_image = batch.get(SAM_IMAGE) if isinstance(batch, Mapping) else None
        image = without_meta(output[Keys.IMAGE])
        sam_image = sam_image_for(image, sam_image, self.distiller.teacher)
        rows = self.labeled_rows(batch) if callable(self.labeled_rows) else self.labeled_rows
        run = iteration // self.every  # of the teacher
        if self.distiller.gate.mode == "agreement" and run % self.gate_interval == 1 % self.gate_interval:
            with all_in_eval_mode(engine.network):
                self.distiller.measure_agreement(
                    lambda x: self._logits(engine.inferer(x, engine.network)),
                    image,
                    label,
                    rows,
                    turn=run // self.gate_interval,
                    sam_image=sam_image,
                )

        weight = self.weight(iteration) if callable(self.weight) else self.weight
        result = self.distiller(sam_image, pred, label, rows, weight if iteration >= self.start else 0.0, iteration)
        output[Keys.LOSS] = output[Keys.LOSS] + result.loss
        output["distillation_loss"] = result.distillation_loss.detach()
        if self.distiller.learns:
            output["sam_loss"] = result.sam_loss.detach()
        output["gate_weight"] = self.distiller.gate.weight.clone()
        if result.slices is None:
            output["teacher_logits"] = result.teacher_logits
        # the first run of the teacher since the last multiple of the interval
        is_logged = iteration // self.log_interval > max(iteration - self.every, 0) // self.log_interval
        labeled = labeled_slice(rows, label, len(image))
        if is_logged and label is not None and len(range(len(image))[labeled]) > 0:
            label = label[labeled] if len(label) == len(image) else label
            student_logits = unstack_views(pred, image)[self.distiller.prompt_view if pred.ndim > image.ndim else 0]
            student_logits, label = without_meta(student_logits[labeled].detach()), without_meta(label)
            if result.slices is not None:
                student_logits, label = (result.slices.take(x, labeled) for x in (student_logits, label))
            ignore_index = self.distiller.ignore_index
            output["teacher_labeled_dice"] = _foreground_dice(result.teacher_logits[labeled], label, ignore_index)
            output["student_labeled_dice"] = _foreground_dice(student_logits, label, ignore_index)

    def _logits(self, pred: Any) -> Tensor:
        logits = pred if self.logits_of is None else self.logits_of(pred)
        if not isinstance(logits, Tensor):
            raise KnowSAMTypeError(
                f"`pred` must be logits but is a {type(logits).__name__}; pick them with `logits_of`."
            )
        return logits


def _foreground_dice(logits: Tensor, label: Tensor, ignore_index: int | None = None) -> Tensor:
    num_classes = logits.shape[1]
    labels = (logits > 0) if num_classes == 1 else logits.max(1, keepdim=True).indices
    if ignore_index is not None:  # background in both is in no foreground class
        ignored_mask = label == ignore_index
        labels, label = labels.masked_fill(ignored_mask, 0), label.masked_fill(ignored_mask, 0)
    helper = DiceHelper(include_background=False, num_classes=max(num_classes, 2), reduction="mean_batch")
    dice, _ = helper(labels, label)
    return torch.nanmean(dice)
