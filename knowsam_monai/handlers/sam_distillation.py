"""SAM-induced knowledge distillation (SKD) as a handler."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.metrics import DiceHelper
from monai.utils import CommonKeys as Keys
from torch import Tensor

from knowsam_monai.arguments import check_types
from knowsam_monai.data.orientation import SAM_IMAGE
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.sam_image import check_orientations, is_cached, sam_image_for
from knowsam_monai.errors import KnowSAMValueError, check_counts
from knowsam_monai.handlers.supervision import check_ignores, check_supervision, has_deep_supervision, logits_from
from knowsam_monai.labeled_rows import Rows, labeled_slice
from knowsam_monai.losses import dice_ce_loss
from knowsam_monai.losses.ramp_up import Weight, check_weights, weight_at
from knowsam_monai.losses.supervised import check_hides_labels, has_sigmoid
from knowsam_monai.tensors import class_numbers, predicted_label, unstack_views, without_meta


class SAMDistillation:
    """
    Add SAM-induced knowledge distillation to a MONAI trainer: the loss becomes ``loss + L_kd + L_sam``.

    Put it into the ``train_handlers`` of any ``SupervisedTrainer`` whose ``pred`` is logits or contains them
    (`logits_of`). The teacher's optimizer steps after the trainer's, also under AMP and gradient accumulation. Whenever
    the teacher runs (see `every`), the handler writes `distillation_loss`, `sam_loss` (if the teacher learns) and
    `gate_weight`, all detached, into ``engine.state.output``. Every `log_interval` iterations it adds
    `teacher_labeled_dice` and `student_labeled_dice`: foreground Dice on the labeled rows. They do not show how good
    the teacher is, since it learns from these rows.

    The teacher processes only the rows that something reads. A handler that reads its logits for the unlabeled rows
    sets ``engine.state.output["teacher_logits"] = None`` at ``IterationEvents.FORWARD_COMPLETED``, and reads them after
    this handler, up to ``IterationEvents.BACKWARD_COMPLETED``. Rows that nothing reads are NaN in them, and while the
    gate is 0 the value stays None.

    A teacher that draws slices of volumes (:class:`knowsam_monai.teachers.SliceTeacher`) draws them by iteration. The
    terms and Dice are then those of the slices, and there are no `teacher_logits`.

    If a batch has a `"sam_image"` (:class:`knowsam_monai.data.RandOrientationd`), the teacher sees that: the image
    before intensity augmentation. A teacher with encoder "cached" requires it; the pipeline is checked at the start of
    the run. A handler that replaces the image must also replace or remove `"sam_image"`.

    Args:
        distiller: has the teacher, its optimizer and the gate.
        weight: factor of the distillation loss, a number or a function of ``engine.state.iteration``.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. The teacher
            always learns from the beginning.
        labeled_rows: the rows whose labels SAM learns from: an int n (the first n), a slice, "all", or a callable of
            the batch that returns one of these. None: the first ``len(label)``, which must not be all rows unless the
            SAM loss has an `ignore_index`. If every row has a label, :class:`knowsam_monai.losses.PartiallyLabeledLoss`
            needs its own `labeled_rows`.
        every: k; the teacher runs only at every k-th iteration. At the others it neither learns nor teaches. `weight`
            is not scaled; k times the weight gives the same average.
        gate_interval: number of teacher runs between measurements of the gate on training rows; the first is after 10.
        log_interval: number of iterations between logs of the labeled Dice.
        logits_of: picks the logits, (B, C, *spatial) or stacked views, from the network's output, for example
            ``operator.itemgetter(0)``; None: the output is the logits. The trainer's loss gets the whole output.

    Raises:
        ValueError: if an interval is below 1; at the start, if student and teacher share parameters, or if only
            heads of deep supervision would be taught; at a step, if a required `"sam_image"` is missing or does not
            fit, if the classes or rows of student, teacher and labels disagree, if every row has a label but
            `labeled_rows` is None, or if the trainer's loss uses labels of other rows than `labeled_rows`.
        RuntimeError: at a step, if the distiller is also attached to a student.

    Example::

        SupervisedTrainer(..., train_handlers=[MyMethod(), SAMDistillation(SAMDistiller(teacher, optimizer))])

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 8 to 10.
    """

    @check_types
    def __init__(
        self,
        distiller: SAMDistiller,
        weight: Weight = 1.0,
        start: int = 0,
        labeled_rows: Rows | Callable[[Any], Rows] = None,
        gate_interval: int = 50,
        log_interval: int = 50,
        every: int = 1,
        logits_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_weights(weight=weight)
        check_counts(every=every, gate_interval=gate_interval, log_interval=log_interval)
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
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.step_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Move the distiller to the trainer's device and make its optimizer follow the trainer's."""
        self.completed(engine)
        self.distiller.check_student(engine.network)
        taught_views = self.distiller.taught_views
        if 0 not in taught_views and has_deep_supervision(engine.network):
            raise KnowSAMValueError(
                f"`taught_views` must be [0], the output of {type(engine.network).__name__}, but is "
                f"{list(taught_views)}, heads of its deep supervision; set it to [0]."
            )
        is_sigmoid = has_sigmoid(getattr(engine, "loss_function", None))
        has_one_channel = getattr(self.distiller.teacher, "num_classes", None) == 1  # the same either way
        if is_sigmoid is not None and is_sigmoid != self.distiller.overlapping and not has_one_channel:
            softmax, sigmoid = "a softmax over all channels", "a sigmoid for each channel"
            ours, theirs = (softmax, sigmoid) if is_sigmoid else (sigmoid, softmax)
            self.distiller.wiring.warn(
                f"`loss_function` has {theirs} but the distiller {ours}; build it with `overlapping={is_sigmoid}`."
            )
        ignore_index = getattr(engine.state, "ignore_index", None)  # of BidirectionalCopyPaste
        if ignore_index is not None and self.distiller.optimizer is not None:
            sam_loss = dice_ce_loss() if self.distiller.sam_loss is None else self.distiller.sam_loss
            check_ignores("sam_loss", sam_loss, ignore_index)
        if is_cached(self.distiller.teacher):
            check_orientations(engine.data_loader)
        self.distiller.move(engine.state.device).train()
        if self.distiller.optimizer is not None:
            trainer = weakref.ref(engine)  # its optimizer must not keep trainer and distiller alive
            self._handle = self.distiller.follow(engine.optimizer, lambda: _scaler_of(trainer()))

    def completed(self, engine: Engine) -> None:
        """Leave the trainer's optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def step_completed(self, engine: Engine) -> None:
        """Remove the teacher's logits, in which handlers such as ``TerminateOnNan`` would find NaN or None."""
        engine.state.output.pop("teacher_logits", None)

    def __call__(self, engine: Engine) -> None:
        output, iteration, batch = engine.state.output, engine.state.iteration, engine.state.batch
        label = output[Keys.LABEL]
        rows = self.labeled_rows(batch) if callable(self.labeled_rows) else self.labeled_rows
        labeled = labeled_slice(rows, label, len(output[Keys.IMAGE]))
        if label is not None and rows is not None:
            loss = getattr(engine, "loss_function", None)
            check_hides_labels(loss, len(output[Keys.IMAGE]), len(label), labeled)
        if iteration % self.every:
            return
        pred = logits_from(output[Keys.PRED], self.logits_of)
        sam_image = batch.get(SAM_IMAGE) if isinstance(batch, Mapping) else None
        image = without_meta(output[Keys.IMAGE])
        sam_image = sam_image_for(image, sam_image, self.distiller.teacher)
        run = iteration // self.every  # counts the teacher's runs
        student = partial(engine.inferer, network=engine.network)
        self.distiller.measure_if_due(
            run, self.gate_interval, engine.network, image, label, rows, sam_image, self.logits_of, student
        )

        # the teacher's first run since the last multiple of the interval
        is_logged = iteration // self.log_interval > max(iteration - self.every, 0) // self.log_interval
        is_logged &= label is not None and len(range(len(image))[labeled]) > 0
        also_read = ["labeled"] if is_logged else []
        draws_slices = getattr(self.distiller.teacher, "slices", None) is not None
        is_asked = "teacher_logits" in output and self.distiller.gate.is_open and not draws_slices
        also_read += ["unlabeled"] if is_asked else []
        weight = weight_at(self.weight, iteration, self.start)
        result = self.distiller(sam_image, pred, label, rows, weight, iteration, also_read)
        output[Keys.LOSS] = output[Keys.LOSS] + result.loss
        output["distillation_loss"] = result.distillation_loss.detach()
        if self.distiller.learns:
            output["sam_loss"] = result.sam_loss.detach()
        output["gate_weight"] = self.distiller.gate.weight.clone()
        if is_asked:
            output["teacher_logits"] = result.teacher_logits
        if is_logged:
            label = class_numbers(label[labeled] if len(label) == len(image) else label)
            student_logits = unstack_views(pred, image)[self.distiller.prompt_view if pred.ndim > image.ndim else 0]
            student_logits = without_meta(student_logits[labeled].detach())
            if result.slices is not None:
                student_logits, label = (result.slices.take(x, labeled) for x in (student_logits, label))
            ignore_index = self.distiller.ignore_index
            output["teacher_labeled_dice"] = _foreground_dice(result.teacher_logits[labeled], label, ignore_index)
            output["student_labeled_dice"] = _foreground_dice(student_logits, label, ignore_index)


def _scaler_of(trainer: Engine | None) -> torch.amp.GradScaler | None:
    """None without AMP, and for a trainer that is gone: an exception ended its run, but its optimizer lives on."""
    return trainer.scaler if trainer is not None and trainer.amp else None


def _foreground_dice(logits: Tensor, label: Tensor, ignore_index: int | None = None) -> Tensor:
    if label.shape[1] > 1:  # overlapping regions
        pairs = zip(logits.split(1, 1), label.split(1, 1))
        return torch.nanmean(torch.stack([_foreground_dice(*pair, ignore_index) for pair in pairs]))
    labels = predicted_label(logits)
    if ignore_index is not None:  # background in both counts for no foreground class
        ignored_mask = label == ignore_index
        labels, label = labels.masked_fill(ignored_mask, 0), label.masked_fill(ignored_mask, 0)
    helper = DiceHelper(include_background=False, num_classes=max(logits.shape[1], 2), reduction="none")
    dice = helper(labels, label)[0]  # NaN for a class that the row lacks
    return dice.nanmean(0).nanmean()
