"""What others put around a network or an optimiser, taken off."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from knowsam_monai.errors import KnowSAMTypeError


def plain_network(network: nn.Module) -> nn.Module:
    """
    The network inside torch.compile, DistributedDataParallel and DataParallel, in whatever order.

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
    The optimiser that has the hooks, inside a wrapper that has it as `optimizer`, as Accelerate's and Lightning's do.

    An optimiser that is built on another (Lookahead) and has hooks of its own is taken as it is.

    Args:
        optimizer: wrapped or not.

    Raises:
        TypeError: when there is none.

    Example::

        >>> import torch
        >>> optimizer = torch.optim.SGD(nn.Conv2d(1, 2, 3).parameters(), lr=0.1)
        >>> plain_optimizer(optimizer) is optimizer
        True
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer) and not _has_hooks_of_its_own(inner):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise KnowSAMTypeError(
            f"`optimizer` must be a torch.optim.Optimizer but is a {type(optimizer).__name__}; give the one inside "
            "of it, which has the hooks."
        )
    return inner


def _has_hooks_of_its_own(optimizer: Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return hooks is not None and hooks is not getattr(optimizer.optimizer, "_optimizer_step_post_hooks", None)
