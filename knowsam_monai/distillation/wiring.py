"""How a distiller is wired into its host: what its calls tell of mistakes that would otherwise stay silent."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMRuntimeError

logger = logging.getLogger(__name__)

# steps after which something must be missing where a gate was not measured, as a validation may be a long epoch away
UNMEASURED_CALLS = {"agreement": 100, "validation": 2000}
UNTAUGHT_CALLS = 100  # and where the teacher saw no label or did not step, or the student's logits have no graph
INSPECTED_CALLS = (1, 50)  # at which the values of image and logits are looked at
MEASURED_BY = {
    "agreement": "call `measure_agreement` every 50 steps or so",
    "validation": "add `TeacherValidation` to the evaluator or call `gate.update` after each validation",
}


class Wiring:
    """
    Counts the calls of a distiller, and warns once of each mistake that shows in them.

    A copy of a distiller, or one that is loaded, begins anew and is attached to no student.

    Attributes:
        attachments: those that are not removed; the host keeps them, or their watched loaders.
        asked: whether the agreement of the teacher was ever asked for.

    Raises:
        RuntimeError: when a host distills by itself whose student is attached to.

    Example::

        >>> len(Wiring().attachments)
        0
    """

    def __init__(self) -> None:
        self.attachments: weakref.WeakSet[Any] = weakref.WeakSet()
        self.asked = False
        self._num_calls = 0
        self._saw_label = False
        self._since_step = 0  # calls with a label since the teacher's last step
        self._without_graph = 0  # calls in a row whose logits have none
        self._former_logits: weakref.ref[Tensor] | None = None
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple:
        return Wiring, ()

    def stepped(self) -> None:
        """The teacher has stepped."""
        self._since_step = 0

    def check_once(self, logits: Tensor) -> None:
        """Raise a RuntimeError when a host distills by itself, whose student is attached to.

        Args:
            logits: of the call; those of an attachment have no graph behind them.
        """
        if self.attachments and logits.grad_fn is not None:
            raise KnowSAMRuntimeError(
                "SKD must be added once to each step but the distiller is called while it is attached to a student; "
                "call `remove()` of the attachment, or leave the call (or `SAMDistillation`) out."
            )
        if self._former_logits is not None and logits.grad_fn is not None and self._former_logits() is logits:
            self.warn(
                "the distiller was called twice with the same logits, so that SKD counts twice where both losses are "
                "added; call it once a step, in one of the three ways."
            )
        self._former_logits = weakref.ref(logits)

    def called(self, distiller: nn.Module, image: Tensor, logits: Tensor, has_label: bool) -> None:
        """
        Count a training call.

        Args:
            distiller: whose call it is.
            image: (B, channels, *spatial).
            logits: (B, C, *spatial), of one view.
            has_label: whether the teacher was given labels.
        """
        self._num_calls += 1
        self._saw_label |= has_label
        self._since_step += has_label or self._since_step > 0
        self._without_graph = 0 if logits.requires_grad else self._without_graph + 1
        gate = distiller.gate
        if self._num_calls == UNMEASURED_CALLS.get(gate.mode) and not (self.asked or gate.num_measured):
            self.warn(
                f"the gate {gate.mode!r} was not measured in {self._num_calls} steps, and until it is, nothing is "
                f"taught: {MEASURED_BY[gate.mode]}, or take the gate 'none'."
            )
        if distiller.optimizer is not None and self._num_calls == UNTAUGHT_CALLS and not distiller.learns:
            self.warn(
                "SAM's optimizer holds no parameter of the teacher that requires a gradient, so that SAM learns "
                "nothing: build it over those that are to learn, or give none."
            )
        elif distiller.optimizer is not None and self._num_calls == UNTAUGHT_CALLS and not self._saw_label:
            self.warn(
                f"SAM has not seen a label in {UNTAUGHT_CALLS} steps, so that SAM learns nothing: give `label`, or "
                "`select` what SAM is to learn from."
            )
        if distiller.optimizer is not None and self._since_step == UNTAUGHT_CALLS:
            self.warn(
                f"SAM's optimizer has not stepped in {UNTAUGHT_CALLS} steps, so that SAM learns nothing: call "
                "`distiller.follow(student_optimizer)` once, and again when the host has built a new optimizer; with "
                "`attach`, call `remove()` and attach with the new one. Where a step is accumulated over as many, "
                "all is well."
            )
        if self._without_graph == UNTAUGHT_CALLS:
            self.warn(
                f"the student's logits had no gradient in {UNTAUGHT_CALLS} steps, so that nobody is taught: give those "
                "of the student that is trained, not detached and not of its averaged copy."
            )
        if self._num_calls in INSPECTED_CALLS:
            self._inspect(image, logits.detach())

    def warn(self, what: str) -> None:
        """Warn, once of each."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("SKD: %s", what)

    def _inspect(self, image: Tensor, logits: Tensor) -> None:
        # one channel in 0..1 may be chance in the first step
        if are_probabilities(logits) and (logits.shape[1] > 1 or self._num_calls > 1):
            self.warn(
                "the student returns probabilities and not logits: all are in 0..1, and the channels sum to 1. Leave "
                "out its softmax or sigmoid, or let `logits_of` pick the logits."
            )
        if has_each_row_twice(image):
            self.warn(
                "each image is in the batch twice (as in R-Drop), and the copies of labeled rows count as unlabeled: "
                "check that the labels belong to the first rows, and do not take the gate 'agreement', which would "
                "judge SAM on images that it learns from; or call the student on each copy by itself."
            )


def are_probabilities(logits: Tensor) -> bool:
    """
    Whether values are those of a softmax, or for one channel of a sigmoid.

    Args:
        logits: (B, C, *spatial).

    Example::

        >>> are_probabilities(torch.randn(2, 3, 4, 4)), are_probabilities(torch.randn(2, 3, 4, 4).softmax(1))
        (False, True)
    """
    if logits.shape[1] > 1:
        sums = logits.float().sum(1)
        return bool((logits >= 0).all() and ((sums - 1).abs() < 0.02).all())
    return bool(((logits >= 0) & (logits <= 1)).all() and logits.max() > logits.min())


def has_each_row_twice(image: Tensor) -> bool:
    """
    Whether each row of a batch is there more than once.

    Args:
        image: (B, channels, *spatial); rows of one value, as of empty slices, do not count.

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
