"""The one rule of when a teacher steps: when its student has stepped."""

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
from knowsam_monai.wrappers import plain_optimizer

Scaler = torch.amp.GradScaler | Callable[[], torch.amp.GradScaler | None] | None


def follow(teacher_optimizer: Optimizer, optimizer: Optimizer, scaler: Scaler = None) -> FollowHandle:
    """
    Let a teacher's optimizer follow a student's, see :meth:`knowsam_monai.distillation.SAMDistiller.follow`.

    Args:
        teacher_optimizer: steps after each step of the other one.
        optimizer: the student's; of a wrapper as Accelerate's and Lightning's the one inside is followed.
        scaler: the scaler that steps the student, or a callable that returns it (or None) at the time of the step.
            Hooks cannot see loss scaling, so pass it explicitly. After a step that it skips, ``optimizer.zero_grad()``
            clears the teacher too, ``student.zero_grad()`` does not.

    Raises:
        TypeError: when `optimizer` is none.
        ValueError: when `optimizer` is the teacher's, or both step the same parameters.
        RuntimeError: at a step that a GradScaler makes although none was given.

    Example::

        handle = follow(teacher_optimizer, student_optimizer)
    """
    optimizer = plain_optimizer(optimizer)
    check_apart(teacher_optimizer, optimizer)
    parameters = _parameters(teacher_optimizer)
    _take_from_first_rank(parameters)
    removals = [] if scaler is not None else [ScalerCheck(optimizer).remove]  # its hook is before the teacher's

    def step_teacher(*_) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips GradScaler's overflows inside
        if found_inf is not None and found_inf:
            teacher_optimizer.zero_grad(set_to_none=True)
        _fill_where_another_rank_has_gradients(parameters)
        if all(p.grad is None for p in parameters):  # GradScaler raises on an optimizer without gradients
            return
        _average_over_ranks([p.grad for p in parameters if p.grad is not None])
        current = scaler_now(scaler)
        if current is None:
            teacher_optimizer.step()
        else:
            current.step(teacher_optimizer)
        teacher_optimizer.zero_grad(set_to_none=True)

    zero_grad = optimizer.zero_grad
    if not isinstance(zero_grad, _ZeroGrad):
        zero_grad = optimizer.zero_grad = _ZeroGrad(optimizer)  # type: ignore[method-assign]
    zero_grad.teachers.append(teacher_optimizer)
    forget = partial(_forget, weakref.ref(zero_grad), weakref.ref(optimizer), teacher_optimizer)
    return FollowHandle([*removals, optimizer.register_step_post_hook(step_teacher).remove, forget])


def check_apart(teacher_optimizer: Optimizer, optimizer: Optimizer) -> None:
    """
    Refuse optimizers that step the same parameters.

    Args:
        teacher_optimizer: SAM's.
        optimizer: the student's.

    Raises:
        ValueError: when they are one, or share parameters.
    """
    if plain_optimizer(teacher_optimizer) is optimizer:
        raise KnowSAMValueError(
            "`optimizer` must be the student's but is the distiller's own, which steps SAM; give SAM an optimizer of "
            "its own parameters, and here the one that steps the student."
        )
    shared = set(map(id, _parameters(optimizer))) & set(map(id, _parameters(teacher_optimizer)))
    if shared:
        raise KnowSAMValueError(
            f"`optimizer` must step no parameters of the distiller's optimizer but shares {len(shared)} with it; build "
            "the distiller's from `teacher.parameters()` and the student's from `student.parameters()`."
        )


def call_after_step(optimizer: Optimizer, method: Callable[[], None]) -> RemovableHandle:
    """
    Call a bound method after each step of an optimizer, which does not keep the method's object alive.

    Args:
        optimizer: has the hook.
        method: takes nothing.
    """
    weak_method = weakref.WeakMethod(method)

    def stepped(*_: Any) -> None:
        alive_method = weak_method()
        if alive_method is not None:
            alive_method()

    return optimizer.register_step_post_hook(stepped)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _forget(
    weak_zero_grad: weakref.ref[_ZeroGrad], weak_optimizer: weakref.ref[Optimizer], teacher_optimizer: Optimizer
) -> None:
    zero_grad, optimizer = weak_zero_grad(), weak_optimizer()
    if zero_grad is not None and optimizer is not None:
        zero_grad.forget(teacher_optimizer, optimizer)


