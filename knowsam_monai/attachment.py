"""SKD for a trainer whose step can't be edited: hooks on the student add what the host's loss lacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai.data.orientation import check_orientations, is_cached, sam_image_for
from knowsam_monai.following import Scaler, check_scaler, is_distributed, scaler_now
from knowsam_monai.losses.class_logits import at_least_float32, without_meta
from knowsam_monai.watched_loader import CurrentBatch, WatchedLoader, image_and_label
from knowsam_monai.wrappers import plain_network, plain_optimizer

if TYPE_CHECKING:
    from knowsam_monai.distiller import SAMDistiller

logger = logging.getLogger(__name__)

Selection = tuple[Tensor, Tensor | None, int | slice | None]


class Attachment:
    """
    SAM-induced knowledge distillation on a student that somebody else's code trains; nothing of that code changes.

    .. math:: \\nabla_z L \\leftarrow \\nabla_z L + \\frac{s}{k} \\nabla_z L_{kd}, \\qquad
        g_{sam} \\leftarrow g_{sam} + \\frac{s}{k} \\nabla_{sam} L_{sam}

    z are the student's logits, g the gradients of SAM's parameters, s the scaler's scale, k `accumulation_steps`. When
    the student is called in train mode the teacher runs at once, under the host's autocast, on a detached copy of the
    logits in float32 or better. Both gradients wait until the host's own backward comes to z: a forward that is never
    backpropagated teaches nobody. The teacher's optimiser follows the student's. Calls in eval mode or without a graph
    are let be.

    Labels come with the batch: the host iterates over ``watch(loader)`` instead of its loader, or something that runs
    before each step (a callback, an event) calls ``next_batch(batch)``. The student is called once for each batch, on
    the batch's very image; whatever is otherwise is said by `select`.

    Args:
        distiller: the core, with teacher, optimiser and gate.
        student: the module that the host calls; where it is wrapped (DistributedDataParallel, torch.compile), the
            wrapper.
        optimizer: the student's.
        scaler: the GradScaler of the host's backward, or a callable that returns it (or None) at the time. A hook can't
            see it, nor the next one.
        accumulation_steps: k, what the host divides its loss by; 1 where it adds up undivided.
        select: ``f(batch, image) -> (sam_image, label, labeled_rows)``, or None for a call that is not taught. `image`
            is what the student was called on, `sam_image` what SAM sees of it, row for row; `label` (B_l, 1, *spatial)
            or None; `labeled_rows` as in :meth:`knowsam_monai.distiller.SAMDistiller.forward`. Several calls for a
            batch may be taught. Default: a batch is a mapping with "image", "label" (and "sam_image", see
            :class:`knowsam_monai.data.RandOrientationd`) or a pair (image, label), and *all* labels are learned from.
        logits_of: picks the logits among the student's outputs, as ``operator.itemgetter(0)``; None: all it returns.
        weight: factor of the distillation loss, a number or a function of `iteration`.
        start: first iteration at which the student is taught; the teacher learns from the beginning.
        every: the teacher runs at every k-th iteration only, see :class:`knowsam_monai.handlers.SAMDistillation`.
        gate_interval: runs of the teacher between two measurements of the "agreement" gate.

    Attributes:
        iteration: batches so far. Set it when a run goes on.
        terms: distillation_loss, sam_loss (where the teacher learns) and gate_weight of the last call that was taught,
            detached.

    Raises:
        ValueError: when an argument is none of the above, or the student's input is not the image of the batch.
        RuntimeError: when the student has this teacher attached already; when it is called without a batch, or a second
            time for one without `select`; when its logits are backpropagated twice; when its optimiser steps and no
            backward came through them, or is stepped by a GradScaler that was not given.

    Example::

        skd = distiller.attach(student, optimizer)
        somebody_elses_training(student, optimizer, skd.watch(loader))
        skd.remove()

        def select(batch, image):                         # SSL4MIS: labels (B, H, W) for every row, and a labeled_bs
            return image, batch["label"][:, None], labeled_bs
    """

    def __init__(
        self,
        distiller: SAMDistiller,
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
    ) -> None:
        for name, number in dict(
            accumulation_steps=accumulation_steps, every=every, gate_interval=gate_interval
        ).items():
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {number}.")
        optimizer = plain_optimizer(optimizer)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in stepped for parameter in student.parameters()):
            raise ValueError("`optimizer` must step parameters of `student` but has none of them; give the student's.")
        attached = [hook.attachment for hook in student._forward_hooks.values() if isinstance(hook, _StudentCalled)]
        if any(attachment.distiller is distiller for attachment in attached):
            raise RuntimeError(
                "`student` must be attached to once but is already; call `remove()` of the former first."
            )
        self.distiller = distiller
        self.student = student
        self.scaler = scaler
        self.accumulation_steps = accumulation_steps
        self.select = select
        self.logits_of = logits_of
        self.weight = weight
        self.start = start
        self.every = every
        self.gate_interval = gate_interval
        self.iteration = 0
        self.terms: dict[str, Tensor] = {}
        self._batch = CurrentBatch()
        self._said_all_rows = False
        self._num_arrivals = 0  # backwards that came through the student's logits
        self._accounted = False  # whether one did, or was not to, since the last step

        self._handles: list[Any] = [student.register_forward_hook(_StudentCalled(self), with_kwargs=True)]
        self._handles.append(optimizer.register_step_post_hook(self._student_stepped))  # before the teacher steps
        if distiller.optimizer is not None:
            self._handles.append(distiller.follow(optimizer, scaler))

    def watch(self, loader: Iterable) -> WatchedLoader:
        """The host's loader as it is, of which each batch is remembered when the host takes it."""
        if is_cached(self.distiller.teacher):
            check_orientations(loader)
        return WatchedLoader(loader, self.next_batch)

    def next_batch(self, batch: Any) -> None:
        """Name the batch that the student is called on next."""
        self._batch.take(batch)
        self.iteration += 1

    def remove(self) -> None:
        """Leave student and optimiser as they were, at any time; a watched loader goes on as the bare one."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self.distiller.optimizer is not None:
            self.distiller.optimizer.zero_grad(set_to_none=True)  # of a step that was not taken
        self._handles, self._batch = [], CurrentBatch()

    def _student_called(self, args: tuple, kwargs: dict, output: Any) -> None:
        logits = output if self.logits_of is None else self.logits_of(output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"`student` must return logits but returns a {type(logits).__name__}; give `logits_of`.")
        if not logits.requires_grad:
            return
        images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not images:
            raise TypeError(
                "`student` must be called on a tensor, its image, but is not; attach to the part of it that is."
            )
        image = without_meta(images[0])
        selection = self._selection(image)
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
                raise RuntimeError(
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

    def _student_stepped(self, *_: Any) -> None:
        if not self._accounted:
            raise RuntimeError(
                "`optimizer` must step after a backward through the student's logits but none came through any; attach "
                "to the module that the host calls in train mode, and before it is compiled, let `logits_of` pick what "
                "the host's loss is made of, or detach for this stage."
            )
        check_scaler(scaler_now(self.scaler))
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
        """SAM's image, label and labelled rows for a call of the student; None: it is not taught."""
        num_calls = self._batch.count_call()
        selection: Selection | None = None
        if self.select is not None:
            selection = self.select(self._batch.batch, image)
            if selection is None:
                return None
            if not isinstance(selection, tuple) or len(selection) != 3:
                is_tuple = isinstance(selection, tuple)
                returned = f"{len(selection)} values" if is_tuple else f"a {type(selection).__name__}"
                raise TypeError(
                    f"`select` must return (sam_image, label, labeled_rows) or None but returns {returned}."
                )
        self._batch.check(image)
        if selection is None and num_calls > 1:
            raise RuntimeError(
                "`student` must be called once for each batch but is called again; give `select`, which says which "
                "calls are taught. Where the whole student is under activation checkpointing, checkpoint its blocks."
            )
        if selection is None:
            selection = (*image_and_label(self._batch.batch, image), None)
            if not self._said_all_rows and selection[1] is not None and len(selection[1]) == len(image):
                self._said_all_rows = True
                logger.warning("SAM learns from all %d rows; if some are unlabelled to you, give `select`.", len(image))
        sam_image, label, rows = selection
        sam_image = sam_image_for(image, None if sam_image is image else sam_image, self.distiller.teacher)
        return sam_image, label if label is None else torch.as_tensor(label).to(image.device), rows

    def _gradients(
        self, logits: Tensor, image: Tensor, sam_image: Tensor, label: Tensor | None, rows: int | slice | None
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
        output = (plain_network(self.student) if is_distributed() else self.student)(image)
        return output if self.logits_of is None else self.logits_of(output)


class _StudentCalled:
    """The forward hook; where the host copies or saves its student whole, a function that does nothing goes along."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.attachment._student_called(args, kwargs, output)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return partial, (sys.audit, "knowsam_monai.copy_of_an_attached_student")  # takes anything, needs no package


@contextmanager
def all_in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode for a while; what the host keeps in eval mode (frozen normalisation) stays in it afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
