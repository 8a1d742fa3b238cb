"""The teacher's optimizer steps after the student's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.wrappers import plain_optimizer, stepped_parameters

Scaler = torch.amp.GradScaler | Callable[[], torch.amp.GradScaler | None] | None


def follow(
    teacher_optimizer: Optimizer,
    optimizer: Optimizer,
    scaler: Scaler = None,
    is_broken: Callable[[Sequence[Tensor]], bool] | None = None,
) -> FollowHandle:
    """
    Make a teacher's optimizer follow a student's, see :meth:`knowsam_monai.distillation.SAMDistiller.follow`.

    Args:
        teacher_optimizer: steps after each step of the student's optimizer.
        optimizer: the student's; may be wrapped, as by Accelerate and Lightning.
        scaler: the scaler that steps the student, or a callable that returns it (or None) at the time of the step.
            Hooks cannot see loss scaling, so pass it explicitly. After a skipped step ``optimizer.zero_grad()`` also
            clears the teacher's gradients; ``student.zero_grad()`` does not. The teacher's overflows count too, as
            always if several optimizers share a scaler.
        is_broken: ``f(parameters)``, whether their gradients are not finite for a reason other than the scale. Then the
            teacher does not step, and the scaler is not told. Asked only with an enabled scaler, which waits
            for the device too. None: never.

    Raises:
        TypeError: if `optimizer` is not an optimizer.
        ValueError: if `optimizer` is the teacher's, or both step the same parameters.
        RuntimeError: at a step, if a GradScaler makes it but `scaler` is None.

    Example::

        handle = follow(teacher_optimizer, student_optimizer)
    """
    optimizer = plain_optimizer(optimizer)
    check_apart(teacher_optimizer, optimizer)
    removals = [] if scaler is not None else [ScalerCheck(optimizer).remove]  # its hook runs before the teacher's

    def step_teacher(*_) -> None:
        parameters = stepped_parameters(teacher_optimizer)  # groups may have been added
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips overflows itself
        if found_inf is not None and bool(found_inf):
            teacher_optimizer.zero_grad(set_to_none=True)
        current = scaler_now(scaler)
        is_scaled = current is not None and current.is_enabled()
        if is_scaled and is_broken is not None and is_broken(parameters):
            teacher_optimizer.zero_grad(set_to_none=True)  # to the other ranks, this one had no labeled row
        if ranks.is_distributed():
            _average_over_ranks(parameters)
        if all(p.grad is None for p in parameters):  # GradScaler raises on an optimizer without gradients
            return
        if current is None:
            teacher_optimizer.step()
        else:
            _step_scaled(current, teacher_optimizer)
        teacher_optimizer.zero_grad(set_to_none=True)

    zero_grad = optimizer.zero_grad
    if not isinstance(zero_grad, _ZeroGrad):
        zero_grad = optimizer.zero_grad = _ZeroGrad(optimizer)  # type: ignore[method-assign]
    zero_grad.teachers.append(teacher_optimizer)
    remove_teacher = partial(_remove_teacher, weakref.ref(zero_grad), weakref.ref(optimizer), teacher_optimizer)
    return FollowHandle([*removals, optimizer.register_step_post_hook(step_teacher).remove, remove_teacher])


def check_apart(teacher_optimizer: Optimizer, optimizer: Optimizer) -> None:
    """
    Raise an error if both optimizers step the same parameters.

    Args:
        teacher_optimizer: SAM's.
        optimizer: the student's.

    Raises:
        ValueError: if they are the same optimizer or share parameters.
    """
    if plain_optimizer(teacher_optimizer) is optimizer:
        raise KnowSAMValueError(
            "`optimizer` must be the student's but is the distiller's own, which steps SAM; build one optimizer for "
            "SAM and another for the student."
        )
    shared = set(stepped_parameters(optimizer)) & set(stepped_parameters(teacher_optimizer))
    if shared:
        raise KnowSAMValueError(
            f"`optimizer` must not step parameters of the distiller's optimizer but shares {len(shared)} with it; "
            "build the distiller's from `teacher.parameters()` and the student's from `student.parameters()`."
        )


def call_after_step(optimizer: Optimizer, method: Callable[[], None]) -> RemovableHandle:
    """
    Call a bound method after each step of an optimizer, without keeping the method's object alive.

    Args:
        optimizer: gets the hook.
        method: called without arguments.
    """
    weak_method = weakref.WeakMethod(method)

    def stepped(*_: Any) -> None:
        alive_method = weak_method()
        if alive_method is not None:
            alive_method()

    return optimizer.register_step_post_hook(stepped)


def _remove_teacher(
    weak_zero_grad: weakref.ref[_ZeroGrad], weak_optimizer: weakref.ref[Optimizer], teacher_optimizer: Optimizer
) -> None:
    zero_grad, optimizer = weak_zero_grad(), weak_optimizer()
    if zero_grad is not None and optimizer is not None:
        zero_grad.remove(teacher_optimizer, optimizer)


class FollowHandle:
    """Returned by :func:`follow`, to undo it.

    Args:
        removals: functions that each undo one part; calling them again does nothing.

    Example::

        handle = distiller.follow(student_optimizer)
        train()
        handle.remove()
    """

    def __init__(self, removals: Sequence[Callable[[], None]]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Leave the student's optimizer as it was; further calls do nothing."""
        for remove in self._removals:
            remove()


