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
    """The state of the generators of Python, NumPy, torch, and the current GPU (CUDA, MPS, XPU)."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.accelerator.is_available():
        state[_gpu_type()] = torch.get_device_module().get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of :func:`random_state`; without a GPU, the GPU's part is ignored."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if torch.accelerator.is_available() and _gpu_type() in state:
        torch.get_device_module().set_rng_state(state[_gpu_type()])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """
    Restore the global generators (torch, all GPUs, NumPy, Python) at the end; also a decorator.

    Code inside draws from the current state. The generators of GPUs are read only if these are in use: reading them
    would initialize CUDA, after which a process can no longer fork workers that use it.

    Example::

        >>> torch.manual_seed(0).initial_seed()
        0
        >>> with kept_random_state():
        ...     inside = torch.rand(())
        >>> torch.equal(inside, torch.rand(()))
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(_gpus_in_use(), device_type=_gpu_type()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_torch(device: torch.device, seed: int) -> None:
    """Seed the default generator of a device, from which dropout draws, and not those of GPUs that are not in use."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _gpu_type() -> str:
    """The kind of GPU that torch was built for."""
    gpu = torch.accelerator.current_accelerator()
    return "cuda" if gpu is None else gpu.type


def _gpus_in_use() -> range:
    """The numbers of the GPUs whose generators may have been used; asking does not initialize CUDA."""
    module = torch.get_device_module(_gpu_type())
    is_initialized = getattr(module, "is_initialized", torch.accelerator.is_available)  # MPS has no such function
    in_use = is_initialized() or torch.get_default_device().type == _gpu_type()
    return range(torch.accelerator.device_count() if in_use else 0)
