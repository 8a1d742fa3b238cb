"""Remove the wrappers that other libraries put around a network or an optimizer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from knowsam_monai.errors import KnowSAMTypeError


def plain_network(network: nn.Module) -> nn.Module:
    """
    The network inside torch.compile, DistributedDataParallel and DataParallel, in any order.

    Args:
        network: wrapped or not.

    Example::

        >>> network = nn.Conv2d(1, 2, 3)
        >>> plain_network(DataParallel(network)) is network
        True
    """
    while True:
        if isinstance(network, (DataParallel, DistributedDataParallel)):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod
        else:
            return network


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """
    The optimizer that runs the step hooks, inside wrappers such as Accelerate's and Lightning's.

    An optimizer built on another (Lookahead) with hooks of its own is returned unchanged.

    Args:
        optimizer: wrapped or not.

    Raises:
        TypeError: if there is none.

    Example::

        >>> import torch
        >>> optimizer = torch.optim.SGD(nn.Conv2d(1, 2, 3).parameters(), lr=0.1)
        >>> plain_optimizer(optimizer) is optimizer
        True
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer) and not _has_own_hooks(inner):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        remedy = "the optimizer inside it" if hasattr(inner, "param_groups") else "the one that trains the network"
        raise KnowSAMTypeError(
            f"`optimizer` must be a torch.optim.Optimizer but is a {type(optimizer).__name__}; pass {remedy}."
        )
    return inner


def stepped_parameters(optimizer: Optimizer | None) -> list[Tensor]:
    """
    The parameters that an optimizer steps; none if there is no optimizer.

    Args:
        optimizer: any optimizer, or None.

    Raises:
        TypeError: if it is something else.

    Example::

        >>> stepped_parameters(None)
        []
    """
    if optimizer is None:
        return []
    if not hasattr(optimizer, "param_groups"):
        raise KnowSAMTypeError(f"`optimizer` must be a torch.optim.Optimizer but is a {type(optimizer).__name__}.")
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_own_hooks(optimizer: Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return hooks is not None and hooks is not getattr(optimizer.optimizer, "_optimizer_step_post_hooks", None)
