"""Gradients that an attachment adds: to the outputs behind the student's logits, and to SAM's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.tensors import mapped_tensors


class SAMGradients:
    """
    Gradients that attachments have added to SAM's parameters since its last step.

    SAM may teach several students. If the host of one drops its step, only that student's part is taken back.

    Example::

        >>> gradients, parameter = SAMGradients(), nn.Parameter(torch.zeros(1))
        >>> first, second = object(), object()
        >>> gradients.add(first, parameter, torch.tensor([1.0]))
        >>> gradients.add(second, parameter, torch.tensor([2.0]))
        >>> gradients.withdraw(first)
        >>> parameter.grad
        tensor([2.])
    """

    def __init__(self) -> None:
        self._added: dict[nn.Parameter, dict[int, Tensor]] = {}  # by the id of the owner

    def add(self, owner: object, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient to what a parameter has, and remember whose it is."""
        added = self._added.setdefault(parameter, {})
        if parameter.grad is None:
            added.clear()
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        is_alone = added.keys() <= {id(owner)}
        added[id(owner)] = parameter.grad if is_alone else added.get(id(owner), 0) + gradient

    def withdraw(self, owner: object) -> None:
        """Take back what one owner added."""
        for parameter, added in self._added.items():
            own = added.pop(id(owner), None)
            if own is not None and parameter.grad is not None:
                parameter.grad = parameter.grad - own if added else None

    def settle(self, owner: object) -> None:
        """Forget what one owner added, as its student has stepped."""
        for added in self._added.values():
            added.pop(id(owner), None)


def output_gradients(
    logits_of: Callable[[Any], Tensor], output: Any, logits: Tensor, gradient: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """
    The tensors of a student's output from which its logits are computed, each with its gradient.

    The host computes its logits from the output again, as other tensors, so a hook on ours would see nothing.

    Args:
        logits_of: computes the logits.
        output: the student's.
        logits: ``logits_of(output)``.
        gradient: of `logits`; None: no loss depends on them.
    """
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf_of(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        return leaves.setdefault(id(tensor), (tensor, tensor.detach().requires_grad_()))[1]

    picked = logits_of(mapped_tensors(output, leaf_of))
    given = torch.ones_like(picked) if gradient is None else gradient.to(picked.dtype)
    inputs = [leaf for _, leaf in leaves.values()]
    parts = torch.autograd.grad(picked, inputs, given, retain_graph=True, allow_unused=True) if inputs else ()
    pairs = [(tensor, part) for (tensor, _), part in zip(leaves.values(), parts) if part is not None]
    if not pairs:  # the student keeps its logits elsewhere
        return [(logits, gradient)]
    return [(tensor, None if gradient is None else part) for tensor, part in pairs]
