"""How a training starts and ends, in one process or in several."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed as dist

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError, named_as_set
from knowsam_monai.runs.checks import check_writable
from knowsam_monai.runs.config import keys_of_arguments, running_parser
from knowsam_monai.runs.cpu import fast_cpu_matmul, keep_freed_memory, matmul_precision
from knowsam_monai.runs.lock import lock_folder, unlock_folder
from knowsam_monai.runs.messages import ignore_known_warnings
from knowsam_monai.runs.run_record import open_log
from knowsam_monai.runs.stop_signals import end_on_signals, give_back

_at_the_end = ExitStack()  # gives back torch's precision


def start_run(
    output_dir: str | os.PathLike,
    ckpt_dir: str | os.PathLike,
    device: torch.device,
    resume: bool = True,
    preflight: bool = False,
    fast_matmul: bool = False,
    process_timeout: float | None = None,
    build: Sequence[str] = (),
) -> None:
    """
    Prepare a training: connect the processes, check and lock the folders, open the log, and build the trainer.

    It is the first step of a bundle's `run`: a program that only loads a bundle, as ``monai.bundle.load`` does, gets
    none of this. MONAI calls a config's `finalize` only after a run without errors. So what is likely to fail before
    the trainer starts is built here, and if it fails, signal handlers and lock are released.

    Args:
        output_dir: folder of the run.
        ckpt_dir: folder that the best student is copied to.
        device: device of this process.
        resume: append to an existing log; False replaces it and, once all is built, removes the curves of an earlier
            run.
        preflight: write no log and remove nothing.
        fast_matmul: see :func:`knowsam_monai.runs.cpu.fast_cpu_matmul`; ignored unless on a CPU.
        process_timeout: seconds that processes wait for each other; None for a single process.
        build: ids of the running config to build, in this order.

    Raises:
        PermissionError: if a folder cannot be written.
        RuntimeError: if `process_timeout` is given and ``torchrun`` did not start this process, if it is not and
            ``torchrun`` started several, or if another run uses `output_dir`.

    Example::

        start_run("output", "models", torch.device("cpu"))
    """
    ignore_known_warnings()
    end_on_signals()
    precision = matmul_precision()
    if precision is not None:
        _at_the_end.callback(torch.set_float32_matmul_precision, precision)  # on CUDA it matters too
    try:
        keep_freed_memory()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # whose random state a resumed run restores
        if process_timeout is not None:
            _join_processes(device, process_timeout)
        elif not ranks.is_distributed() and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise KnowSAMRuntimeError(
                f"`process_timeout` must be set for the {os.environ['WORLD_SIZE']} processes of torchrun (WORLD_SIZE) "
                "but is None; add the config multi_gpu_train.json (`knowsam train`: --with multi_gpu_train)."
            )
        check_writable(output_dir=output_dir, ckpt_dir=ckpt_dir)
        old_curves: list[Path] = []
        if ranks.rank() == 0 and not preflight:
            lock_folder(output_dir)
            open_log(output_dir, resume)
            old_curves = [] if resume else _curves(Path(output_dir))
        if fast_matmul and device.type == "cpu":
            fast_cpu_matmul()
        parser = running_parser()
        for name in build:
            with named_as_set(keys_of_arguments(parser[name], parser.config)):
                parser.get_parsed_content(name)
        for file in old_curves:  # not before the data and the settings are accepted
            file.unlink()
    except BaseException:
        release()
        raise


def seed_ranks(seed: int) -> None:
    """
    Give each of several processes its own random numbers; a single process keeps its random state.

    Args:
        seed: seed of the run.

    Example::

        seed_ranks(0)     # after the networks are built, which must be the same in all processes
    """
    if ranks.world_size() > 1:
        torch.manual_seed(seed + ranks.rank())


def end_run(process_timeout: float | None = None) -> None:
    """
    Release what :func:`start_run` acquired: signal handlers, the lock of the folder, and the process group.

    Args:
        process_timeout: the value given to :func:`start_run`; None keeps the process group.

    Example::

        end_run()     # when the run is over: in a bundle, in `finalize`
    """
    release()
    if process_timeout is not None and ranks.is_distributed():
        dist.destroy_process_group()


def release() -> None:
    """
    Give back signal handlers, torch's precision and the lock of the folder. After an error the log stays open, for
    the traceback.

    Example:
        >>> release()
    """
    give_back()
    _at_the_end.close()
    unlock_folder()


def _curves(output_dir: Path) -> list[Path]:
    """The event files that an earlier training wrote; TensorBoard would draw them over the new ones."""
    folders = [output_dir / "tensorboard" / name for name in ("train", "validation")]
    return [file for folder in folders for file in folder.glob("**/events.out.tfevents.*")]


def _join_processes(device: torch.device, timeout: float) -> None:
    """Join the group of processes that torchrun started, and let only the first one log."""
    if not ranks.is_distributed():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except ValueError as error:  # torchrun's environment variables are missing
            raise KnowSAMRuntimeError(
                f"`process_timeout` must be None unless torchrun started this process but is {timeout}; start "
                "configs/multi_gpu_train.json with `torchrun --nproc_per_node=2 -m monai.bundle run ...`."
            ) from error
    idist.sync()
    logging.getLogger().setLevel(logging.ERROR if ranks.rank() > 0 else logging.INFO)
