"""SAM-induced knowledge distillation without an engine: the core that every way of attaching it uses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai import ranks
from knowsam_monai.distillation.attachment import Attachment
from knowsam_monai.distillation.gate import TeacherGate
from knowsam_monai.distillation.labeled_rows import Rows, labeled_slice, other_rows
from knowsam_monai.distillation.optimizer_hooks import FollowHandle, Scaler, call_after_step, follow
from knowsam_monai.distillation.wiring import Wiring
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.losses import DistillationLoss, dice_ce_loss
from knowsam_monai.losses.supervised import check_label
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.slice_selection import SliceSelection
from knowsam_monai.tensors import all_in_eval_mode, at_least_float32, unstack_views, without_meta

Teacher = Callable[[Tensor, Tensor], Tensor]


class Distillation(NamedTuple):
    """What one call of :class:`SAMDistiller` returns; `loss` is what a training loop adds to its own.

    Args:
        distillation_loss: weighted and gated, a scalar; its gradient reaches the student alone.
        sam_loss: a scalar, whose gradient reaches the teacher alone; 0 without labeled rows, and for a teacher that
            does not learn.
        teacher_logits: (B, C, *spatial), detached; with `slices` those of the slices alone, a thin volume.
        slices: the slices of each volume that both losses are about; None where they are about all there is.

    Example::

        >>> zero = torch.zeros(())
        >>> Distillation(distillation_loss=zero + 2, sam_loss=zero + 1, teacher_logits=zero).loss.item()
        3.0
    """

    distillation_loss: Tensor
    sam_loss: Tensor
    teacher_logits: Tensor
    slices: SliceSelection | None = None

    @property
    def loss(self) -> Tensor:
        """The sum of both losses."""
        return self.distillation_loss + self.sam_loss


class SAMDistiller(nn.Module):
    """
    A promptable teacher (SAM) that learns from the labeled rows of a batch and teaches a student on all rows.

    .. math::
        L_{kd} = w \\, g \\sum_{v} T^2 \\, KL(p_{sam}^T \\| p_v^T), \\qquad L_{sam} = CE + Dice(Y_{sam}, y)

    The sum runs over the taught views of the student, g is the teacher gate. The student's detached logits are the
    teacher's mask prompt. Only the labeled rows build a graph through the teacher.

    Measuring and asking the teacher leave the global random generators as they were: with `weight` 0 the student is,
    bit for bit, the one that was trained without a teacher. Nor has what a shut gate keeps out any influence, finite
    or not. A teacher of your own that draws at random needs its own generator: from the global ones it would draw the
    same numbers again and again.

    Args:
        teacher: ``teacher(image, prompt_logits) -> logits``, all (B, channels, *spatial), one row independent of the
            others, in eval mode throughout; :class:`knowsam_monai.teachers.SAMTeacher`, and for volumes
            :class:`knowsam_monai.teachers.SliceTeacher`, which may draw the slices that a step is about.
        optimizer: the teacher's own optimizer (the paper: Adam, 1e-4), which steps nothing of the student. With None,
            or one that steps no parameter of the teacher that requires a gradient, the teacher stays as it is: no
            labels are needed, and there is no SAM loss.
        distillation_loss: ``f(student_logits, teacher_logits)``; default
            :class:`knowsam_monai.losses.DistillationLoss`.
        sam_loss: ``f(teacher_logits, label)`` on the labeled rows; default CE + Dice, one channel as two classes.
            Where some pixels have no true label: ``dice_ce_loss(num_classes, ignore_index=255)``.
        prompt_view: which view of a multi-view student prompts the teacher (0, the fused one).
        taught_views: which views are taught; the paper teaches U-Net and V-Net, (1, 2), never the fused view.
            A plain network's logits are both, whatever these say.
        taught_rows: "all" (the paper), or "unlabeled": rows with labels have the truth to learn from. Where the SAM
            loss has an `ignore_index`, any row may have pixels without a label, and all are taught.
        gate: "none" (the paper: g = 1), "validation" or "agreement", see
            :class:`~knowsam_monai.distillation.TeacherGate`.
        gate_tolerance: how much worse (Dice, 0..1) than its student a teacher may be before g is 0.
        autocast_dtype: run the teacher under autocast of this type, on CPU too. None leaves the caller's autocast.

    Shape:
        image: (B, channels, *spatial). logits: (B, C, *spatial) or (B, V, C, *spatial). label: (B_l, 1, *spatial).

    Raises:
        ValueError: when an argument is not one of the above, class counts and rows do not agree, or every row has a
            label and nobody says that all are labeled.
        RuntimeError: when the distiller is called in training while it is attached to a student.

    Example::

        distiller = SAMDistiller(SAMTeacher(num_classes=4), optimizer)
        distiller.follow(student_optimizer)                       # once: the teacher steps when the student steps
        for image, label in loader:                               # B rows, of which the first B_l have labels
            logits = student(image)
            loss = supervised_loss(logits[: len(label)], label) + distiller(image, logits, label).loss

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 8 to 10. Temperature and T^2 as in the authors' code.
    """

    def __init__(
        self,
        teacher: nn.Module,
        optimizer: Optimizer | None = None,
        distillation_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        sam_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        prompt_view: int = 0,
        taught_views: Sequence[int] = (0,),
        taught_rows: str = "all",
        gate: str = "none",
        gate_tolerance: float = 0.1,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(taught_views) == 0:
            raise KnowSAMValueError("`taught_views` must name at least one view but is empty; remove SKD instead.")
        if taught_rows not in ("all", "unlabeled"):
            raise KnowSAMValueError(f"`taught_rows` must be 'all' or 'unlabeled' but is {taught_rows!r}.")
        if optimizer is not None:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not any(id(parameter) in stepped for parameter in teacher.parameters()):
                raise KnowSAMValueError(
                    "`optimizer` must step parameters of `teacher` but has none of them; build it from "
                    "`teacher.parameters()`, or give None for a teacher that stays as it is."
                )
        self.teacher = teacher.eval()
        self.optimizer = optimizer
        self.distillation_loss = DistillationLoss() if distillation_loss is None else distillation_loss
        self.sam_loss = sam_loss
        self.prompt_view = prompt_view
        self.taught_views = tuple(taught_views)
        self.taught_rows = taught_rows
        self.gate = TeacherGate(mode=gate, tolerance=gate_tolerance)
        self.autocast_dtype = autocast_dtype
        self.brought: dict[nn.Parameter, dict[int, Tensor]] = {}  # what each attachment, by its id, added to gradients
        self.wiring = Wiring()
        self._hear_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hear_steps()  # a copied optimizer has no hooks

    def _hear_steps(self) -> None:
        if self.optimizer is not None:
            handle = call_after_step(self.optimizer, self.wiring.stepped)
            weakref.finalize(self, handle.remove).atexit = False

    def train(self, mode: bool = True) -> SAMDistiller:
        """Set the mode of everything but the teacher, which makes targets and so stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @kept_random_state()
    def forward(
        self,
        image: Tensor,
        logits: Tensor,
        label: Tensor | None = None,
        labeled_rows: Rows = None,
        weight: float = 1.0,
        iteration: int | None = None,
    ) -> Distillation:
        """
        Args:
            image: (B, channels, *spatial), what the teacher sees: what the student saw, or the same before its
                intensities were augmented.
            logits: the student's raw output for it, (B, C, *spatial) or its stacked views.
            label: (B_l, 1, *spatial) class indices of the labeled rows, or of all rows with `labeled_rows` given.
            labeled_rows: which rows SAM learns from: an int n (the first n), a slice, or None: the first len(label).
                Where every row has a label it must be given, as hosts carry labels that they never show to their
                student; "all" takes all labels there are. A SAM loss with an `ignore_index` needs none.
            weight: factor of the distillation loss at this step.
            iteration: what a teacher that draws slices draws by; None: it counts its draws.
        """
        if self.training:
            self.wiring.check_once(logits)
        image, logits = without_meta(image), without_meta(logits)
        views = unstack_views(logits, image)
        prompt_logits = _view(views, self.prompt_view).detach()
        taught = list(dict.fromkeys(_view(views, v) for v in self.taught_views))  # each view once
        self._check_shapes(image, prompt_logits)
        rows = labeled_slice(labeled_rows, label, len(image))
        learns = self.learns
        if len(range(len(image))[rows]) == 0 or not learns:
            label = None
        if label is not None:
            label = without_meta(label)
            label = label[rows] if len(label) == len(image) else label
            check_label(prompt_logits[rows], label, self.ignore_index)
            if labeled_rows is None:
                self._check_not_all(label, len(image))
        if self.training:
            self.wiring.called(self, image, _view(views, self.prompt_view), label is not None)

        teacher, slices = self._draw_slices(prompt_logits, iteration)
        if slices is not None:
            image, prompt_logits = slices.take(image), slices.take(prompt_logits)
            taught = [slices.take(view) for view in taught]
            label = label if label is None else slices.take(label, rows)
        teacher_logits, labeled_logits = self._teach(teacher, image, prompt_logits, rows, learns)

        sam_loss = prompt_logits.new_zeros((), dtype=torch.float32)
        if label is not None:
            sam_loss = self._sam_loss(labeled_logits, label)
        target = teacher_logits
        if self.taught_rows == "unlabeled" and self.ignore_index is None:
            rest = other_rows(rows, len(image))
            target, taught = target[rest], [view[rest] for view in taught]
        distillation_loss = sam_loss.new_zeros(())
        if len(target) == 0:
            self.wiring.warn(
                "no row is taught: all of this batch have labels and `taught_rows` is 'unlabeled'; say with "
                "`labeled_rows` or `select` which rows have them."
            )
        elif weight != 0:
            # what a shut gate keeps out may not be finite, and 0 times that is not 0
            target = target if self.gate.mode == "none" else torch.where(self.gate.weight > 0, target, 0)
            kd_terms = [self.distillation_loss(view, target) for view in taught]
            distillation_loss = self.gate.weight * weight * torch.stack(kd_terms).sum()
        return Distillation(distillation_loss, sam_loss, teacher_logits, slices)

    @kept_random_state()
    def measure_agreement(
        self,
        student: Callable[[Tensor], Tensor],
        image: Tensor,
        label: Tensor | None = None,
        labeled_rows: Rows = None,
        turn: int = 0,
        sam_image: Tensor | None = None,
    ) -> None:
        """
        One measurement of the "agreement" gate, on the rows that the teacher does not learn from, if there are any.

        Those are rows without a label, and rows whose label has pixels of the SAM loss's `ignore_index`.

        Args:
            student: ``f(image) -> logits`` or stacked views; a network is in eval mode meanwhile.
            image: (B, channels, *spatial), what the student sees.
            label, labeled_rows: as in :meth:`forward`.
            turn: which flip or turn to compare with, any integer.
            sam_image: what the teacher sees, row for row; None: `image`.
        """
        self.wiring.asked = True
        image = without_meta(image)
        sam_image = image if sam_image is None else without_meta(sam_image)
        rows = labeled_slice(labeled_rows, label, len(image)) if self.learns else slice(0, 0)
        all_rows = torch.arange(len(image), device=image.device)
        judging = all_rows[other_rows(rows, len(image))]
        if len(judging) == 0 and label is not None and self.ignore_index is not None:
            has_holes = (without_meta(label) == self.ignore_index).flatten(1).any(1)
            judging = all_rows[rows][has_holes]
        counts = len(judging) > 0
        if not counts and self.ignore_index is None:
            self.wiring.warn(
                "the gate 'agreement' was not measured: all rows of this batch have labels; say with `labeled_rows` or "
                "`select` which rows have them."
            )
        if counts or ranks.is_distributed():
            with all_in_eval_mode(student) if isinstance(student, nn.Module) else nullcontext():
                self.gate.measure_agreement(
                    lambda x: _view(unstack_views(student(x), x), self.prompt_view),
                    self.ask_teacher,
                    image[judging] if counts else image[:1],
                    turn,
                    counts,
                    sam_image[judging] if counts else sam_image[:1],
                )

    @kept_random_state()
    @torch.no_grad()
    def ask_teacher(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        """The teacher's logits (B, C, *spatial) of whole images or volumes, as it teaches them, without a graph."""
        with self._autocast(image.device.type):
            return self.teacher(image, prompt_logits)

    @property
    def learns(self) -> bool:
        """Whether the optimizer steps a parameter of the teacher that requires a gradient."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        return any(parameter.requires_grad and id(parameter) in stepped for parameter in self.teacher.parameters())

    @property
    def ignore_index(self) -> int | None:
        """The label value by which the SAM loss knows a pixel without a label; None where it knows none."""
        index = getattr(self.sam_loss, "ignore_index", None)
        is_default_of_torch = index == -100 and isinstance(self.sam_loss, nn.modules.loss._Loss)
        return None if is_default_of_torch else index

    def _draw_slices(self, prompt_logits: Tensor, iteration: int | None) -> tuple[Teacher, SliceSelection | None]:
        """The slices of each volume that this step is about, and the teacher of these; None: all there is."""
        draw = getattr(self.teacher, "draw_slices", None)
        slices = None if draw is None else draw(prompt_logits, iteration)
        return (self.teacher, None) if slices is None else (partial(self.teacher, axes=slices.axis), slices)

    def _teach(
        self, teacher: Teacher, image: Tensor, prompt_logits: Tensor, rows: slice, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """Teacher logits of all rows (detached) and of the labeled rows (with the graph SAM's loss needs)."""
        labeled = range(len(image))[rows]
        with self._autocast(image.device.type):
            if not (learns and self.training and torch.is_grad_enabled() and len(labeled) > 0):
                with torch.no_grad():
                    logits = teacher(image, prompt_logits)
                return logits, logits[rows]
            labeled_logits = teacher(image[rows], prompt_logits[rows])
            logits = torch.empty_like(prompt_logits, dtype=labeled_logits.dtype)
            logits[rows] = labeled_logits.detach()
            rest = other_rows(rows, len(image))
            if len(labeled) < len(image):
                with torch.no_grad():
                    logits[rest] = teacher(image[rest], prompt_logits[rest])
        return logits, labeled_logits

    def _autocast(self, device_type: str) -> AbstractContextManager:
        """That of `autocast_dtype`; without one the caller's stays as it is."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device_type, dtype=self.autocast_dtype)

    def _sam_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = dice_ce_loss(logits.shape[1]) if self.sam_loss is None else self.sam_loss
        check_label(logits, label, self.ignore_index)
        logits = at_least_float32(logits)
        label = label.to(logits.dtype) if logits.shape[1] == 1 else label  # MONAI's Dice of a sigmoid takes floats
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits, label)

    def _check_not_all(self, label: Tensor, num_rows: int) -> None:
        """Labels of rows that are unlabeled to the student must not leak to it by way of SAM."""
        learns = self.training and torch.is_grad_enabled() and self.optimizer is not None
        if learns and len(label) == num_rows and self.ignore_index is None:
            raise KnowSAMValueError(
                f"`label` must be of the labeled rows alone but is of all {num_rows}, so that SAM would learn labels "
                "which the student may not see; give `labeled_rows`, how many rows come with their labels to the "
                'student, or "all" if all do.'
            )

    def _check_shapes(self, image: Tensor, prompt_logits: Tensor) -> None:
        if len(image) != len(prompt_logits) or image.shape[2:] != prompt_logits.shape[2:]:
            raise KnowSAMValueError(
                f"`image` must have the rows and the size of `logits`, {tuple(prompt_logits.shape)}, but has shape "
                f"{tuple(image.shape)}; give the images that the student's logits are of."
            )
        num_classes = getattr(self.teacher, "num_classes", prompt_logits.shape[1])
        if prompt_logits.shape[1] != num_classes:
            raise KnowSAMValueError(
                f"`logits` must have {num_classes} channels, the teacher's classes, but have shape "
                f"{tuple(prompt_logits.shape)}; give student and teacher the same number of classes."
            )

    def follow(self, optimizer: Optimizer, scaler: Scaler = None) -> FollowHandle:
        """
        Let the teacher's optimizer follow the student's: it steps after each step, its gradients are cleared with it.

        A step that the scaler skips, accumulation and its flush are thereby right without a word about them. In a
        distributed run every process starts with the first one's teacher and steps with the mean of all gradients: move
        the distiller to its device before.

        Args:
            optimizer: the student's.
            scaler: the scaler that steps the student, or a callable that returns it (or None) at the time of the step.
                Hooks cannot see loss scaling, so pass it explicitly.

        Returns:
            A handle; ``handle.remove()`` leaves the student's optimizer as it was, and so does deleting the distiller.

        Raises:
            RuntimeError: when the teacher has no optimizer.
            ValueError: when `optimizer` is the teacher's own, or both step the same parameters.
        """
        if self.optimizer is None:
            raise KnowSAMRuntimeError(
                "`optimizer` of the distiller must be the teacher's but is None: nothing can follow."
            )
        handle = follow(self.optimizer, optimizer, scaler)
        weakref.finalize(self, handle.remove).atexit = False
        return handle

    def attach(self, student: nn.Module, optimizer: Optimizer, **options: Any) -> Attachment:
        """
        Teach a student that is trained by code which can't be edited.

        Args:
            student: the module that the code calls.
            optimizer: the student's.
            **options: `scaler`, `accumulation_steps`, `labeled_rows`, `select` and the others of
                :class:`knowsam_monai.distillation.Attachment`.

        Returns:
            An attachment: the code is given ``attachment.watch(loader)``; ``attachment.remove()`` undoes it all.
        """
        return Attachment(self, student, optimizer, **options)


def _view(views: Sequence[Tensor], index: int) -> Tensor:
    """The named view of a multi-view student; a plain network's logits are all its views."""
    if len(views) == 1:
        return views[0]
    if not -len(views) <= index < len(views):
        raise KnowSAMValueError(
            f"`taught_views` and `prompt_view` must be below {len(views)}, the student's views, but one is {index}."
        )
    return views[index]
