"""Seeds derived from several numbers, and the state of a process's global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """
    One 32-bit seed from several numbers, the same on every machine.

    Example:
        >>> derive_seed(0, 7) == derive_seed(0, 7), derive_seed(0, 7) == derive_seed(7, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_state() -> dict[str, Any]:
    """The state of the generators of Python, NumPy, torch, and the current GPU."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of :func:`random_state`; without a GPU, the GPU's part is ignored."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """
    Restore the global generators (torch, all GPUs, NumPy, Python) at the end; also a decorator.

    Code inside draws from the current state. The generators of GPUs are read only if CUDA is in use: reading them would
    initialize CUDA, after which a process can no longer fork workers that use it.

    Example::

        >>> torch.manual_seed(0).initial_seed()
        0
        >>> with kept_random_state():
        ...     inside = torch.rand(())
        >>> torch.equal(inside, torch.rand(()))
        True
    """
    uses_cuda = torch.cuda.is_initialized() or torch.get_default_device().type == "cuda"
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if uses_cuda else ()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
