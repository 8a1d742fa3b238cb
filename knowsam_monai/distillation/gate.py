"""The gate: how much a teacher is trusted, measured on rows from which it does not learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knowsam_monai import ranks
from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice

FIRST_MEASUREMENT = 10  # runs of the teacher; before that, its new layers have hardly been trained
MOST_TRIES = 10  # to make up for a measurement that lacked rows; then the gate waits for the next interval
SMALL = 0.1  # share of a class's largest recent measurement, below which one counts less
PEAK_MOMENTUM = 0.9  # what each measurement keeps of the largest
FIRST_ONES = 5  # measurements of models that have hardly learned, which are forgotten sooner:
FIRST_PEAK_MOMENTUM, FIRST_MOMENTUM = 0.3, 0.5
LEAST_DICE, ENOUGH_DICE = 0.1, 0.3  # of a teacher on labeled rows: up to the first it teaches nothing


class LabeledImages(NamedTuple):
    """
    Labeled rows of a batch, for the gate.

    Args:
        image: (B_l, channels, *spatial).
        sam_image: (B_l, channels of the teacher, *spatial), what the teacher sees.
        label: class indices (B_l, 1, *spatial), or 0 and 1 (B_l, C, *spatial) of regions that may overlap. Pixels with
            other values do not count.
        ignore_index: one more value of pixels that do not count; None: none.
    """

    image: Tensor
    sam_image: Tensor
    label: Tensor
    ignore_index: int | None = None


class TeacherGate(nn.Module):
    """
    A factor of the distillation loss that says how much a teacher is trusted.

    Both models are measured, the teacher's result d is compared with the student's, and g is the product of the factors

    .. math:: \\min(1, \\max(0, 1 + (d_{teacher} - d_{student}) / tolerance))

    which are 1 if the teacher is as good as its student and 0 if it is clearly worse. With `must_lead`, for a teacher
    that does not learn, they are

    .. math:: \\max(0, (d_{teacher} - d_{student}) / (1 - d_{student}))

    the share of the student's gap to a perfect d that the teacher closes. Such a teacher must be better than its
    student: it teaches less as the student catches up, and stops once it has. Otherwise it could hold the student at
    its own level, where both look equally good.

    A factor is also 0 if the teacher finds no foreground. Pixels where its output is not finite count as background.
    d is the mean Dice of the foreground classes, each from the pixels of many measurements, since a structure may be
    absent from most batches. Older measurements count less.

    The teacher learns from the labeled training rows, so Dice on them cannot show that it is good. The mode says what
    is measured:

    - "none": nothing; g is always 1, as in the paper.
    - "agreement": d is the Dice between a model's segmentation of an unlabeled image and its segmentation of the
      flipped or rotated image, transformed back. A teacher that has memorized its labeled rows does not agree with
      itself on other rows.
    - "validation": agreement, and in a second factor the Dice in the run's own validations
      (:class:`knowsam_monai.handlers.TeacherValidation`). Alone that is not enough: a teacher that holds its student
      back at its own level never looks worse.

    g is 0 until everything that the mode compares is measured. Neither d detects every bad teacher: one with the same
    answer for every image agrees with itself, and any teacher does as well in validation as a student that has learned
    nothing yet. But Dice on labeled rows can show that a teacher is bad. So g has two more factors, from both models'
    Dice there. The first is 1 if the teacher's Dice is at least 3/4 of the student's, or the student finds nothing, and
    falls to 0 at half of it. The second is 1 if the teacher's Dice is at least 0.3, and falls to 0 at 0.1, because
    early in training even a useless teacher is no worse than its student. Both are 1 if no row has a label.

    In a distributed run all processes have the same g: it is computed from the results of all of them. The state dict
    has g, the scores of student and teacher (-1: not measured) and the counts behind them, the number of measurements
    of agreement, and what decides when to measure. A gate that loads it computes g from the scores by its own mode.

    Args:
        mode: "none", "agreement" or "validation".
        tolerance: by how much (Dice, 0..1) the teacher may be worse than its student before g reaches 0; without effect
            if `must_lead`.
        momentum: fraction of the earlier counts that a measurement keeps; the first measurements keep at most half.
        overlapping: each channel is a region of its own, found where its sigmoid is above 0.5, instead of a class.
        must_lead: g is 0 unless the teacher is better than its student; for a teacher that does not learn.

    Raises:
        ValueError: if `mode` is unknown, `tolerance` is not positive, or `momentum` is not in 0..1, 1 excluded.

    Example::

        >>> gate = TeacherGate("agreement")
        >>> gate.measure_agreement(lambda x: x - 0.5, lambda x, prompt: prompt, torch.rand(2, 1, 8, 8), turn=0)
        >>> gate.weight.item()  # this teacher repeats its student
        1.0
    """

    @check_types
    def __init__(
        self,
        mode: str,
        tolerance: float = 0.1,
        momentum: float = 0.8,
        overlapping: bool = False,
        must_lead: bool = False,
    ) -> None:
        super().__init__()
        check_choice("gate", mode, ("none", "agreement", "validation"))
        if not tolerance > 0:
            raise KnowSAMValueError(f"`gate_tolerance` must be a positive Dice difference but is {tolerance}.")
        if not 0 <= momentum < 1:
            raise KnowSAMValueError(f"`momentum` must be at least 0 and below 1 but is {momentum}.")
        self.mode, self.tolerance, self.momentum, self.overlapping = mode, tolerance, momentum, overlapping
        self.must_lead = must_lead
        self.weight: Tensor
        self.agreement_scores: Tensor
        self.validation_scores: Tensor
        self.labeled_scores: Tensor
        self.agreement_counts: Tensor
        self.labeled_counts: Tensor
        self.num_measured: Tensor
        self.register_buffer("weight", torch.tensor(1.0 if mode == "none" else 0.0))
        self.register_buffer("agreement_scores", torch.full((2,), -1.0))  # Dice of student, teacher
        self.register_buffer("validation_scores", torch.full((2,), -1.0))
        self.register_buffer("labeled_scores", torch.full((2,), -1.0))
        # of each class, see `_added`, (student and teacher, 3, C); the first measurement tells C
        self.register_buffer("agreement_counts", torch.zeros(2, 3, 0))
        self.register_buffer("labeled_counts", torch.zeros(2, 3, 0))
        self.register_buffer("num_measured", torch.tensor(0))
        self.missing: set[str] = set()  # rows that the last measurement lacked, "labeled" or "unlabeled"
        self.expects_labels = False  # whether a batch had some
        self.saw_logits = False  # whether the student's output was outside of 0..1
        self._measured_run, self._num_tries = 0, 0
        self._read_version = (0, -1)  # address and version of the weight when it was last read
        self._was_open = False

    @property
    def is_open(self) -> bool:
        """Whether the weight is above 0. The device is asked only if the weight was written since the last time."""
        version = (self.weight.data_ptr(), self.weight._version)
        if version != self._read_version:
            self._read_version, self._was_open = version, bool(self.weight > 0)
        return self._was_open

    @property
    def is_measured(self) -> bool:
        """Whether everything that the mode compares was measured; asks the device."""
        return self.mode == "none" or all(bool(scores[1] >= 0) for scores in self._compared)

    def is_due(self, run: int, interval: int) -> bool:
        """
        Whether training rows are to be measured: first after a few steps of the teacher, then at intervals.

        Args:
            run: number of this run of the teacher, 1 or more.
            interval: number of runs between measurements.
        """
        first = min(FIRST_MEASUREMENT, interval)
        return self.mode != "none" and run >= first and (run - first) % interval == 0

    def is_of_use(self, rows: set[str], run: int | None, is_due: bool) -> bool:
        """
        Whether a measurement is of use: one that is not due must have rows that the last one lacked.

        Args:
            rows: those that it has, "labeled" and "unlabeled".
            run: number of the teacher's run; None: unknown.
            is_due: whether it is due at the interval. A batch may have several measurements, one for each call.
        """
        if is_due and (run is None or run != self._measured_run):
            self.missing = {"labeled", "unlabeled"} if self.expects_labels else {"unlabeled"}
            self._measured_run, self._num_tries = run or 0, 0
        is_of_use = is_due or not self.missing.isdisjoint(rows)
        self.missing -= rows
        self._num_tries += not is_of_use
        if self._num_tries == MOST_TRIES:
            self.missing = set()
        return is_of_use

    def get_extra_state(self) -> Tensor:
        """What decides, on the host, when to measure."""
        missing = ["labeled" in self.missing, "unlabeled" in self.missing]
        return torch.tensor(
            [*missing, self.expects_labels, self.saw_logits, self._measured_run, self._num_tries], dtype=torch.long
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        *flags, self._measured_run, self._num_tries = state.tolist()
        self.missing = {kind for kind, is_missing in zip(("labeled", "unlabeled"), flags) if is_missing}
        self.expects_labels, self.saw_logits = bool(flags[2]), bool(flags[3])

    def update(self, student_dice: float | Tensor, teacher_dice: float | Tensor) -> None:
        """Take both results of a validation; ignore them if one is not finite (nothing to compare)."""
        scores = self.validation_scores
        new = torch.stack([torch.as_tensor(d, dtype=torch.float32).to(scores) for d in (student_dice, teacher_dice)])
        self._take(scores, new)

    def _take(self, scores: Tensor, new: Tensor) -> None:
        """Replace `scores` by finite results, and set the weight."""
        scores.copy_(torch.where(torch.isfinite(new).all(), new, scores))
        self._set_weight()

    def _set_weight(self) -> None:
        """Set the weight to that of the scores."""
        if self.mode == "none":
            self.weight.fill_(1)
        else:
            factors = [self._labeled_factor(), *(self._factor(scores) for scores in self._compared)]
            self.weight.copy_(torch.stack(factors).prod())

    def _labeled_factor(self) -> Tensor:
        """How good the teacher is on labeled rows, beside the student and alone."""
        student, teacher = self.labeled_scores
        beside_student = torch.where(student > 0, torch.clamp(4 * teacher / student - 2, 0, 1), 1)
        alone = torch.clamp((teacher - LEAST_DICE) / (ENOUGH_DICE - LEAST_DICE), 0, 1)
        return torch.where(teacher >= 0, beside_student * alone, 1)

    @property
    def _compared(self) -> list[Tensor]:
        """The scores that the mode compares."""
        return [self.agreement_scores] + [self.validation_scores] * (self.mode == "validation")

    def _factor(self, scores: Tensor) -> Tensor:
        """0 if the teacher finds nothing, or nothing was measured, which scores of -1 mean."""
        student, teacher = scores
        lead = teacher - student
        factor = lead / (1 - student).clamp(min=1e-6) if self.must_lead else 1 + lead / self.tolerance
        return torch.clamp(factor, 0, 1) * (teacher > 0)

    @torch.no_grad()
    def measure_agreement(
        self,
        student: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor, Tensor], Tensor],
        image: Tensor,
        turn: int,
        is_counted: bool = True,
        sam_image: Tensor | None = None,
        labeled: LabeledImages | None = None,
        sliced_axes: Sequence[int] = (),
    ) -> None:
        """
        Measure "agreement" on unlabeled images once, and Dice on labeled ones.

        Args:
            student: ``f(image) -> logits`` (B, C, *spatial), in eval mode.
            teacher: ``f(image, student_logits) -> logits``.
            image: (B, channels, *spatial), rows from which the teacher does not learn; any rows if not `is_counted`.
            turn: any integer, selects a flip, or a rotation in a square plane.
            is_counted: whether agreement is measured on `image`; a rank without such rows still joins the others.
            sam_image: (B, channels of the teacher, *spatial), what the teacher sees instead of `image`; None: `image`.
            labeled: rows with a label that the student may see.
            sliced_axes: spatial axes (-3..-1) of which a teacher of volumes sees slices; a rotation never turns one of
                them into another axis.
        """
        turns = _turns(image, sliced_axes)
        there, back = turns[turn % len(turns)]
        sam_image = image if sam_image is None else sam_image
        agreement = self._agreement(student, teacher, image, there, back, sam_image) if is_counted else None
        truth = None if labeled is None else self._truth(student, teacher, labeled)
        if agreement is None and truth is None:  # another rank has rows; this one's tell the number of classes
            agreement = 0 * self._agreement(student, teacher, image, there, back, sam_image)
        known = agreement if truth is None else truth
        counts = torch.stack([torch.zeros_like(known) if part is None else part for part in (agreement, truth)])
        if ranks.is_distributed():
            torch.distributed.all_reduce(counts)
        agreement, truth = counts
        total = agreement[:, 1]
        self.num_measured.add_((total > 0).any())
        # a class that only the other model finds counts too: who finds nothing must not agree perfectly
        agreement = torch.stack([agreement[:, 0], torch.where(total > 0, total, total.flip(0))], dim=1)
        self.labeled_counts = self._added(self.labeled_counts, truth)
        self.agreement_counts = self._added(self.agreement_counts, agreement)
        self._take(self.labeled_scores, _dice(self.labeled_counts))
        self._take(self.agreement_scores, _dice(self.agreement_counts))

    def _added(self, old: Tensor, new: Tensor) -> Tensor:
        """
        Old counts, partly forgotten, plus new ones (2, 2, C). Returns (2, 3, C), with the largest recent total.

        Measurements of a class count alike, whatever its size: otherwise a class that a young student finds everywhere
        would count for hundreds of steps. But those with less than a tenth of the largest, such as a few false pixels
        in images without a rare structure, count less. The first ones are forgotten sooner.
        """
        num_new, is_first = new[:, 1].sum(0), old.shape[2] != new.shape[2]
        is_early = self.num_measured <= FIRST_ONES
        peak_momentum = torch.where(is_early, FIRST_PEAK_MOMENTUM, PEAK_MOMENTUM)
        momentum = torch.where(is_early, min(FIRST_MOMENTUM, self.momentum), self.momentum)
        peak = num_new if is_first else torch.maximum(peak_momentum * old[0, 2], num_new)
        weight = torch.where(num_new > 0, (num_new / (SMALL * peak)).clamp(max=1) ** 3, 0)
        kept = 0 if is_first else old[:, :2] * momentum**weight
        return torch.cat([kept + new * weight / num_new.clamp(min=1), peak.expand(2, 1, -1)], dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("agreement_counts", "labeled_counts"):
            if prefix + name in state_dict:
                setattr(self, name, self.weight.new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_weight()  # the state may be that of another mode

    def _agreement(
        self,
        student: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor, Tensor], Tensor],
        image: Tensor,
        there: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        sam_image: Tensor,
    ) -> Tensor:
        """Common and total pixels, (2, 2, C), of what student and teacher find in images and in turned images."""
        student_logits, turned_logits = student(image), student(there(image))
        pairs = (
            (student_logits, back(turned_logits)),
            (teacher(sam_image, student_logits), back(teacher(there(sam_image), turned_logits))),
        )
        return torch.stack([torch.stack(self._counts(*pair)) for pair in pairs])

    def _truth(
        self, student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor, Tensor], Tensor], labeled: LabeledImages
    ) -> Tensor:
        """The same for what both find in labeled images, compared with the labels."""
        student_logits = student(labeled.image)
        both = (student_logits, teacher(labeled.sam_image, student_logits))
        return torch.stack([torch.stack(self._true_counts(logits, labeled)) for logits in both])

    def _counts(self, logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """For each region or foreground class, the pixels that both maps share and the pixels of both together."""
        if self._is_sigmoid(logits):
            return _region_counts(logits, other)
        return _class_counts(_labels(logits), _labels(other), logits.shape[1])

    def _true_counts(self, logits: Tensor, labeled: LabeledImages) -> tuple[Tensor, Tensor]:
        """The same for a model's map and the label; a pixel that has no class or is ignored is background in both."""
        label, is_sigmoid = labeled.label, self._is_sigmoid(logits)
        is_counted = (label >= 0) & (label <= (1 if is_sigmoid else logits.shape[1] - 1))
        if labeled.ignore_index is not None:
            is_counted &= label != labeled.ignore_index
        logits, label = logits.masked_fill(~is_counted, torch.nan), label.masked_fill(~is_counted, 0)
        if is_sigmoid:
            return _region_counts(logits, 2.0 * label - 1)
        return _class_counts(_labels(logits), label[:, 0].long(), logits.shape[1])

    def _is_sigmoid(self, logits: Tensor) -> bool:
        return self.overlapping or logits.shape[1] == 1


