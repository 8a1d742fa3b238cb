"""SKD for a training step that you cannot edit: hooks on the student add the gradients."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai import ranks
from knowsam_monai.arguments import check_types
from knowsam_monai.distillation.gradients import output_gradients
from knowsam_monai.distillation.optimizer_hooks import Scaler, ScalerCheck, call_after_step, check_apart, scaler_now
from knowsam_monai.distillation.sam_image import check_orientations, is_cached, sam_image_for
from knowsam_monai.distillation.watched_loader import CurrentBatch, WatchedLoader, check_same_image, image_and_label
from knowsam_monai.distillation.wiring import takes_more_than_images
from knowsam_monai.errors import KnowSAMError, KnowSAMRuntimeError, KnowSAMTypeError, KnowSAMValueError, check_counts
from knowsam_monai.labeled_rows import Rows
from knowsam_monai.losses.ramp_up import Weight, check_weights, weight_at
from knowsam_monai.tensors import at_least_float32, without_meta
from knowsam_monai.wrappers import plain_network, plain_optimizer, stepped_parameters

logger = logging.getLogger(__name__)

UNTAUGHT_BATCHES = 50  # in a row, after which a warning is due

Selection = tuple[Tensor, Tensor | None, "Rows"]
Taught = tuple[Tensor, Tensor | None, "Rows", Tensor | None]  # and whether the batch's image is the student's


class Attachment:
    """
    SAM-induced knowledge distillation for a student trained by code that you cannot edit.

    .. math:: \\nabla_z L \\leftarrow \\nabla_z L + \\frac{s}{k} \\nabla_z L_{kd}, \\qquad
        g_{sam} \\leftarrow g_{sam} + \\frac{s}{k} \\nabla_{sam} L_{sam}

    z are the student's logits, g_sam the gradients of SAM's parameters, s the scaler's scale, and k is
    `accumulation_steps`. When the student is called in train mode, the teacher runs at once, under the host's autocast,
    on a detached copy of the logits in at least float32. Both gradients are added when the host's own backward reaches
    z, so a forward pass without a backward pass has no effect. The teacher's optimizer follows the student's. Calls in
    eval mode or without a graph are ignored.

    The labels come from the batch: the host iterates over ``watch(loader)`` instead of its loader, or a callback or
    event calls ``next_batch(batch)`` before each step. The student must be called once for each batch, on the batch's
    own image; otherwise pass `select`.

    Keep a reference to the attachment or to the watched loader: when both are deleted, the hooks are removed.

    Args:
        distiller: has the teacher, its optimizer and the gate.
        student: the module that the host calls; if it is wrapped (DistributedDataParallel, torch.compile), the
            wrapper.
        optimizer: the student's.
        scaler: the host's GradScaler, or a callable that returns it (or None) at the time of the call. Hooks cannot see
            loss scaling, so pass it explicitly.
        accumulation_steps: k, by which the host divides its loss; 1 if it does not divide. Hooks cannot see this
            either.
        select: ``f(batch, image) -> (sam_image, label, labeled_rows)``, or None to skip a call of the student. `image`
            is the student's input, and the tensors of `batch` are on its device. `sam_image` is what SAM sees, row by
            row; `label` and `labeled_rows` are as in :meth:`~knowsam_monai.distillation.SAMDistiller.forward`, or None,
            which for `labeled_rows` means the argument below. Several calls per step may be taught. Default: a batch
            is a mapping with "image", "label" (and "sam_image", see
            :class:`knowsam_monai.data.RandOrientationd`) or a pair (image, label).
        labeled_rows: the rows whose labels SAM learns from: an int n (the first n), a slice, "all", or a callable of
            the host's batch that returns one of these. None: the first ``len(label)``, which must not be all rows.
        logits_of: picks the logits from the student's output, for example ``operator.itemgetter(0)``, or computes them
            from its tensors, all of which the host's loss must then use; None: the output is the logits.
        weight: factor of the distillation loss, a number or a function of `iteration`.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. The teacher
            always learns from the beginning.
        every: the teacher runs only at every k-th iteration, see :class:`knowsam_monai.handlers.SAMDistillation`.
        gate_interval: number of teacher runs between measurements of the gate on training rows; the first is after 10.
        loader: a :class:`~knowsam_monai.distillation.WatchedLoader` built before the optimizer; it is watched from now
            on.

    Attributes:
        iteration: number of batches so far on which the student was trained. Set it when you resume a run.
        terms: distillation_loss, sam_loss (if the teacher learns) and gate_weight of the last taught call, detached.

    Raises:
        TypeError: if `loader` is not a WatchedLoader; if the student is called without a tensor or does not return
            logits, or `select` does not return what is described above.
        ValueError: if an argument is not as described, both optimizers step the same parameters, the student's input is
            not the image of the batch, or every row has a label but `labeled_rows` is None.
        RuntimeError: if this teacher is already attached to the student; if the student is called without a batch, or
            twice on a batch without `select`; if its logits are backpropagated twice; if its optimizer steps but no
            gradient reached the logits, as in eval mode, or a GradScaler steps it but `scaler` is None.

    Example::

        skd = distiller.attach(student, optimizer)
        their_training(student, optimizer, skd.watch(loader))
        skd.remove()

        loader = WatchedLoader(loader)                    # built before the optimizer
        skd = distiller.attach(student, optimizer, loader=loader)

        def select(batch, image):                         # SSL4MIS: labels (B, H, W) for every row
            return image, batch["label"][:, None], labeled_bs
    """

    @check_types
    def __init__(
        self,
        distiller: nn.Module,
        student: nn.Module,
        optimizer: Optimizer,
        scaler: Scaler = None,
        accumulation_steps: int = 1,
        select: Callable[[Any, Tensor], Selection | None] | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
        weight: Weight = 1.0,
        start: int = 0,
        every: int = 1,
        gate_interval: int = 50,
        labeled_rows: Rows | Callable[[Any], Rows] = None,
        loader: Any = None,  # a WatchedLoader; another one gets a remedy
    ) -> None:
        check_weights(weight=weight)
        check_counts(accumulation_steps=accumulation_steps, every=every, gate_interval=gate_interval)
        if loader is not None and type(loader) is not WatchedLoader:
            raise KnowSAMTypeError(
                f"`loader` must be a WatchedLoader but is a {type(loader).__name__}; pass "
                "`WatchedLoader(loader)` here and to the host, or pass the host `watch(loader)` of this attachment."
            )
        if isinstance(student, torch.jit.ScriptModule):
            raise KnowSAMTypeError(
                "`student` must be a network that takes hooks but is TorchScript; attach to it before it is scripted."
            )
        optimizer = plain_optimizer(optimizer)
        distiller.check_student(student)
        if distiller.optimizer is not None:
            check_apart(distiller.optimizer, optimizer)
        if set(stepped_parameters(optimizer)).isdisjoint(student.parameters()):
            raise KnowSAMValueError(
                "`optimizer` must step parameters of `student` but has none of them; pass the student's, and attach to "
                "the student that it trains, not to an averaged copy."
            )
        if any(attachment.student is student for attachment in distiller.wiring.attachments):
            raise KnowSAMRuntimeError(
                "This distiller is already attached to `student`; call `remove()` on the earlier attachment first."
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
        self._stepped = stepped_parameters(optimizer)
        self._batch = CurrentBatch()
        self._watching: weakref.WeakSet[WatchedLoader] = weakref.WeakSet()
        self._num_untaught = 0  # consecutive batches without a taught call
        self._num_backwards = 0  # backward passes that reached the student's logits
        self._num_kept = 0  # those whose gradients of SAM wait for a step
        # since the last step: a gradient reached a taught call, a call was skipped, a taught call waits for a gradient
        self._was_reached = self._was_skipped = self._is_waiting = False
        self._saw_eval_mode = False  # since the last step, with gradients

        self._handles: list[Any] = [student.register_forward_hook(_ForwardHook(self), with_kwargs=True)]
        self._handles.append(call_after_step(optimizer, self._student_stepped))  # runs before the teacher's
        if distiller.optimizer is not None:
            self._handles.append(distiller.follow(optimizer, scaler, shared=True))
        elif scaler is None:
            self._handles.append(ScalerCheck(optimizer))
        self._deletion = weakref.finalize(self, _remove_deleted, self._handles, self._batch)
        self._deletion.atexit = False
        distiller.wiring.attachments.add(self)
        if loader is not None:
            self._watch(loader)

    def watch(self, loader: Iterable) -> WatchedLoader:
        """Wrap the host's loader, so that each batch is noted when the host takes it."""
        watched_loader = loader if type(loader) is WatchedLoader else WatchedLoader(loader)
        self._watch(watched_loader)
        return watched_loader

    def next_batch(self, batch: Any) -> None:
        """Set the batch on which the student is called next."""
        if not self._handles:
            return
        if self._num_untaught == UNTAUGHT_BATCHES:
            self._warn_of_untaught()
        self._num_untaught += 1
        self._is_waiting = False  # a forward pass without a backward pass has no effect
        self._batch.take(batch)

    def remove(self) -> None:
        """Leave student and optimizer as they were, at any time; a watched loader then acts as the bare one."""
        if self._handles:
            self._deletion.detach()
            self.distiller.wiring.attachments.discard(self)
            if self.distiller.optimizer is not None:
                self.distiller.optimizer.zero_grad(set_to_none=True)  # of an unfinished step
            for loader in self._watching:
                loader.watched_by.remove(self.next_batch)
        _remove_all(self._handles)
        self._batch = CurrentBatch()

    def _student_called(self, args: tuple, kwargs: dict, output: Any) -> None:
        self._batch.is_unused = False
        logits = output if self.logits_of is None else self.logits_of(output)
        if not isinstance(logits, Tensor):
            raise KnowSAMTypeError(
                f"`student` must return logits but returns a {type(logits).__name__}; pass `logits_of`."
            )
        if not logits.requires_grad:
            return
        images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not images:
            raise KnowSAMTypeError(
                "`student` must be called with an image tensor but is not; attach to the part of it that is."
            )
        image = without_meta(images[0])
        selection = self._selection(image)
        self._num_untaught = self._num_untaught if selection is None else 0
        if selection is None or self.iteration % self.every:
            self._was_skipped = True
            return
        device = logits.device.type
        if self.scaler is None and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.half:
            self.distiller.wiring.warn(
                "the student runs in float16 but `scaler` is None: pass the host's GradScaler, or "
                "GradScaler(enabled=False) if it has none."
            )
        sam_image, label, rows, is_same = selection
        student = partial(self._student_output, args, kwargs, images[0])
        gradient, sam_gradients = self._gradients(student, logits, image, sam_image, label, rows)
        sources = [(logits, gradient)]
        if self.logits_of is not None:
            sources = output_gradients(self.logits_of, output, logits, gradient)
        pending = _Pending(image, is_same, dict(enumerate(g for _, g in sources)), sam_gradients, self._num_backwards)
        self._is_waiting = self.iteration >= self.start
        for number, (source, _) in enumerate(sources):
            source.register_hook(partial(self._add_gradients, pending, number))

    def _add_gradients(self, pending: _Pending, number: int, host_gradient: Tensor) -> Tensor | None:
        """The hook on the logits, or on an output behind them: its gradient with SKD's; None leaves it as it is."""
        if not self._handles:  # the attachment was removed since
            return None
        check_same_image(pending.is_same, pending.image)  # only now that the device has the teacher's work to do
        if number not in pending.gradients:
            raise KnowSAMRuntimeError(
                "The student's logits were backpropagated twice, but the first gradient already includes SKD. Sum the "
                "losses before `backward`, or call the student once for each."
            )
        if self._num_backwards == pending.num_backwards and self._student_was_cleared():
            self._num_kept = 0
            self.distiller.gradients.withdraw(self)
        gradient = pending.gradients.pop(number)
        self._was_reached |= not pending.gradients
        self._num_backwards += 1
        self._num_kept += not pending.gradients
        for parameter, sam_gradient in pending.sam_gradients:
            self.distiller.gradients.add(self, parameter, sam_gradient)
        pending.sam_gradients.clear()  # the host may keep the logits, and with them this hook
        return None if gradient is None else host_gradient + gradient.to(host_gradient.dtype)

    def _watch(self, loader: WatchedLoader) -> None:
        if self.next_batch in loader.watched_by:  # each batch counts once
            return
        if is_cached(self.distiller.teacher):
            try:
                check_orientations(loader)
            except KnowSAMError:
                self._batch.is_unused = False
                raise
        loader.watched_by.append(self.next_batch)
        self._watching.add(loader)

    def _warn_of_untaught(self) -> None:
        reason = (
            "`select` returned None for each call of the student. Return (sam_image, label, labeled_rows) for one call "
            "per batch; compare images by value, as in `torch.equal(image, batch['image'])`"
            if self._batch.num_calls > 0
            else "the student was not called in train mode with gradients. Attach to the module that the host trains, "
            "not to an averaged copy, and attach again if the host builds a new one"
        )
        self.distiller.wiring.warn(f"nothing was distilled in {UNTAUGHT_BATCHES} batches: {reason}.")

    def _student_stepped(self) -> None:
        may_step = self._was_reached or (self._was_skipped and not self._is_waiting)
        if not may_step and any(parameter.grad is not None for parameter in self._stepped):
            self._batch.is_unused = False
            if self._saw_eval_mode and not self._is_waiting:
                raise KnowSAMRuntimeError(
                    "The student must be called in train mode but was called in eval mode; call `student.train()` "
                    "before the step, and put only its frozen layers in eval mode."
                )
            raise KnowSAMRuntimeError(
                "The optimizer stepped, but no gradient reached the student's logits (or not each output that "
                "`logits_of` combines). Attach to the module that the host calls in train mode, not to an averaged "
                "copy, and before it is compiled; let `logits_of` pick the logits that the host's loss uses; or call "
                "`remove()` for this stage."
            )
        self._was_reached = self._was_skipped = self._is_waiting = self._saw_eval_mode = False
        self._num_kept, self._batch.is_over = 0, True
        self.distiller.gradients.settle(self)

    def _student_was_cleared(self) -> bool:
        """Whether the host skipped a step and cleared its gradients with `student.zero_grad()`."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        if self._num_kept < self.accumulation_steps:  # zeros are looked for only if a step is overdue
            return not gradients
        return not any(bool(gradient.any()) for gradient in gradients)

    def _selection(self, image: Tensor) -> Taught | None:
        """SAM's image, label and labeled rows for a call of the student; None to skip the call."""
        num_calls = self._batch.count_call()
        self.iteration += num_calls == 1
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
                "`student` must be called once for each batch but is called again; pass `select` to choose the calls "
                "that are taught. With activation checkpointing of the whole student, checkpoint its blocks instead. "
                "For an optimizer that calls the student in its own step, such as LBFGS, use the plain loop."
            )
        if self.iteration % self.every:  # the teacher does not run
            return image, None, None, None
        if selection is not None:
            (sam_image, label, rows), is_same = selection, None
        else:
            sam_image, label, is_same = image_and_label(self._batch.batch, image)
            rows = None
        if rows is None:
            rows = self.labeled_rows(self._batch.batch) if callable(self.labeled_rows) else self.labeled_rows
        sam_image = sam_image_for(image, None if sam_image is image else sam_image, self.distiller.teacher)
        label = label if label is None else torch.as_tensor(label).to(image.device, non_blocking=True)
        return sam_image, label, rows, is_same

    def _gradients(
        self,
        student: Callable[[Tensor], Any],
        logits: Tensor,
        image: Tensor,
        sam_image: Tensor,
        label: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor | None, list[tuple[nn.Parameter, Tensor]]]:
        """The gradients of SKD for the logits (or None) and for SAM's parameters."""
        distiller = self.distiller.train()
        run = self.iteration // self.every  # counts the teacher's runs
        distiller.measure_if_due(
            run, self.gate_interval, self.student, image, label, rows, sam_image, self.logits_of, student
        )
        weight = weight_at(self.weight, self.iteration, self.start)
        leaf = at_least_float32(logits.detach()).requires_grad_()
        # keeps a host's activation checkpointing from recomputing the teacher's activations
        with torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda tensor: tensor):
            result = distiller(sam_image, leaf, label, rows, weight, self.iteration)
        self.terms = {
            "distillation_loss": result.distillation_loss.detach(),
            **({"sam_loss": result.sam_loss.detach()} if distiller.learns else {}),
            "gate_weight": distiller.gate.weight.clone(),
        }
        if not result.loss.requires_grad:  # neither loss is active
            return None, []
        scaler = scaler_now(self.scaler)
        loss = result.loss / self.accumulation_steps
        parameters = [p for p in stepped_parameters(distiller.optimizer) if p.requires_grad]
        with torch.autocast(logits.device.type, enabled=False):
            gradient, *sam_gradients = torch.autograd.grad(
                loss if scaler is None else scaler.scale(loss), [leaf, *parameters], allow_unused=True
            )
        # clones: two gradients may share memory, which GradScaler would then unscale twice in place
        return gradient, [(p, g.clone()) for p, g in zip(parameters, sam_gradients) if g is not None]

    def _student_output(self, args: tuple, kwargs: dict, own: Tensor, image: Tensor) -> Any:
        """
        The student's output for another image, in a call like the host's.

        This bypasses DistributedDataParallel, which would mistake the call for its next step.

        Args:
            args, kwargs: the host's call.
            own: the image in it.
            image: takes the place of `own`.
        """
        others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x is not own]
        if any(x.ndim > 0 and len(x) == len(own) for x in others):
            raise takes_more_than_images("`student` is called with other tensors too")
        network = plain_network(self.student) if ranks.is_distributed() else self.student
        return network(
            *(image if x is own else x for x in args), **{key: image if x is own else x for key, x in kwargs.items()}
        )


