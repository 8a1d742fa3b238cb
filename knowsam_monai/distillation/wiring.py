"""Checks how a host uses its distiller, to report mistakes that would otherwise go unnoticed."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.distillation.optimizer_hooks import missing_scaler
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMTypeError
from knowsam_monai.teachers.provenance import named
from knowsam_monai.tensors import are_probabilities

logger = logging.getLogger(__name__)

# calls after which an unmeasured gate is a mistake; a validation may be a long epoch away
UNMEASURED_CALLS = {"agreement": 100, "validation": 2000}
UNTAUGHT_CALLS = 100  # the same for a teacher without labels or steps, and for logits without a graph
INSPECTED_CALLS = (1, 50)  # calls at which the values of image and logits are checked
CHECKED = 50  # every so many calls SAM's loss and output are read
MISSED = 3  # calls in a row with labeled rows only; some hosts have separate calls for the others
MEASURED_BY = {
    "agreement": "call `measure_if_due` in each step",
    "validation": "add `TeacherValidation` to the evaluator, or call `gate.update` after each validation and "
    "`measure_if_due` in each step (ignore this if the first validation is still to come)",
}


class Wiring:
    """
    Counts the calls of a distiller and warns once about each mistake that they reveal.

    A copied or loaded distiller starts with a new instance, attached to no student.

    Attributes:
        attachments: the attachments not yet removed; the host keeps them, or their watched loaders, alive.
        num_calls: number of training calls.
        followed: the handle of each optimizer that SAM was told to follow; those of attachments are not among them.
        expects_no_scaler: whether no GradScaler may scale SAM's next loss; None before SAM follows a student.

    Raises:
        RuntimeError: if the distiller is called while it is attached to a student, or if `expects_no_scaler` is wrong.

    Example::

        >>> len(Wiring().attachments)
        0
    """

    def __init__(self) -> None:
        self.attachments: weakref.WeakSet[Any] = weakref.WeakSet()
        self.num_calls = 0
        self.followed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._num_missed = 0  # consecutive measurements without unlabeled rows
        self.expects_no_scaler: bool | None = None
        self._sam_losses: Tensor | None = None  # their sum since SAM's last step
        self._watched: dict[str, tuple[int, int]] = {}  # calls, and checks in a row that found it broken
        self._agreement_requested = False
        self._num_empty = 0  # consecutive calls without a row to teach
        self._saw_label = False
        self._since_step = 0  # calls with a label since the teacher's last step
        self._without_graph = 0  # consecutive calls whose logits have no graph
        self._num_in_eval_mode = 0  # consecutive calls in eval mode that could have trained the teacher
        self._former_logits: weakref.ref[Tensor] | None = None
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple:
        return Wiring, ()

    def teacher_stepped(self) -> None:
        """Note that the teacher has stepped."""
        self._since_step, self._sam_losses = 0, None

    def follows_no_longer(self) -> None:
        """Note that the host steps SAM itself, perhaps with a GradScaler."""
        self.expects_no_scaler = False

    def watch_loss(self, sam_loss: Tensor) -> None:
        """Note a loss from which SAM learns, and look once for a GradScaler in its backward pass."""
        loss = sam_loss.detach()
        self._sam_losses = loss if self._sam_losses is None else self._sam_losses + loss
        if self._is_broken_again("loss", lambda: torch.isfinite(loss)):
            self.warn(
                "SAM's loss is repeatedly not finite, so SAM learns nothing: restart from its checkpoint, "
                "with a lower learning rate or without float16."
            )
        if self.expects_no_scaler and sam_loss.requires_grad:
            sam_loss.register_hook(self._check_scale)

    def watch_target(self, distiller: nn.Module, is_finite: Tensor) -> None:
        """Note which rows of the teacher's output are finite, and warn if some are not twice in a row."""
        if self._is_broken_again("target", is_finite.all):
            self.warn(
                f"the output of {named(distiller.teacher)} is repeatedly not finite, and such images teach "
                "nothing; check its weights and the range of the images."
            )

    def _is_broken_again(self, what: str, is_whole: Callable[[], Tensor]) -> bool:
        """Whether something that is checked at intervals is broken for the second time in a row."""
        num_calls, num_broken = self._watched.get(what, (0, 0))
        is_checked = (num_calls + 1) % CHECKED == 0
        if is_checked:
            num_broken = 0 if bool(is_whole()) else num_broken + 1
        self._watched[what] = num_calls + 1, num_broken
        return is_checked and num_broken == 2

    def is_broken(self, parameters: Sequence[Tensor]) -> bool:
        """
        Whether SAM's gradients are not finite because its loss was not, which no loss scale would help.

        Args:
            parameters: those that SAM's optimizer is to step.
        """
        losses, self._sam_losses = self._sam_losses, None
        if losses is None or bool(torch.isfinite(losses)):
            return False
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):  # of a step never taken
            return False
        self._since_step = 0
        self.warn(
            "SAM's loss was not finite, so SAM did not step. If this goes on, SAM no longer learns: restart from "
            "its checkpoint, with a lower learning rate or without float16."
        )
        return True

    def _check_scale(self, gradient: Tensor) -> None:
        if self.expects_no_scaler:
            self.expects_no_scaler = False  # one look is enough
            mantissa, exponent = math.frexp(float(gradient))
            if mantissa == 0.5 and exponent > 10:  # a power of two of at least 1024
                raise missing_scaler()

    def check_once(self, logits: Tensor) -> None:
        """Raise a RuntimeError if the distiller is called while it is attached to a student; warn about repeated calls.

        Args:
            logits: the logits of the call; those that an attachment passes have no graph behind them.
        """
        if self.attachments and logits.grad_fn is not None:
            raise KnowSAMRuntimeError(
                "SKD must be added once to each step but the distiller is called while it is attached to a student; "
                "call `remove()` on the attachment, or remove the call (or `SAMDistillation`)."
            )
        if self._former_logits is not None and logits.grad_fn is not None and self._former_logits() is logits:
            self.warn(
                "the distiller was called twice with the same logits, so SKD counts twice if both losses are added; "
                "use one of the three ways to attach it, once per step."
            )
        self._former_logits = weakref.ref(logits)

    def count_call(self, distiller: nn.Module, image: Tensor, logits: Tensor, has_label: bool) -> None:
        """
        Count a training call.

        Args:
            distiller: the distiller that was called.
            image: (B, channels, *spatial).
            logits: (B, C, *spatial), of one view.
            has_label: whether the teacher gets labels.
        """
        self.num_calls += 1
        self._num_in_eval_mode = 0
        self._saw_label |= has_label
        self._since_step += has_label or self._since_step > 0
        self._without_graph = 0 if logits.requires_grad else self._without_graph + 1
        gate = distiller.gate
        was_requested = gate.mode == "agreement" and self._agreement_requested  # and perhaps had nothing to measure
        if self.num_calls == UNMEASURED_CALLS.get(gate.mode) and not (was_requested or gate.is_measured):
            self.warn(
                f"the gate {gate.mode!r} was not measured in {self.num_calls} steps, so {named(distiller.teacher)} "
                f"teaches nothing yet: {MEASURED_BY[gate.mode]}, or use the gate 'none'."
            )
        if self.num_calls == 1 and distiller.optimizer is None:
            trainable = sum(parameter.requires_grad for parameter in distiller.teacher.parameters())
            if trainable:
                self.warn(
                    f"this distiller has no optimizer, so it does not train {named(distiller.teacher)}, which has "
                    f"{trainable} trainable tensor(s): pass the teacher's optimizer, or call "
                    "`teacher.requires_grad_(False)` if it is trained already and nothing else trains it."
                )
        if distiller.optimizer is not None and self.num_calls == UNTAUGHT_CALLS and not distiller.learns:
            self.warn(
                "SAM's optimizer has no parameter of the teacher that requires a gradient, so SAM learns nothing: "
                "build it from the trainable parameters, or pass none."
            )
        elif distiller.optimizer is not None and self.num_calls == UNTAUGHT_CALLS and not self._saw_label:
            self.warn(
                f"SAM has not seen a label in {UNTAUGHT_CALLS} steps, so SAM learns nothing: pass `label`, or return "
                "it from `select`."
            )
        if distiller.optimizer is not None and self._since_step == UNTAUGHT_CALLS:
            self.warn(
                f"SAM's optimizer has not stepped in {UNTAUGHT_CALLS} steps, so SAM learns nothing: call "
                "`distiller.follow(student_optimizer)` once, and again if the host builds a new optimizer; with "
                "`attach`, call `remove()` and attach again. Ignore this if you accumulate gradients over as many "
                "steps."
            )
        if self._without_graph == UNTAUGHT_CALLS:
            self.warn(
                f"the logits required no gradient in {UNTAUGHT_CALLS} steps, so nothing is distilled: pass the logits "
                "of the trained student, not detached and not of its averaged copy."
            )
        if self.num_calls in INSPECTED_CALLS and len(image) > 0:
            # each of several regions has a sigmoid of its own
            logits = logits.flatten(0, 1)[:, None] if distiller.overlapping else logits
            self._inspect(distiller, image, logits.detach())

    def count_in_eval_mode(self, logits: Tensor, has_label: bool) -> None:
        """
        Count a call in eval mode, and warn about calls with the logits and labels of training.

        Args:
            logits: (B, C, *spatial), of one view.
            has_label: whether the teacher would get labels.
        """
        self._num_in_eval_mode += has_label and logits.requires_grad and torch.is_grad_enabled()
        if self._num_in_eval_mode == UNTAUGHT_CALLS:
            self.warn(
                f"the distiller was in eval mode in {UNTAUGHT_CALLS} steps with labels, so SAM learns nothing: call "
                "`distiller.train()` after each evaluation; if these are evaluations, call it under `torch.no_grad()`."
            )

    def count_measurement(self, distiller: nn.Module, rows: set[str], may_say_rows: bool) -> None:
        """
        Warn if several measurements in a row have no unlabeled rows.

        Args:
            distiller: the distiller that measures.
            rows: the kinds of rows that there are to measure on, "unlabeled" and "labeled".
            may_say_rows: whether the remedy is to say which rows are labeled.
        """
        self._agreement_requested = True
        self._num_missed = 0 if "unlabeled" in rows else self._num_missed + 1
        if self._num_missed == MISSED and distiller.ignore_index is None:
            remedy = "Pass `labeled_rows`, or return it from `select`."
            self.warn(
                f"the gate {distiller.gate.mode!r} was not measured: every row is labeled. "
                f"{remedy if may_say_rows else 'Build the distiller with the gate none.'}"
            )

    def count_taught(self, num_rows: int) -> None:
        """Warn if many calls in a row have no row that the teacher teaches."""
        self._num_empty = 0 if num_rows > 0 else self._num_empty + 1
        if self._num_empty == MISSED:
            self.warn(
                "nothing is distilled: every row is labeled and `taught_rows='unlabeled'`. Pass `labeled_rows`, or "
                "return it from `select`."
            )

    def warn(self, message: str) -> None:
        """Log a warning, each message once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("SKD: %s", message)

    def _inspect(self, distiller: nn.Module, image: Tensor, logits: Tensor) -> None:
        is_in_range = are_probabilities(logits)
        distiller.gate.saw_logits |= not is_in_range
        # at the first step one channel may be in 0..1 by chance
        if is_in_range and (logits.shape[1] > 1 or self.num_calls > 1):
            self.warn(
                "the student seems to return probabilities, not logits: they are in 0..1, and several channels sum to "
                "1. Remove its softmax or sigmoid, or let `logits_of` pick the logits."
            )
        if has_each_row_twice(image):
            self.warn(
                "each image is in the batch twice (as in R-Drop), so the copies of labeled rows count as unlabeled: "
                "check that the labels belong to the first rows, and avoid the gate 'agreement', which would judge "
                "SAM on images from which it learns; or call the student separately on each copy."
            )


def takes_more_than_images(reason: str) -> KnowSAMTypeError:
    """The error of a student that the gate cannot call."""
    return KnowSAMTypeError(
        f"The gate calls the student with images alone, which fails: {reason}. Build the distiller with `gate='none'` "
        "if your network needs more than an image."
    )


def has_each_row_twice(image: Tensor) -> bool:
    """
    Whether each row of a batch occurs more than once.

    Args:
        image: (B, channels, *spatial); constant rows, such as empty slices, are ignored.

    Example::

        >>> image = torch.rand(2, 1, 4, 4)
        >>> has_each_row_twice(image), has_each_row_twice(torch.cat([image, image]))
        (False, True)
    """
    rows = image.flatten(1)
    rows = rows[(rows != rows[:, :1]).any(1)]
    if len(rows) < 2:
        return False
    return bool((torch.unique(rows, dim=0, return_counts=True)[1] > 1).all())
