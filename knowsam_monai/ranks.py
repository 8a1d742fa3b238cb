"""Which of a run's processes this is; everything in the package asks here."""

from __future__ import annotations

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process belongs to a group, in which all must join each collective operation."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process in its group; 0 without one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes the group has; 1 without one."""
    return dist.get_world_size() if is_distributed() else 1
