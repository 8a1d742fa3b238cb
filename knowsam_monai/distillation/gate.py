"""How far a teacher is trusted, judged on rows that it has not learned from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError

MODES = ("none", "validation", "agreement")


class TeacherGate(nn.Module):
    """
    A factor on the distillation loss: 1 where the teacher is as good as its student, 0 where it is clearly worse.

    .. math:: g = \\min(1, \\max(0, 1 + (d_{teacher} - d_{student}) / tolerance))

    and 0 for a teacher that finds nothing at all. Pixels where its output is not finite count as background.

    Dice on the labeled training rows cannot judge a teacher: it learns from them. d is measured elsewhere:

    - "none": g = 1 throughout, the paper.
    - "validation": Dice of both in the run's own validations (:class:`knowsam_monai.handlers.TeacherValidation`);
      g = 0 until the first.
    - "agreement": no labels at all. d is the foreground Dice of a model's labels on an image with its labels on the
      flipped or turned image, turned back, on unlabeled rows; a running mean. A teacher that has only memorized its
      labeled rows does not agree with itself elsewhere. It cannot see a teacher that is consistently wrong.

    In a distributed run every process has the same g: validations are gathered, and agreement is that of all rows.
    The state (g, both scores, number of measurements) is in the state dict.

    Args:
        mode: "none", "validation" or "agreement".
        tolerance: Dice (0..1) by which the teacher may be worse before g reaches 0.
        momentum: of the running mean of agreement scores, per measurement.

    Raises:
        ValueError: when `mode` is none of these or `tolerance` is not positive.

    Example::

        >>> gate = TeacherGate("validation", tolerance=0.1)
        >>> gate.update(student_dice=0.80, teacher_dice=0.75)  # half of the tolerance worse
        >>> round(gate.weight.item(), 3)
        0.5
    """

    def __init__(self, mode: str = "none", tolerance: float = 0.1, momentum: float = 0.8) -> None:
        super().__init__()
        if mode not in MODES:
            raise KnowSAMValueError(f"`gate` must be one of {', '.join(MODES)} but is {mode!r}.")
        if tolerance <= 0:
            raise KnowSAMValueError(f"`gate_tolerance` must be a positive Dice difference but is {tolerance}.")
        self.mode, self.tolerance, self.momentum = mode, tolerance, momentum
        self.weight: Tensor
        self.scores: Tensor
        self.num_measured: Tensor
        self.register_buffer("weight", torch.tensor(1.0 if mode == "none" else 0.0))
        self.register_buffer("scores", torch.zeros(2))  # Dice of student, teacher
        self.register_buffer("num_measured", torch.tensor(0))

    def update(self, student_dice: float | Tensor, teacher_dice: float | Tensor, momentum: float = 0.0) -> None:
        """Take a new measurement; one that is not finite (nothing to compare) changes nothing."""
        new = torch.stack(
            [torch.as_tensor(d, dtype=torch.float32).to(self.scores) for d in (student_dice, teacher_dice)]
        )
        mixed = torch.where(self.num_measured > 0, momentum * self.scores + (1 - momentum) * new, new)
        valid = torch.isfinite(new).all()
        self.scores.copy_(torch.where(valid, mixed, self.scores))
        self.num_measured.add_(valid)
        if self.mode != "none":
            difference = self.scores[1] - self.scores[0]
            weight = torch.clamp(1 + difference / self.tolerance, 0, 1) * (self.scores[1] > 0)
            self.weight.copy_(torch.where(self.num_measured > 0, weight, self.weight))

    @torch.no_grad()
    def measure_agreement(
        self,
        student: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor, Tensor], Tensor],
        image: Tensor,
        turn: int,
        is_counted: bool = True,
        sam_image: Tensor | None = None,
    ) -> None:
        """
        One measurement of "agreement" on unlabeled images.

        Args:
            student: ``f(image) -> logits`` (B, C, *spatial), in eval mode.
            teacher: ``f(image, student_logits) -> logits``.
            image: (B, channels, *spatial), rows that the teacher does not learn from.
            turn: which orientation to compare with, any integer: flips, and turns in planes that are square.
            is_counted: False on a rank that has no such row: what it measures counts nothing, and it meets the others.
            sam_image: (B, channels of the teacher's, *spatial), what the teacher sees of them; None: the same.
        """
        sam_image = image if sam_image is None else sam_image
        turns = _turns(image)
        there, back = turns[turn % len(turns)]
        student_logits, turned_logits = student(image), student(there(image))
        pairs = {
            "student": (student_logits, back(turned_logits)),
            "teacher": (teacher(sam_image, student_logits), back(teacher(there(sam_image), turned_logits))),
        }
        num_classes = student_logits.shape[1]
        counts = torch.stack([torch.stack(_class_counts(*pairs[role], num_classes)) for role in ("student", "teacher")])
        if ranks.is_distributed():
            counts *= is_counted
            torch.distributed.all_reduce(counts)
        student_counts, teacher_counts = counts
        # a class that either model finds counts for both: a teacher that finds nothing does not agree perfectly
        found = (student_counts[1] + teacher_counts[1]) > 0
        student_dice, teacher_dice = (
            torch.where(found, 2 * common / total.clamp(min=1), torch.nan).nanmean()
            for common, total in (student_counts, teacher_counts)
        )
        self.update(student_dice, teacher_dice, momentum=self.momentum)


def _turns(image: Tensor) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """There and back: flips of every set of spatial axes, quarter turns in every plane of two axes of one size."""
    axes = range(-1, 1 - image.ndim, -1)
    flips = [partial(torch.flip, dims=dims) for count in range(1, len(axes) + 1) for dims in combinations(axes, count)]
    planes = [(b, a) for a, b in combinations(axes, 2) if image.shape[a] == image.shape[b]]
    quarters = [(partial(torch.rot90, k=k, dims=p), partial(torch.rot90, k=-k, dims=p)) for p in planes for k in (1, 3)]
    return [(flip, flip) for flip in flips] + quarters


def _class_counts(logits: Tensor, other: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Pixels of each foreground class that both maps share, and pixels of the two together, each (C - 1,)."""
    num_classes = max(num_classes, 2)
    labels, others = _labels(logits).flatten(), _labels(other).flatten()
    common = torch.bincount(torch.where(labels == others, labels, 0), minlength=num_classes)
    total = torch.bincount(labels, minlength=num_classes) + torch.bincount(others, minlength=num_classes)
    return common[1:].float(), total[1:].float()


def _labels(logits: Tensor) -> Tensor:
    """Class of each pixel, (B, *spatial); background where there are no probabilities: argmax takes NaN for a class."""
    labels = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    return labels.masked_fill(~(logits < torch.inf).all(1), 0)