def _dice(counts: Tensor) -> Tensor:
    """Mean Dice of each model, (2,), from common and total pixels of each class, (2, 3, C); NaN without any pixel."""
    common, total, _ = counts.unbind(1)
    return torch.where(total > 0, 2 * common / total, torch.nan).nanmean(1)


def _turns(
    image: Tensor, sliced_axes: Sequence[int] = ()
) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Pairs (transform, inverse): flips along every set of spatial axes, quarter turns in square planes."""
    axes = range(-1, 1 - image.ndim, -1)
    flips = [partial(torch.flip, dims=dims) for count in range(1, len(axes) + 1) for dims in combinations(axes, count)]
    planes = [(b, a) for a, b in combinations(axes, 2) if image.shape[a] == image.shape[b]]
    planes = [(a, b) for a, b in planes if (a in sliced_axes) == (b in sliced_axes)]
    quarters = [(partial(torch.rot90, k=k, dims=p), partial(torch.rot90, k=-k, dims=p)) for p in planes for k in (1, 3)]
    return [(flip, flip) for flip in flips] + quarters


def _class_counts(labels: Tensor, others: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Common and total pixels of each foreground class, each (C - 1,), of two maps of class indices."""
    labels, others = labels.flatten(), others.flatten()
    common = torch.bincount(torch.where(labels == others, labels, 0), minlength=num_classes)
    total = torch.bincount(labels, minlength=num_classes) + torch.bincount(others, minlength=num_classes)
    return common[1:].float(), total[1:].float()


def _region_counts(logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Common and total pixels of each channel, each (C,); NaN and inf count as outside."""
    ours, theirs = ((x > 0) & (x < torch.inf) for x in (logits, other))
    common, total = (x.transpose(0, 1).flatten(1).sum(1).float() for x in (ours & theirs, ours.long() + theirs))
    return common, total


def _labels(logits: Tensor) -> Tensor:
    """Class of each pixel, (B, *spatial); background where a logit is NaN or inf, since argmax picks those."""
    return logits.argmax(1).masked_fill(~(logits < torch.inf).all(1), 0)