def missing_scaler() -> KnowSAMRuntimeError:
    """The error of a GradScaler that was not passed."""
    return KnowSAMRuntimeError(
        "`scaler` must be the GradScaler that steps the student's optimizer but is None; pass it to `follow` or "
        "`attach`, or pass GradScaler(enabled=False) if the host uses none or scales its gradients itself."
    )


class ScalerCheck:
    """
    Detects a GradScaler that was not passed, unless the host clips the gradients of the first step.

    Between backward and step, a GradScaler divides the gradients by its scale, a power of two. A fused optimizer does
    that itself and has the scale as an attribute during the step. The check ends after the first step with gradients.

    Args:
        optimizer: the student's.

    Raises:
        RuntimeError: at a step, if the gradients were divided by a power of two of at least 128.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameter: Tensor | None = None  # the smallest one that got a gradient
        self._gradient: Tensor | None = None
        self._step_handle = optimizer.register_step_post_hook(self._check)
        trained = [parameter for parameter in stepped_parameters(optimizer) if parameter.requires_grad]
        self._gradient_handles = [p.register_post_accumulate_grad_hook(self._remember) for p in trained]

    def remove(self) -> None:
        """Leave optimizer and parameter as they were; further calls do nothing."""
        self._step_handle.remove()
        self._end()

    def _end(self) -> None:
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient = self._parameter = None

    def _remember(self, parameter: Tensor) -> None:
        if parameter.grad is not None and (self._parameter is None or parameter.numel() <= self._parameter.numel()):
            self._parameter, self._gradient = parameter, parameter.grad.detach().clone()

    def _check(self, optimizer: Optimizer, *_: Any) -> None:
        is_scaled = getattr(optimizer, "grad_scale", None) is not None
        before, now = self._gradient, None if self._parameter is None else self._parameter.grad
        if not is_scaled and before is not None and now is not None:
            nonzero_mask = now != 0
            if not nonzero_mask.any():
                return
            before, now = (gradient[nonzero_mask].cpu().double() for gradient in (before, now))  # MPS has no float64
            mantissa, exponent = torch.frexp(before / now)
            is_scaled = bool((mantissa == 0.5).all() and (exponent == exponent[0]).all() and exponent[0] > 7)
        if is_scaled:
            raise missing_scaler()
        if before is not None and now is not None:
            self._end()


class _ZeroGrad:
    """The student's ``zero_grad``; it also clears its teachers, whose gradients a skipped step leaves behind."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.own = optimizer.__dict__.get("zero_grad")  # may have been wrapped before
        self.student_zero_grad = optimizer.zero_grad
        self.teachers: list[Optimizer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.student_zero_grad(*args, **kwargs)
        for teacher_optimizer in self.teachers:
            teacher_optimizer.zero_grad(set_to_none=True)

    def remove(self, teacher_optimizer: Optimizer, optimizer: Optimizer) -> None:
        """Stop clearing this teacher; after the last one, restore the host's ``zero_grad`` unless wrapped since."""
        if teacher_optimizer not in self.teachers:
            return
        self.teachers.remove(teacher_optimizer)
        if not self.teachers and optimizer.__dict__.get("zero_grad") is self:
            del optimizer.zero_grad
            if self.own is not None:
                optimizer.zero_grad = self.own  # type: ignore[method-assign]


def scaler_now(scaler: Scaler) -> torch.amp.GradScaler | None:
    """The scaler, or what a callable scaler returns at this moment."""
    return scaler if scaler is None or isinstance(scaler, torch.amp.GradScaler) else scaler()


def _step_scaled(scaler: torch.amp.GradScaler, teacher_optimizer: Optimizer) -> None:
    try:
        scaler.step(teacher_optimizer)
    except RuntimeError as error:
        if "since the last update" not in str(error):
            raise
        raise KnowSAMRuntimeError(
            "`scaler` must be updated between two steps of students with the same teacher but was not; call "
            "`scaler.update()` after each step, or add the students' losses and call `backward` once."
        ) from error


def _average_over_ranks(parameters: Sequence[Tensor]) -> None:
    """
    Average the gradients over the processes, since no DistributedDataParallel wraps the teacher.

    First the ranks tell each other which gradients they have; a rank without labeled rows has none and contributes
    zeros. A gradient that no rank has stays None. The others go through one buffer for each precision, not one by one;
    after a step without the teacher there are none.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    counts = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32).to(trained[0].device)
    torch.distributed.all_reduce(counts)
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter, count in zip(trained, counts.tolist()):
        if count > 0:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        buffer = torch.cat([gradient.flatten() for gradient in gradients]).div_(ranks.world_size())
        torch.distributed.all_reduce(buffer)
        for p, gradient, average in zip(group, gradients, buffer.split([g.numel() for g in gradients])):
            p.grad = gradient.copy_(average.view_as(gradient))
