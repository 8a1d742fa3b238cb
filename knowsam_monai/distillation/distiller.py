"""SAM-induced knowledge distillation (SKD) without an engine, the core of every way to attach it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai import ranks
from knowsam_monai.arguments import check_types
from knowsam_monai.distillation.attachment import Attachment
from knowsam_monai.distillation.gate import TeacherGate
from knowsam_monai.distillation.gradients import SAMGradients
from knowsam_monai.distillation.inputs import check_output, check_shapes, check_teacher_arguments, view_at
from knowsam_monai.distillation.measurement import measure_gate
from knowsam_monai.distillation.optimizer_hooks import FollowHandle, Scaler, call_after_step, follow
from knowsam_monai.distillation.wiring import Wiring
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError, check_choice
from knowsam_monai.labeled_rows import (
    Rows,
    knows_labels,
    labeled_slice,
    other_rows,
    put_rows,
    take_rows,
)
from knowsam_monai.losses import DistillationLoss, dice_ce_loss
from knowsam_monai.losses.regions import region_loss
from knowsam_monai.losses.supervised import ADD_A_CHANNEL, check_label, loss_of
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.slice_selection import SliceSelection
from knowsam_monai.tensors import (
    at_least_float32,
    check_tensor,
    class_logits,
    class_numbers,
    in_precision_of,
    unstack_views,
    without_meta,
)
from knowsam_monai.wrappers import plain_optimizer, stepped_parameters

Teacher = Callable[[Tensor, Tensor], Tensor]


class Distillation(NamedTuple):
    """The result of one call of :class:`SAMDistiller`; a training loop adds `loss` to its own.

    Args:
        distillation_loss: weighted and gated, a scalar; its gradient reaches the student only.
        sam_loss: a scalar; its gradient reaches the teacher only. 0 without labeled rows, and for a teacher that does
            not learn.
        teacher_logits: (B, C, *spatial), detached; with `slices`, a thin volume of these slices. NaN in rows that the
            teacher did not process because nothing reads them.
        slices: the slices of each volume that both losses use; None if both losses use every slice.

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


class _Inputs(NamedTuple):
    """What a step uses: the image and the prompt, detached; the taught views; the label of the labeled rows, if any."""

    image: Tensor
    prompt_logits: Tensor
    taught: list[Tensor]
    label: Tensor | None
    rows: slice


