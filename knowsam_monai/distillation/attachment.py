"""SKD for a trainer whose step can't be edited: hooks on the student add what the host's loss lacks."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai import ranks
from knowsam_monai.distillation.labeled_rows import Rows
from knowsam_monai.distillation.optimizer_hooks import Scaler, ScalerCheck, call_after_step, check_apart, scaler_now
from knowsam_monai.distillation.sam_image import check_orientations, is_cached, sam_image_for
from knowsam_monai.distillation.watched_loader import CurrentBatch, WatchedLoader, image_and_label
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.tensors import all_in_eval_mode, at_least_float32, without_meta
from knowsam_monai.wrappers import plain_network, plain_optimizer

logger = logging.getLogger(__name__)

UNTAUGHT_BATCHES = 50  # in a row, after which there must be a reason

Selection = tuple[Tensor, Tensor | None, "Rows"]


class Attachment:
    """
    SAM-induced knowledge distillation on a student that somebody else's code trains; nothing of that code changes.

    .. math:: \\nabla_z L \\leftarrow \\nabla_z L + \\frac{s}{k} \\nabla_z L_{kd}, \\qquad
        g_{sam} \\leftarrow g_{sam} + \\frac{s}{k} \\nabla_{sam} L_{sam}

    z are the student's logits, g the gradients of SAM's parameters, s the scaler's scale, k `accumulation_steps`. When
    the student is called in train mode the teacher runs at once, under the host's autocast, on a detached copy of the
    logits in float32 or better. Both gradients wait until the host's own backward comes to z: a forward that is never
    backpropagated teaches nobody. The teacher's optimizer follows the student's. Calls in eval mode or without a graph
    stay as they are.

    Labels come with the batch: the host iterates over ``watch(loader)`` instead of its loader, or something that runs
    before each step (a callback, an event) calls ``next_batch(batch)``. The student is called once for each batch, on
    the batch's own image; `select` says where it is not so.

    Keep the attachment, or the watched loader, which keeps it: when both are deleted, the hooks are removed.

    Args:
        distiller: the core, with teacher, optimizer and gate.
        student: the module that the host calls; where it is wrapped (DistributedDataParallel, torch.compile), the
            wrapper.
        optimizer: the student's.
        scaler: the GradScaler of the host's backward, or a callable that returns it (or None) at the time. Hooks cannot
            see loss scaling, so pass it explicitly.
        accumulation_steps: k, what the host divides its loss by; 1 where it adds up undivided. Hooks cannot see it
            either.
        select: ``f(batch, image) -> (sam_image, label, labeled_rows)``, or None for a call that is not taught. `batch`
            has its tensors on the device of `image`, which is what the student was called on; `sam_image` is what SAM
            sees of it, row for row; `label` is (B_l, 1, *spatial) or None; `labeled_rows` is as in
            :meth:`~knowsam_monai.distillation.SAMDistiller.forward`, and where it is None, as below. Several
            calls for a batch may be taught. Default: a batch is a mapping with "image", "label" (and "sam_image", see
            :class:`knowsam_monai.data.RandOrientationd`) or a pair (image, label).
        labeled_rows: rows whose labels SAM learns from: an int n (the first n), a slice, a callable of the batch (as
            the host took it) that returns one of these, or "all" labels there are. None: the first ``len(label)``,
            which must not be all rows.
        logits_of: picks the logits among the student's outputs, as ``operator.itemgetter(0)``; None: all it returns.
        weight: factor of the distillation loss, a number or a function of `iteration`.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. The teacher
            learns from the beginning, whatever it is.
        every: the teacher runs at every k-th iteration only, see :class:`knowsam_monai.handlers.SAMDistillation`.
        gate_interval: runs of the teacher between two measurements of the "agreement" gate.
        loader: a :class:`~knowsam_monai.distillation.WatchedLoader` that the host was given before there
            was an optimizer to attach with; it is watched from now on.

    Attributes:
        iteration: batches so far. Set it when a run goes on.
        terms: distillation_loss, sam_loss (where the teacher learns) and gate_weight of the last call that was taught,
            detached.

    Raises:
        ValueError: when an argument is none of the above, both optimizers step the same parameters, the student's input
            is not the image of the batch, or every row has a label and nobody says that all are labeled.
        RuntimeError: when the student has this teacher attached already; when it is called without a batch, or a second
            time for one without `select`; when its logits are backpropagated twice; when its optimizer steps and no
            backward came through them, or is stepped by a GradScaler although none was given.

    Example::

        skd = distiller.attach(student, optimizer)
        somebody_elses_training(student, optimizer, skd.watch(loader))
        skd.remove()

        loader = WatchedLoader(loader)                    # made before the optimizer
        skd = distiller.attach(student, optimizer, loader=loader)

        def select(batch, image):                         # SSL4MIS: labels (B, H, W) for every row, and a labeled_bs
            return image, batch["label"][:, None], labeled_bs
    """

    def __init__(
        self,
        distiller: nn.Module,
        student: nn.Module,
        optimizer: Optimizer,
        scaler: Scaler = None,
        accumulation_steps: int = 1,
        select: Callable[[Any, Tensor], Selection | None] | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
        weight: float | Callable[[int], float] = 1.0,
        start: int = 0,
        every: int = 1,
        gate_interval: int = 50,
        labeled_rows: Rows | Callable[[Any], Rows] = None,
        loader: WatchedLoader | None = None,
    ) -> None:
        for name, number in dict(
            accumulation_steps=accumulation_steps, every=every, gate_interval=gate_interval
        ).items():
            if number < 1:
                raise KnowSAMValueError(f"`{name}` must be at least 1 but is {number}.")
        if loader is not None and type(loader) is not WatchedLoader:
            raise KnowSAMTypeError(
                f"`loader` must be a WatchedLoader but is a {type(loader).__name__}; give the host "
                "`WatchedLoader(loader)`, or what `watch(loader)` of this attachment returns."
            )
        optimizer = plain_optimizer(optimizer)
        if distiller.optimizer is not None:
            check_apart(distiller.optimizer, optimizer)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in stepped for parameter in student.parameters()):
            raise KnowSAMValueError(
                "`optimizer` must step parameters of `student` but has none of them; give the student's, and attach to "
                "the student that it trains, not to an averaged copy."
            )
        if any(attachment.student is student for attachment in distiller.wiring.attachments):
            raise KnowSAMRuntimeError(
                "`student` must be attached to once but is already; call `remove()` of the former first."
            )
        self.distiller = distiller
        self.student = student
        self.scaler = scaler
        self.accumulation_steps = accumulation_steps
        self.select = select
        self.labeled_rows = labeled_rows
        self.logits_of = logits_of
        self.weight = weight
        self.start = start
        self.every = every
        self.gate_interval = gate_interval
        self.iteration = 0
        self.terms: dict[str, Tensor] = {}
        self._batch = CurrentBatch()
        self._watching: weakref.WeakSet[WatchedLoader] = weakref.WeakSet()
        self._num_untaught = 0  # batches in a row of which no call was taught
        self._num_arrivals = 0  # backwards that came through the student's logits
        self._accounted = False  # whether one did, or was not to, since the last step

        self._handles: list[Any] = [student.register_forward_hook(_StudentCalled(self), with_kwargs=True)]
        self._handles.append(call_after_step(optimizer, self._student_stepped))  # before the teacher steps
        if distiller.optimizer is not None:
            self._handles.append(distiller.follow(optimizer, scaler))
        elif scaler is None:
            self._handles.append(ScalerCheck(optimizer))
        self._deletion = weakref.finalize(self, _deleted, self._handles, self._batch)
        self._deletion.atexit = False
        distiller.wiring.attachments.add(self)
        if loader is not None:
            self._watch(loader)

    def watch(self, loader: Iterable) -> WatchedLoader:
        """The host's loader as it is, of which each batch is remembered when the host takes it."""
        watched_loader = loader if type(loader) is WatchedLoader else WatchedLoader(loader)
        self._watch(watched_loader)
        return watched_loader

    def next_batch(self, batch: Any) -> None:
        """Name the batch that the student is called on next."""
        if not self._handles:
            return
        if self._num_untaught == UNTAUGHT_BATCHES:
            self._warn_of_untaught()
        self._num_untaught += 1
        self._batch.take(batch)
        self.iteration += 1

    def remove(self) -> None:
        """Leave student and optimizer as they were, at any time; a watched loader goes on as the bare one."""
        if self._handles:
            self._deletion.detach()
            self.distiller.wiring.attachments.discard(self)
            if self.distiller.optimizer is not None:
                self.distiller.optimizer.zero_grad(set_to_none=True)  # of a step that was not taken
            for loader in self._watching:
                loader.watched_by.remove(self.next_batch)
        _remove_all(self._handles)
        self._batch = CurrentBatch()

    def _student_called(self, args: tuple, kwargs: dict, output: Any) -> None:
        logits = output if self.logits_of is None else self.logits_of(output)
        if not isinstance(logits, Tensor):
            raise KnowSAMTypeError(
                f"`student` must return logits but returns a {type(logits).__name__}; give `logits_of`."
            )
        if not logits.requires_grad:
            return
        images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not images:
            raise KnowSAMTypeError(
                "`student` must be called on a tensor, its image, but is not; attach to the part of it that is."
            )
        image = without_meta(images[0])
        selection = self._selection(image)
        self._num_untaught = self._num_untaught if selection is None else 0
        if selection is None or self.iteration % self.every:
            self._accounted = True
            return
        gradient, sam_gradients = self._gradients(logits, image, *selection)
        arrivals_before = self._num_arrivals
        arrived = False

        def backpropagated(host_gradient: Tensor) -> Tensor | None:
            nonlocal arrived
            if not self._handles:  # removed meanwhile
                return None
            if arrived:
                raise KnowSAMRuntimeError(
                    "The student's logits must be backpropagated once but are a second time, and SKD is in the first "
                    "gradient already; add the losses up before one backward, or call the student for each."
                )
            if self._num_arrivals == arrivals_before and all(p.grad is None for p in self.student.parameters()):
                # the host skipped a step and cleared its gradients by `student.zero_grad()`
                self._take_back()
            arrived = self._accounted = True
            self._num_arrivals += 1
            for parameter, sam_gradient in sam_gradients:
                brought = self.distiller.brought.setdefault(parameter, {})
                if parameter.grad is None:
                    brought.clear()
                parameter.grad = sam_gradient if parameter.grad is None else parameter.grad + sam_gradient
                is_alone = brought.keys() <= {id(self)}
                brought[id(self)] = parameter.grad if is_alone else brought.get(id(self), 0) + sam_gradient
            return host_gradient if gradient is None else host_gradient + gradient.to(host_gradient.dtype)

        logits.register_hook(backpropagated)

    def _watch(self, loader: WatchedLoader) -> None:
        if self.next_batch in loader.watched_by:  # each batch counts once
            return
        if is_cached(self.distiller.teacher):
            check_orientations(loader)
        loader.watched_by.append(self.next_batch)
        self._watching.add(loader)

    def _warn_of_untaught(self) -> None:
        why = (
            "`select` returned None for each call of the student. Let it return (sam_image, label, labeled_rows) for "
            "one call a batch; compare images by value, as by `torch.equal(image, batch['image'])`"
            if self._batch.num_calls > 0
            else "the student was not called in train mode with gradients. Attach to the module that the host trains, "
            "not to an averaged copy, and attach again when the host has built a new one"
        )
        self.distiller.wiring.warn(f"nothing was taught in {UNTAUGHT_BATCHES} batches, as {why}.")

    def _student_stepped(self) -> None:
        if not self._accounted:
            raise KnowSAMRuntimeError(
                "`optimizer` must step after a backward through the student's logits but none came through any; attach "
                "to the module that the host calls in train mode, not to an averaged copy, and before it is compiled, "
                "let `logits_of` pick what the host's loss is made of, or call `remove()` for this stage."
            )
        self._accounted, self._batch.is_over = False, True
        for brought in self.distiller.brought.values():
            brought.pop(id(self), None)

    def _take_back(self) -> None:
        """Leave SAM the gradients that other students brought, whose teacher it may be too."""
        for parameter, brought in self.distiller.brought.items():
            mine = brought.pop(id(self), None)
            if mine is not None and parameter.grad is not None:
                parameter.grad = parameter.grad - mine if brought else None

    def _selection(self, image: Tensor) -> Selection | None:
        """SAM's image, label and labeled rows for a call of the student; None: it is not taught."""
        num_calls = self._batch.count_call()
        selection: Selection | None = None
        if self.select is not None:
            selection = self.select(self._batch.on(image.device), image)
            if selection is None:
                return None
            if not isinstance(selection, tuple) or len(selection) != 3:
                is_tuple = isinstance(selection, tuple)
                returned = f"{len(selection)} values" if is_tuple else f"a {type(selection).__name__}"
                raise KnowSAMTypeError(
                    f"`select` must return (sam_image, label, labeled_rows) or None but returns {returned}."
                )
        self._batch.check(image)
        if selection is None and num_calls > 1:
            raise KnowSAMRuntimeError(
                "`student` must be called once for each batch but is called again; give `select`, which says which "
                "calls are taught. Where the whole student is under activation checkpointing, checkpoint its blocks."
            )
        if selection is None:
            selection = (*image_and_label(self._batch.batch, image), None)
        sam_image, label, rows = selection
        if rows is None:
            rows = self.labeled_rows(self._batch.batch) if callable(self.labeled_rows) else self.labeled_rows
        sam_image = sam_image_for(image, None if sam_image is image else sam_image, self.distiller.teacher)
        return sam_image, label if label is None else torch.as_tensor(label).to(image.device), rows

    def _gradients(
        self, logits: Tensor, image: Tensor, sam_image: Tensor, label: Tensor | None, rows: Rows
    ) -> tuple[Tensor | None, list[tuple[nn.Parameter, Tensor]]]:
        """What SKD would bring to the logits and to SAM's parameters, were it in the host's loss; None: nothing."""
        distiller = self.distiller.train()
        if distiller.gate.weight.device != logits.device:
            distiller.to(logits.device)
        run = self.iteration // self.every  # of the teacher
        if distiller.gate.mode == "agreement" and run % self.gate_interval == 1 % self.gate_interval:
            with all_in_eval_mode(self.student):
                distiller.measure_agreement(
                    self._student, image, label, rows, turn=run // self.gate_interval, sam_image=sam_image
                )
        weight = self.weight(self.iteration) if callable(self.weight) else self.weight
        weight = weight if self.iteration >= self.start else 0.0
        leaf = at_least_float32(logits.detach()).requires_grad_()
        # where the host checkpoints the student, the teacher's activations are not to be computed twice
        with torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda tensor: tensor):
            result = distiller(sam_image, leaf, label, rows, weight, self.iteration)
        self.terms = {
            "distillation_loss": result.distillation_loss.detach(),
            **({"sam_loss": result.sam_loss.detach()} if distiller.learns else {}),
            "gate_weight": distiller.gate.weight.clone(),
        }
        if not result.loss.requires_grad:  # not taught yet, and no row that SAM learns from
            return None, []
        scaler = scaler_now(self.scaler)
        loss = result.loss / self.accumulation_steps
        parameters = self._sam_parameters()
        with torch.autocast(logits.device.type, enabled=False):
            gradient, *sam_gradients = torch.autograd.grad(
                loss if scaler is None else scaler.scale(loss), [leaf, *parameters], allow_unused=True
            )
        # clones, as two of them may share memory, which GradScaler's unscaling in place would then do twice
        return gradient, [(p, g.clone()) for p, g in zip(parameters, sam_gradients) if g is not None]

    def _sam_parameters(self) -> list[nn.Parameter]:
        groups = [] if self.distiller.optimizer is None else self.distiller.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def _student(self, image: Tensor) -> Tensor:
        """The student's logits, not by way of DistributedDataParallel, which would be at its next step then."""
        output = (plain_network(self.student) if ranks.is_distributed() else self.student)(image)
        return output if self.logits_of is None else self.logits_of(output)


class _StudentCalled:
    """The forward hook; where the host copies or saves its student whole, a function that does nothing goes along."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = weakref.ref(attachment)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        attachment = self._attachment()
        if attachment is not None and module.training and torch.is_grad_enabled():
            attachment._student_called(args, kwargs, output)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return partial, (sys.audit, "knowsam_monai.copy_of_an_attached_student")  # takes anything, needs no package


def _deleted(handles: list[Any], batch: CurrentBatch) -> None:
    """The end of an attachment that was not removed."""
    if handles and batch.num_calls == 0:
        logger.warning(
            "SKD: an attachment was deleted before the student was called on its batch, and teaches no more: keep what "
            "`attach` returns, and let the host iterate over its `watch(loader)`."
        )
    _remove_all(handles)


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