class FollowHandle:
    """Undoes :func:`follow`, which returns it.

    Args:
        removals: functions that each undo a part, and do nothing when called once more.

    Example::

        handle = distiller.follow(student_optimizer)
        train()
        handle.remove()
    """

    def __init__(self, removals: Sequence[Callable[[], None]]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Leave the student's optimizer as it was; once more does nothing."""
        for remove in self._removals:
            remove()


class ScalerCheck:
    """
    Notices at the first steps a GradScaler that was not given: it leaves its marks on the student's gradients.

    Between backward and step it divides them by its scale, a power of two. A fused optimizer, which does that itself,
    has the scale as an attribute meanwhile. The check ends with the first step that has gradients.

    Args:
        optimizer: the student's.

    Raises:
        RuntimeError: at a step whose gradients were divided by a power of two of at least 128.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        trained = [parameter for parameter in _parameters(optimizer) if parameter.requires_grad]
        self._parameter = min(trained, key=Tensor.numel, default=None)
        self._gradient: Tensor | None = None
        self._step_handle = optimizer.register_step_post_hook(self._check)
        self._gradient_handle: Any = None
        if self._parameter is not None:
            self._gradient_handle = self._parameter.register_post_accumulate_grad_hook(self._remember)

    def remove(self) -> None:
        """Leave optimizer and parameter as they were; once more does nothing."""
        self._step_handle.remove()
        self._end()

    def _end(self) -> None:
        if self._gradient_handle is not None:
            self._gradient_handle.remove()
        self._gradient = self._parameter = None

    def _remember(self, parameter: Tensor) -> None:
        self._gradient = None if parameter.grad is None else parameter.grad.detach().clone()

    def _check(self, optimizer: Optimizer, *_: Any) -> None:
        is_scaled = getattr(optimizer, "grad_scale", None) is not None
        before, now = self._gradient, None if self._parameter is None else self._parameter.grad
        if not is_scaled and before is not None and now is not None:
            nonzero_mask = now != 0
            if not nonzero_mask.any():
                return
            mantissa, exponent = torch.frexp(before[nonzero_mask].double() / now[nonzero_mask].double())
            is_scaled = bool((mantissa == 0.5).all() and (exponent == exponent[0]).all() and exponent[0] > 7)
        if is_scaled:
            raise KnowSAMRuntimeError(
                "`scaler` must be the GradScaler that steps the student's optimizer but none was given; give it to "
                "`follow` or `attach`, or GradScaler(enabled=False) where the host divides its gradients by itself."
            )
        if before is not None and now is not None:
            self._end()


class _ZeroGrad:
    """The student's ``zero_grad``, which clears its teachers too: a step that was skipped leaves gradients behind."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.own = optimizer.__dict__.get("zero_grad")  # somebody else may have wrapped it before
        self.student_zero_grad = optimizer.zero_grad
        self.teachers: list[Optimizer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.student_zero_grad(*args, **kwargs)
        for teacher_optimizer in self.teachers:
            teacher_optimizer.zero_grad(set_to_none=True)

    def forget(self, teacher_optimizer: Optimizer, optimizer: Optimizer) -> None:
        """Clear this teacher no longer; after the last, be the host's own again, or inside its wrapper only pass on."""
        if teacher_optimizer not in self.teachers:
            return
        self.teachers.remove(teacher_optimizer)
        if not self.teachers and optimizer.__dict__.get("zero_grad") is self:
            del optimizer.zero_grad
            if self.own is not None:
                optimizer.zero_grad = self.own  # type: ignore[method-assign]


def scaler_now(scaler: Scaler) -> torch.amp.GradScaler | None:
    """The scaler, where it was given as a callable the one of this moment."""
    return scaler if scaler is None or isinstance(scaler, torch.amp.GradScaler) else scaler()


def _take_from_first_rank(parameters: Sequence[Tensor]) -> None:
    """As DistributedDataParallel does with the student: processes may have been seeded differently."""
    if ranks.is_distributed():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.detach(), src=0)


def _fill_where_another_rank_has_gradients(parameters: Sequence[Tensor]) -> None:
    """Zeros, so that all ranks average the same tensors: a rank may have had no labeled row in this step."""
    if ranks.is_distributed() and parameters:
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        has_gradient = has_gradient.to(parameters[0].device)
        torch.distributed.all_reduce(has_gradient, torch.distributed.ReduceOp.MAX)
        for parameter, somewhere in zip(parameters, has_gradient.tolist()):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _average_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Mean over the processes of a distributed run: the teacher is in no DistributedDataParallel."""
    if ranks.is_distributed():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient.div_(torch.distributed.get_world_size()))