class SAMDistiller(nn.Module):
    """
    A promptable teacher (SAM) that learns from the labeled rows of a batch and teaches a student on all rows.

    .. math::
        L_{kd} = w \\, g \\sum_{v} T^2 \\, KL(p_{sam}^T \\| p_v^T), \\qquad L_{sam} = CE + Dice(Y_{sam}, y)

    The sum runs over the taught views of the student; g is the teacher gate. The student's detached logits are the
    teacher's mask prompt. Only the labeled rows build a graph through the teacher. It processes only the rows that a
    loss reads: with `weight` 0 or while the gate is 0, these are the labeled rows, or none if it does not learn.

    Every call restores the global random generators: with `weight` 0, or while the gate is 0, the student is, bit for
    bit, the one trained without a teacher, even if the teacher's output is not finite. (On a GPU, as far as torch's own
    operations are deterministic. One exception: if both optimizers share a GradScaler, an overflow of SAM's gradients
    lowers the student's scale too.) A custom teacher that draws random numbers needs its own generator, since
    from the global ones it would draw the same numbers at every call.

    Args:
        teacher: ``teacher(image, prompt_logits) -> logits``, all (B, channels, *spatial), always in eval mode,
            each row independent of the others; :class:`knowsam_monai.teachers.SAMTeacher`, or for volumes
            :class:`knowsam_monai.teachers.SliceTeacher`, which can draw a few slices for each step.
        optimizer: the teacher's own optimizer (the paper: Adam, 1e-4), separate from the student's. With None, or if
            it steps no trainable parameter of the teacher, the teacher does not learn: no labels are needed, and there
            is no SAM loss.
        distillation_loss: ``f(student_logits, teacher_logits)``, of which the mean is used; default
            :class:`knowsam_monai.losses.DistillationLoss`.
        sam_loss: ``f(teacher_logits, label)`` on the labeled rows, of which the mean is used; default CE + Dice, one
            channel as two classes. If some pixels have no true label: ``dice_ce_loss(num_classes, ignore_index=255)``,
            or a loss of your own with an attribute `ignore_index`.
        prompt_view: which view of a multi-view student prompts the teacher (0, the fused one).
        taught_views: the views that learn; the paper teaches U-Net and V-Net, (1, 2), not the fused view. With a plain
            network, its logits are the prompt and are taught.
        taught_rows: "all" (the paper) or "unlabeled", since labeled rows already learn from their labels. If the SAM
            loss has an `ignore_index`, any row may have unlabeled pixels, so all rows are taught.
        gate: "agreement", "validation" or "none" (the paper: g = 1), see
            :class:`~knowsam_monai.distillation.TeacherGate`. The default is "agreement": it needs no
            evaluator, and is 0 for a teacher that is clearly worse than its student, or that does not learn and is not
            better than its student.
        gate_tolerance: by how much (Dice, 0..1) a teacher that learns may be worse than its student before g is 0.
        autocast_dtype: run the teacher under autocast with this dtype, also on the CPU. None: the caller's autocast.
        overlapping: the C channels are regions that may overlap, each with a sigmoid and a label channel of its own,
            as in BraTS. Both losses and the gate treat them as C binary problems: they get one channel at a time, and
            the mean is used, see :func:`knowsam_monai.losses.region_loss`.

    Shape:
        image: (B, channels, *spatial). logits: (B, C, *spatial) or (B, V, C, *spatial). label: (B_l, 1, *spatial), or
        0 and 1 (B_l, C, *spatial) if `overlapping`.

    Raises:
        ValueError: if an argument is not as described, class counts or rows disagree, or every row has a label but
            `labeled_rows` is None.
        RuntimeError: if the distiller is called in training while it is attached to a student.

    Example::

        teacher = SAMTeacher(num_classes=4, checkpoint="sam_vit_b_01ec64.pth")
        optimizer = torch.optim.Adam((p for p in teacher.parameters() if p.requires_grad), lr=1e-4)
        distiller = SAMDistiller(teacher, optimizer)
        distiller.follow(student_optimizer)               # once: the teacher steps after the student
        for step, (image, label) in enumerate(batches, start=1):   # of all epochs; the first B_l of B rows have labels
            distiller.measure_if_due(step, 50, student, image, label)   # the gate, at step 10, 60, 110 ...
            logits = student(image)
            loss = supervised_loss(logits[: len(label)], label) + distiller(image, logits, label).loss

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 8 to 10. The factor T^2 is that of the authors' code.
    """

    @check_types
    def __init__(
        self,
        teacher: nn.Module,
        optimizer: Optimizer | None = None,
        distillation_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        sam_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        prompt_view: int = 0,
        taught_views: Sequence[int] = (0,),
        taught_rows: str = "all",
        gate: str = "agreement",
        gate_tolerance: float = 0.1,
        autocast_dtype: torch.dtype | None = None,
        overlapping: bool = False,
    ) -> None:
        super().__init__()
        if len(taught_views) == 0:
            raise KnowSAMValueError("`taught_views` must name at least one view but is empty; remove SKD instead.")
        check_choice("taught_rows", taught_rows, ("all", "unlabeled"))
        check_teacher_arguments(teacher, optimizer, overlapping)
        self.teacher = teacher.eval()
        self.optimizer = None if optimizer is None else plain_optimizer(optimizer)
        self.distillation_loss = DistillationLoss() if distillation_loss is None else distillation_loss
        self.sam_loss = sam_loss
        self.prompt_view = prompt_view
        self.taught_views = tuple(taught_views)
        self.taught_rows = taught_rows
        self.overlapping = overlapping
        self.gate = TeacherGate(gate, gate_tolerance, overlapping=overlapping, must_lead=not self.learns)
        self.autocast_dtype = autocast_dtype
        self.gradients = SAMGradients()
        self.wiring = Wiring()
        self._watch_optimizer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_optimizer()  # a copied optimizer has no hooks

    def _watch_optimizer(self) -> None:
        if self.optimizer is not None:
            handle = call_after_step(self.optimizer, self.wiring.teacher_stepped)
            weakref.finalize(self, handle.remove).atexit = False

    def train(self, mode: bool = True) -> SAMDistiller:
        """Set the mode of all parts except the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def move(self, device: torch.device) -> SAMDistiller:
        """Move all parts to a device, and the state of the optimizer too, which `to` leaves where it was loaded."""
        self.to(device)
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            counts_there = group.get("capturable") or group.get("fused")  # else the number of steps is on the host
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and (name != "step" or counts_there):
                        state[name] = value.to(parameter.device)
        return self

    def join(self, device: torch.device) -> None:
        """Move to the student's device, if not there yet."""
        if self.gate.weight.device != device:
            self.move(device)

    @kept_random_state()
    def forward(
        self,
        image: Tensor,
        logits: Tensor,
        label: Tensor | None = None,
        labeled_rows: Rows = None,
        weight: float = 1.0,
        iteration: int | None = None,
        also_read: Collection[str] = (),
    ) -> Distillation:
        """
        Args:
            image: (B, channels, *spatial), what the teacher sees: the student's image, or the same before intensity
                augmentation.
            logits: the student's logits for it, (B, C, *spatial) or stacked views.
            label: (B_l, 1, *spatial) class indices of the labeled rows, or of all rows with `labeled_rows` given; 0
                and 1 (B_l, C, *spatial) if `overlapping`.
            labeled_rows: the rows from which SAM learns: an int n (the first n), a slice, or "all". None: the first
                ``len(label)`` rows. If every row has a label it is required, since some hosts carry labels that the
                student must not see, unless the SAM loss has an `ignore_index`.
            weight: factor of the distillation loss at this step.
            iteration: determines the slices that a teacher draws; None: it counts its draws.
            also_read: rows of `teacher_logits` that the caller reads: "labeled", "unlabeled", both or none.
        """
        if not isinstance(weight, (Real, Tensor)) or not 0 <= weight < torch.inf:
            raise KnowSAMValueError(f"`weight` must be a number, 0 or more, but is {weight!r}.")
        for kind in also_read:
            check_choice("also_read", kind, ("labeled", "unlabeled"))
        image, prompt_logits, taught, label, rows = self._checked(image, logits, label, labeled_rows)
        teacher, slices = self._draw_slices(prompt_logits, iteration)
        if slices is not None:
            image, prompt_logits = slices.take(image), slices.take(prompt_logits)
            taught = [slices.take(view) for view in taught]
            label = label if label is None else slices.take(label, rows)

        is_teaching = weight != 0 and self.gate.is_open
        teaches_labeled = self.taught_rows == "all" or self.ignore_index is not None
        reads = {
            "labeled": "labeled" in also_read or label is not None or (is_teaching and teaches_labeled),
            "unlabeled": "unlabeled" in also_read or is_teaching,
        }
        teacher_logits, labeled_logits = self._teach(teacher, image, prompt_logits, rows, label is not None, **reads)

        sam_loss = prompt_logits.new_zeros((), dtype=torch.float32)
        if label is not None:
            sam_loss = self._sam_loss(labeled_logits, label)
            if self.training:
                self.wiring.watch_loss(sam_loss)
        target = teacher_logits
        if not teaches_labeled:
            rest = other_rows(rows, len(image))
            target, *taught = (take_rows(x, rest) for x in (target, *taught))
        self.wiring.count_taught(len(target))
        distillation_loss = sam_loss.new_zeros(())
        if len(target) > 0 and is_teaching:
            distillation_loss = self.gate.weight * weight * self._distillation_loss(taught, target)
        elif len(target) > 0 and weight != 0:  # 0, but with a graph: the same parameters have a gradient
            distillation_loss = torch.stack([at_least_float32(view[:0]).sum() for view in taught]).sum()
        return Distillation(distillation_loss, sam_loss, teacher_logits, slices)

    def _checked(self, image: Tensor, logits: Tensor, label: Tensor | None, labeled_rows: Rows) -> _Inputs:
        check_tensor("image", image)
        remedy = "pick them from the student's output, as in `output[0]`"
        views = unstack_views(without_meta(logits), image, "logits", remedy)
        if self.training:
            self.wiring.check_once(logits)
        image = without_meta(image).detach()
        view = view_at(views, self.prompt_view)
        prompt_logits = view.detach()
        self.join(prompt_logits.device)
        taught = list(dict.fromkeys(view_at(views, v) for v in self.taught_views))  # each view once
        check_shapes(self.teacher, image, prompt_logits)
        rows = labeled_slice(labeled_rows, label, len(image))
        self.gate.expects_labels |= knows_labels(label, labeled_rows, rows, len(image), self.ignore_index)
        if len(range(len(image))[rows]) == 0 or not self.learns:
            label = None
        if label is not None:
            check_tensor("label", label)
            label = class_numbers(label)
            label = label[rows] if len(label) == len(image) else label
            remedy = ADD_A_CHANNEL + (", or return it so from `select`" if self.wiring.attachments else "")
            check_label(prompt_logits[rows], label, self.ignore_index, self.overlapping, remedy)
            is_learning = self.training and torch.is_grad_enabled()
            if is_learning and labeled_rows is None and len(label) == len(image) and self.ignore_index is None:
                raise KnowSAMValueError(
                    f"`label` must have the labeled rows only but has all {len(image)}, so SAM could learn labels that "
                    "the student must not see; pass `labeled_rows`, the number of rows whose labels the student sees, "
                    'or "all".'
                )
        if self.training:
            self.wiring.count_call(self, image, view, label is not None)
        else:
            self.wiring.count_in_eval_mode(view, label is not None)
        return _Inputs(image, prompt_logits, taught, label, rows)

    @check_types
    def measure_agreement(
        self,
        student: Callable[[Tensor], Tensor],
        image: Tensor,
        label: Tensor | None = None,
        labeled_rows: Rows = None,
        turn: int = 0,
        sam_image: Tensor | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """
        Measure the gate once on rows of training: Dice on the labeled rows, agreement on the rows from which the
        teacher does not learn.

        The latter are the rows without a label. If there are none, they are all rows if the teacher does not learn, and
        if the SAM loss has an `ignore_index` the rows with ignored pixels.

        Args:
            student: ``f(image) -> logits`` or stacked views. A network is put in eval mode for the call; a function
                must do that itself, or its dropout and batch normalization are those of training.
            image: (B, channels, *spatial), what the student sees.
            label, labeled_rows: as in :meth:`forward`.
            turn: any integer, selects a flip or rotation; increase it by 1 at each measurement.
            sam_image: what the teacher sees, row by row; None: `image`.
            logits_of: picks the logits from the student's output in train mode, such as ``operator.itemgetter(0)``. In
                eval mode the output may be the logits alone.
        """
        measure_gate(self, student, student, image, label, labeled_rows, turn, sam_image, logits_of)

    def measure_if_due(
        self,
        run: int,
        interval: int,
        network: nn.Module,
        image: Tensor,
        label: Tensor | None = None,
        labeled_rows: Rows = None,
        sam_image: Tensor | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
        student: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """
        Call :meth:`measure_agreement` if it is due: first after a few runs of the teacher, then at intervals, and soon
        again after a batch that had only labeled or only unlabeled rows.

        Args:
            run: number of this run of the teacher, 1 or more.
            interval: number of runs between measurements.
            network: the student's network, which is put in eval mode for the measurement.
            image, label, labeled_rows, sam_image, logits_of: as in :meth:`measure_agreement`.
            student: ``f(image)``, which calls the network; None: the network itself.
        """
        is_due = self.gate.is_due(run, interval)
        if is_due or (self.gate.missing and self.gate.mode != "none" and not ranks.is_distributed()):
            turn, student = run // interval, network if student is None else student
            measure_gate(self, network, student, image, label, labeled_rows, turn, sam_image, logits_of, run, is_due)

    @kept_random_state()
    @torch.no_grad()
    def ask_teacher(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        """The teacher's logits (B, C, *spatial) for whole images or volumes, without a graph."""
        with self._autocast(image.device.type):
            logits = self.teacher(*in_precision_of(self.teacher, image, prompt_logits))
        check_output(logits, prompt_logits, self.overlapping)
        return logits

    @property
    def learns(self) -> bool:
        """Whether the optimizer steps a parameter of the teacher that requires a gradient."""
        stepped = set(stepped_parameters(self.optimizer))
        return any(parameter.requires_grad and parameter in stepped for parameter in self.teacher.parameters())

    @property
    def ignore_index(self) -> int | None:
        """The label value of pixels that the SAM loss ignores; None if it ignores none."""
        index = getattr(self.sam_loss, "ignore_index", None)
        is_torch_default = index == -100 and isinstance(self.sam_loss, nn.modules.loss._Loss)
        return None if is_torch_default else index

    def _draw_slices(self, prompt_logits: Tensor, iteration: int | None) -> tuple[Teacher, SliceSelection | None]:
        """The teacher for this step, and the slices of each volume that it uses; None: all of them."""
        draw = getattr(self.teacher, "draw_slices", None)
        slices = None if draw is None else draw(prompt_logits, iteration)
        return (self.teacher, None) if slices is None else (partial(self.teacher, axes=slices.axis), slices)

    def _teach(
        self,
        teacher: Teacher,
        image: Tensor,
        prompt_logits: Tensor,
        rows: slice,
        learns: bool,
        labeled: bool,
        unlabeled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Teacher logits of all rows (detached, NaN in rows not read), and of the labeled rows, with SAM's graph."""
        builds_graph = learns and self.training and torch.is_grad_enabled()
        parts = [rows] if labeled else []
        parts += [other_rows(rows, len(image))] if unlabeled else []
        if len(parts) == 2 and not builds_graph:
            parts = [slice(None)]
        parts = [part for part in parts if len(take_rows(image, part)) > 0]
        outputs = []
        with self._autocast(image.device.type):
            for part in parts:
                given = in_precision_of(self.teacher, take_rows(image, part), take_rows(prompt_logits, part))
                with torch.set_grad_enabled(builds_graph and part is rows):
                    outputs.append(teacher(*given))
                check_output(outputs[-1], given[1], self.overlapping)
        if parts == [slice(None)]:
            return outputs[0].detach(), outputs[0][rows]
        like = outputs[0] if outputs else prompt_logits
        logits = like.new_full((len(image), *like.shape[1:]), torch.nan)
        for part, output in zip(parts, outputs):
            put_rows(logits, part, output.detach())
        return logits, outputs[0] if parts and parts[0] is rows else logits[rows]

    def _autocast(self, device_type: str) -> AbstractContextManager:
        """Autocast with `autocast_dtype`; without one, keep the caller's."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device_type, dtype=self.autocast_dtype)

    def _sam_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = dice_ce_loss(logits.shape[1]) if self.sam_loss is None else self.sam_loss
        check_label(logits, label, self.ignore_index, self.overlapping)
        logits = at_least_float32(logits)
        if logits.shape[1] == 1 or self.overlapping:
            label = label.to(logits.dtype)  # MONAI's Dice of a sigmoid takes floats
        with torch.autocast(logits.device.type, enabled=False):
            return self._mean_loss(loss, logits, label)

    def _distillation_loss(self, views: Sequence[Tensor], target: Tensor) -> Tensor:
        loss, target = self.distillation_loss, at_least_float32(target)
        with torch.autocast(target.device.type, enabled=False):
            views = [at_least_float32(view) for view in views]
            if views[0].shape[1] != target.shape[1]:  # one channel and the two classes of a softmax mean the same
                views, target = [class_logits(view) for view in views], class_logits(target)
            is_usable = ~(target.isnan() | (target == torch.inf)).flatten(1).any(1)
            self.wiring.watch_target(self, is_usable)
            is_usable = is_usable.reshape(-1, *[1] * (target.ndim - 1))
            # where SAM has broken down, the student's own row teaches nothing
            targets = [torch.where(is_usable, target, view.detach()) for view in views]
            return torch.stack([self._mean_loss(loss, *pair) for pair in zip(views, targets)]).sum()

    def _mean_loss(self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
        return region_loss(loss, logits, target) if self.overlapping else loss_of(loss, logits, target).mean()

    def follow(self, optimizer: Optimizer, scaler: Scaler = None, shared: bool = False) -> FollowHandle:
        """
        Make the teacher's optimizer step after each step of the student's; both clear their gradients together.

        This also handles skipped steps, gradient accumulation and its flush. The distiller moves to the device of the
        student's parameters. In a distributed run all processes start with the first one's teacher and step with the
        mean gradient.

        Args:
            optimizer: the student's.
            scaler: the scaler that steps the student, or a callable that returns it (or None) at the time of the step.
                Hooks cannot see loss scaling, so pass it explicitly.
            shared: whether a later call for this optimizer leaves this one alone, as for the attachments of several
                students with one optimizer. Otherwise it undoes this one.

        Returns:
            A handle; ``handle.remove()``, or deleting the distiller, leaves the student's optimizer as it was.

        Raises:
            RuntimeError: if the teacher has no optimizer.
            ValueError: if `optimizer` is the teacher's own, or both step the same parameters.
        """
        if self.optimizer is None:
            raise KnowSAMRuntimeError("SAMDistiller has no optimizer; pass the teacher's.")
        self.join(next((p.device for p in stepped_parameters(plain_optimizer(optimizer))), self.gate.weight.device))
        if ranks.is_distributed():
            _copy_from_first_rank(self.teacher)
        former = self.wiring.followed.pop(plain_optimizer(optimizer), None)
        if former is not None:  # as of a run that an exception ended, or before AMP was switched on
            former.remove()
        self.wiring.expects_no_scaler = scaler is None and self.wiring.expects_no_scaler is not False
        handle = follow(self.optimizer, optimizer, scaler, self.wiring.is_broken)
        weakref.finalize(self, handle.remove).atexit = False
        if not shared:
            self.wiring.followed[plain_optimizer(optimizer)] = handle
        return FollowHandle([handle.remove, self.wiring.follows_no_longer])

    def check_student(self, student: nn.Module) -> None:
        """
        Raise a ValueError if the teacher has parameters of the student, which a frozen teacher would freeze too.

        Args:
            student: the network that is taught.
        """
        shared = set(student.parameters()) & set(self.teacher.parameters())
        if shared:
            raise KnowSAMValueError(
                f"`teacher` must be a network of its own but shares {len(shared)} parameters with the student; give it "
                "a copy (`copy.deepcopy`)."
            )

    def attach(self, student: nn.Module, optimizer: Optimizer, **options: Any) -> Attachment:
        """
        Teach a student whose training step you cannot edit.

        Args:
            student: the module that the step calls.
            optimizer: the student's.
            **options: `scaler`, `accumulation_steps`, `labeled_rows`, `select` and the other arguments of
                :class:`knowsam_monai.distillation.Attachment`.

        Returns:
            An attachment. Pass ``attachment.watch(loader)`` to the training code in place of its loader;
            ``attachment.remove()`` undoes everything.
        """
        return Attachment(self, student, optimizer, **options)


@torch.no_grad()
def _copy_from_first_rank(module: nn.Module) -> None:
    """Processes may be seeded differently; DistributedDataParallel does the same for the student."""
    for tensor in (*module.parameters(), *module.buffers()):
        copy = tensor.detach().contiguous()
        torch.distributed.broadcast(copy, src=0)
        tensor.copy_(copy)