@dataclass
class _Pending:
    """What SKD adds in the backward pass of one call of the student."""

    image: Tensor
    is_same: Tensor | None  # whether the batch has the same image
    gradients: dict[int, Tensor | None]  # of the logits or the outputs behind them, until they are added
    sam_gradients: list[tuple[nn.Parameter, Tensor]]
    num_backwards: int  # before this one


class _ForwardHook:
    """The student's forward hook; in a copied or saved student, a function that does nothing replaces it."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = weakref.ref(attachment)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        attachment = self._attachment()
        if attachment is None or not torch.is_grad_enabled():
            return
        if module.training:
            attachment._student_called(args, kwargs, output)
        else:
            attachment._saw_eval_mode = True

    def __reduce__(self) -> tuple[Callable, tuple]:
        return partial, (sys.audit, "knowsam_monai.copy_of_an_attached_student")  # accepts any arguments


def _remove_deleted(handles: list[Any], batch: CurrentBatch) -> None:
    """Remove the hooks of an attachment that was deleted without `remove()`."""
    if handles and batch.is_unused:
        logger.warning(
            "SKD: an attachment was deleted before the student was called on a batch, so nothing was taught: keep a "
            "reference to what `attach` returns, and let the host iterate over its `watch(loader)`."
        )
    _remove_all(handles)


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
