"""Process settings that make training and inference on a CPU faster."""

from __future__ import annotations

import ctypes
import logging
import time
from functools import cache

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

LARGEST_ERROR = 1e-5  # of float32 products, compared with float64


def keep_freed_memory() -> None:
    """
    Make glibc keep the memory that a step frees, instead of asking the kernel for zeroed pages in the next step.

    On a CPU this saves about 100,000 page faults per step and 300,000 per volume. With another C library it does
    nothing.

    Example::

        keep_freed_memory()     # once, before training or inference
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never; the largest number, 2 GiB, is less than a step frees


def fast_cpu_matmul() -> bool:
    """
    Make torch multiply float32 matrices on the CPU with oneDNN instead of MKL, if it is faster and as exact here.

    On AMD processors with AVX-512 it is up to twice as fast. It means
    ``torch.set_float32_matmul_precision("medium")``, which on some processors is bfloat16, and on CUDA less precision,
    so call it for runs on a CPU only. A short probe decides: the setting stays if products and gradients of a float32
    layer are within 1e-5 of float64, relative to the largest value, and take at most 4/5 of the time with MKL.

    Returns:
        True if oneDNN is used.

    Example::

        fast_cpu_matmul()     # once, before training on a CPU
    """
    previous = matmul_precision()
    if previous is None:
        return False
    if previous == "medium":
        return True
    is_better = _is_better("medium", previous)
    torch.set_float32_matmul_precision("medium" if is_better else previous)
    return is_better


def matmul_precision() -> str | None:
    """What ``torch.set_float32_matmul_precision`` set; None if torch's newer ``fp32_precision`` says something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def match_matmul(precision: str | None) -> None:
    """
    Multiply float32 matrices on the CPU as the run did that is resumed, unless that is less exact on this machine.

    Args:
        precision: what :func:`matmul_precision` returned there.
    """
    previous = matmul_precision()
    if None not in (precision, previous) and precision != previous:
        torch.set_float32_matmul_precision(precision)
        if _largest_error() > LARGEST_ERROR:
            torch.set_float32_matmul_precision(previous)
            logger.warning("Matrix products as in the interrupted run would be less exact on this CPU, so they differ.")


@cache
def _is_better(precision: str, other: str) -> bool:
    torch.set_float32_matmul_precision(precision)
    return _largest_error() <= LARGEST_ERROR and _is_faster(precision, other)


def _largest_error() -> float:
    """Largest relative error of float32 products and their gradients on the CPU, compared with float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 768), (512, 768), (256, 512))  # input, weight, gradient of the output
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        x, weight, grad = (tensor.to(dtype) for tensor in tensors)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = F.linear(x, weight)
        heads = x.detach().view(256, 12, 64).transpose(0, 1)
        return [y.detach(), heads @ heads.mT, *torch.autograd.grad(y, (x, weight), grad)]

    pairs = zip(results(torch.float32), results(torch.float64))
    return max(float((single - double).abs().max() / double.abs().max()) for single, double in pairs)


def _is_faster(precision: str, other: str) -> bool:
    """
    Whether a layer of SAM's encoder takes at most 4/5 of the time.

    The fastest of four rounds in turns counts, in CPU time of one thread, so that other programs hardly matter.
    """
    x, weight, threads = torch.ones(256, 768), torch.ones(1536, 768), torch.get_num_threads()
    seconds: dict[str, list[float]] = {other: [], precision: []}
    torch.set_num_threads(1)
    for name in 4 * list(seconds):
        torch.set_float32_matmul_precision(name)
        start = time.thread_time()
        y = x @ weight.T
        y @ weight, y.T @ x  # the gradients' products
        seconds[name].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return min(seconds[precision]) <= 0.8 * min(seconds[other])
