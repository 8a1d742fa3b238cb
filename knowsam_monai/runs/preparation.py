"""What a run's `initialize` does before anything is computed: errors in one sentence, folders that can be written."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn

from knowsam_monai.errors import KnowSAMError, KnowSAMPermissionError, KnowSAMValueError, root_cause

logger = logging.getLogger(__name__)


def explain_errors() -> None:
    """
    Let an error that ends the program close with its root cause in one line.

    MONAI's config parser wraps an exception several times and says last which expression failed; what was wrong stands
    far above. A mistake that this package found and says in a sentence is that sentence alone, without a traceback:
    that is in the run's log, and on the screen under ``python -X dev``. All other errors keep their traceback.

    Example::

        explain_errors()     # once, before anything else: of a bundle, the first line of `initialize`
    """
    previous = sys.excepthook
    if getattr(previous, "explains", False):
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        root = root_cause(error)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                record = logger.makeRecord(__name__, logging.ERROR, "", 0, "%s", (root,), (kind, error, trace))
                handler.handle(record)
        is_sentence = isinstance(root, KnowSAMError)
        if not is_sentence or sys.flags.dev_mode:
            previous(kind, error, trace)
        if is_sentence or root is not error:
            print(f"\n{type(root).__name__.removeprefix('KnowSAM')}: {root}", file=sys.stderr)

    explain.explains = True  # type: ignore[attr-defined]
    sys.excepthook = explain


def ignore_known_warnings() -> None:
    """
    Leave out warnings about MONAI's own calls, which nobody who runs a bundle can change, one by one.

    Example::

        ignore_known_warnings()     # once, before training
    """
    known = (
        (FutureWarning, r".*torch\.cuda\.amp\.GradScaler"),  # monai.engines.Trainer.run
        (UserWarning, r"Detected call of `lr_scheduler\.step\(\)` before"),  # its scheduler counts what it accumulates
    )
    for category, message in known:
        warnings.filterwarnings("ignore", message, category)


def keep_freed_memory() -> None:
    """
    Let glibc keep the memory that a step frees instead of asking the kernel for zeroed pages in the next one.

    On a CPU that spares about 100,000 page faults a step. It does nothing where the C library is another one.

    Example::

        keep_freed_memory()     # once, before training
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def fast_cpu_matmul() -> bool:
    """
    Let torch multiply float32 matrices on the CPU with oneDNN instead of MKL, which is faster on AMD's processors.

    ``torch.set_float32_matmul_precision("medium")`` routes them there. On some processors that means bfloat16, and it
    means less precision on CUDA: so this is for runs on a CPU, opt-in, and a probe of a linear layer and its gradients
    against float64 takes it back where any is off by more than 1e-5 of its largest value.

    Returns:
        whether the route was taken. A refusal is logged; the run goes on with torch's usual route.

    Example::

        fast_cpu_matmul()     # once, before training on a CPU
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = _linear_error()
    if error <= 1e-5:
        return True
    torch.set_float32_matmul_precision(previous)
    logger.warning(
        "`fast_cpu_matmul` must be exact to 1e-5 but is off by %.0e on this processor; torch's usual route is used.",
        error,
    )
    return False


def _linear_error() -> float:
    """Largest relative error of a float32 linear layer and of its gradients, against float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 768), (512, 768), (256, 512))  # input, weight, gradient of the output
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        x, weight, grad = (tensor.to(dtype) for tensor in tensors)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = F.linear(x, weight)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]

    pairs = zip(results(torch.float32), results(torch.float64))
    return max(float((single - double).abs().max() / double.abs().max()) for single, double in pairs)


def check_writable(*folders: str | os.PathLike, arguments: Sequence[str] = ("output_dir", "ckpt_dir")) -> None:
    """
    Make the folders a run will write to and try to write, before the hours of training and not after.

    Args:
        folders: made where they are missing.
        arguments: what names each of them, for the error.

    Raises:
        PermissionError: naming the folder that cannot be written, or has no room for 1 MiB, and the remedy.

    Example::

        check_writable("output", "models")
    """
    for folder, argument in zip(folders, arguments):
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))  # an empty file fits on a full disk too
                file.flush()
        except OSError as error:
            raise KnowSAMPermissionError(
                f"`{argument}` must be a folder that can be written but {os.fspath(folder)!r} cannot "
                f"({error.strerror}); name another, as in --{argument} /somewhere/else."
            ) from error


@torch.no_grad()
def check_student(
    network: nn.Module,
    in_channels: int,
    class_names: Sequence[str],
    num_classes: int,
    image_size: int | Sequence[int],
) -> None:
    """
    Give the student one empty slice or patch before any data is read, to see that sizes, channels and classes fit.

    Args:
        network: the student; left in the mode it was in.
        in_channels: channels of an image.
        class_names: names of the classes without the background.
        num_classes: C, background included.
        image_size: height and width of a slice, one number for both; or the size of a patch along each axis.

    Raises:
        ValueError: naming the key that does not fit.

    Example::

        >>> check_student(nn.Conv2d(1, 3, 1), in_channels=1, class_names=["RV", "LV"], num_classes=3, image_size=64)
    """
    if num_classes != len(class_names) + 1:
        raise KnowSAMValueError(
            f"`class_names` must name {num_classes - 1} classes, `num_classes` without the background, but is "
            f"{list(class_names)}; give the names alone, `num_classes` follows from them."
        )
    spatial = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    shape = (1, in_channels, *spatial)
    was_training = network.training
    device = next((parameter.device for parameter in network.parameters()), None)
    try:
        pred = network.eval()(torch.zeros(shape, device=device))
    except Exception as error:  # every network refuses in its own way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KnowSAMValueError(
            f"`network_def` must take images of `in_channels` and `image_size`, {shape}, but {type(network).__name__} "
            f"does not: {reason}"
        ) from None
    finally:
        network.train(was_training)
    expected = (1, num_classes, *spatial)
    if not isinstance(pred, torch.Tensor) or tuple(pred.shape) != expected:
        given = tuple(pred.shape) if isinstance(pred, torch.Tensor) else f"a {type(pred).__name__}"
        raise KnowSAMValueError(
            f"`network_def` must give logits {expected} in eval mode, background and each of `class_names`, but "
            f"{type(network).__name__} gives {given}; set its output channels to `num_classes` (a network of one "
            "sigmoid channel to 2)."
        )
