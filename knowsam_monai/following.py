"""The one rule of when a teacher steps: when its student has stepped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from knowsam_monai.wrappers import plain_optimizer

MAX_FRAMES_BELOW_SCALER = 16  # between its `step` and the hook: the optimiser's own, schedulers, profilers

Scaler = torch.amp.GradScaler | Callable[[], torch.amp.GradScaler | None] | None


def follow(teacher_optimizer: Optimizer, optimizer: Optimizer, scaler: Scaler = None) -> FollowHandle:
    """
    Let a teacher's optimiser follow a student's, see :meth:`knowsam_monai.distiller.SAMDistiller.follow`.

    Args:
        teacher_optimizer: steps after each step of the other one.
        optimizer: the student's; of a wrapper as Accelerate's and Lightning's the one inside is followed.
        scaler: the scaler that steps the student, or a callable that returns it (or None) at the time of the step.
            After a step that it skips, ``optimizer.zero_grad()`` clears the teacher too, ``student.zero_grad()`` not.

    Raises:
        TypeError: when `optimizer` is none.
        RuntimeError: at a step that a scaler makes which was not given: gradients would be taken for others.

    Example::

        handle = follow(teacher_optimizer, student_optimizer)
    """
    optimizer = plain_optimizer(optimizer)
    parameters = [p for group in teacher_optimizer.param_groups for p in group["params"]]
    _take_from_first_rank(parameters)

    def step_teacher(*_) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser skips GradScaler's overflows inside
        if found_inf is not None and found_inf:
            teacher_optimizer.zero_grad(set_to_none=True)
        _fill_where_another_rank_has_gradients(parameters)
        if all(p.grad is None for p in parameters):  # GradScaler raises on an optimiser without gradients
            return
        _average_over_ranks([p.grad for p in parameters if p.grad is not None])
        current = scaler_now(scaler)
        check_scaler(current)
        if current is None:
            teacher_optimizer.step()
        else:
            current.step(teacher_optimizer)
        teacher_optimizer.zero_grad(set_to_none=True)

    zero_grad = optimizer.zero_grad
    if not isinstance(zero_grad, _ZeroGrad):
        zero_grad = optimizer.zero_grad = _ZeroGrad(optimizer)  # type: ignore[method-assign]
    zero_grad.teachers.append(teacher_optimizer)
    forget = partial(zero_grad.forget, teacher_optimizer, optimizer)
    return FollowHandle(optimizer.register_step_post_hook(step_teacher), forget)


class FollowHandle:
    """Undoes :func:`follow`, which returns it.

    Args:
        step_handle: of the hook after the student optimiser's step.
        forget: ends the clearing of the teacher's gradients; once more does nothing.

    Example::

        handle = distiller.follow(student_optimizer)
        train()
        handle.remove()
    """

    def __init__(self, step_handle: RemovableHandle, forget: Callable[[], None]) -> None:
        self._step_handle, self._forget = step_handle, forget

    def remove(self) -> None:
        """Leave the student's optimiser as it was; once more does nothing."""
        self._step_handle.remove()
        self._forget()


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


def check_scaler(scaler: torch.amp.GradScaler | None) -> None:
    """
    Refuse a step of the student's optimiser that another scaler than the given one makes, from within its hook.

    A hook sees neither the scaler nor its factor, but it is called by it.

    Args:
        scaler: the one that is known of, or None.

    Raises:
        RuntimeError: when a GradScaler, enabled, that is not `scaler` is among the callers.
    """
    frame = sys._getframe(1)
    for _ in range(MAX_FRAMES_BELOW_SCALER):
        if frame is None:
            return
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(caller, torch.amp.GradScaler):
            if caller is not scaler and caller.is_enabled():
                raise RuntimeError(
                    "`scaler` must be the GradScaler that steps the student's optimiser but "
                    f"{'is None' if scaler is None else 'is another'}; give it to `follow` or `attach`."
                )
            return
        frame = frame.f_back


def is_distributed() -> bool:
    """Whether this is one of the processes of a group, which all must meet in each collective."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _take_from_first_rank(parameters: Sequence[Tensor]) -> None:
    """As DistributedDataParallel does with the student: processes may have been seeded differently."""
    if is_distributed():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.detach(), src=0)


def _fill_where_another_rank_has_gradients(parameters: Sequence[Tensor]) -> None:
    """Zeros, so that all ranks average the same tensors: a rank may have had no labelled row in this step."""
    if is_distributed() and parameters:
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        has_gradient = has_gradient.to(parameters[0].device)
        torch.distributed.all_reduce(has_gradient, torch.distributed.ReduceOp.MAX)
        for parameter, somewhere in zip(parameters, has_gradient.tolist()):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _average_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Mean over the processes of a distributed run: the teacher is in no DistributedDataParallel."""
    if is_distributed():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient.div_(torch.distributed.get_world_size()))
