"""How a training starts and ends, in one process or in several."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import ignite.distributed as idist
import torch
import torch.distributed as dist

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError
from knowsam_monai.runs.checks import check_writable
from knowsam_monai.runs.cpu import fast_cpu_matmul, keep_freed_memory
from knowsam_monai.runs.lock import lock_folder, unlock_folder
from knowsam_monai.runs.messages import ignore_known_warnings
from knowsam_monai.runs.run_record import open_log
from knowsam_monai.runs.stop_signals import end_on_signals, give_back


def start_run(
    output_dir: str | os.PathLike,
    ckpt_dir: str | os.PathLike,
    device: torch.device,
    resume: bool = True,
    preflight: bool = False,
    fast_matmul: bool = False,
    process_timeout: float | None = None,
) -> None:
    """
    Prepare a training: connect the processes, check and lock the folders, and open the log.

    It is the first step of a bundle's `run`: a program that only loads a bundle, as ``monai.bundle.load`` does, gets
    none of this.

    Args:
        output_dir: folder of the run.
        ckpt_dir: folder that the best student is copied to.
        device: device of this process.
        resume: append to an existing log.
        preflight: write no log.
        fast_matmul: see :func:`knowsam_monai.runs.cpu.fast_cpu_matmul`; ignored unless on a CPU.
        process_timeout: seconds that processes wait for each other; None for a single process.

    Raises:
        PermissionError: if a folder cannot be written.
        RuntimeError: if `process_timeout` is given and ``torchrun`` did not start this process, or if another run uses
            `output_dir`.

    Example::

        start_run("output", "models", torch.device("cpu"))
    """
    ignore_known_warnings()
    end_on_signals()
    keep_freed_memory()
    if process_timeout is not None:
        _join_processes(device, process_timeout)
    check_writable(output_dir=output_dir, ckpt_dir=ckpt_dir)
    lock_folder(output_dir, not preflight)
    open_log(output_dir, resume, not preflight)
    if fast_matmul and device.type == "cpu":
        fast_cpu_matmul()


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
    give_back()
    unlock_folder()
    if process_timeout is not None and ranks.is_distributed():
        dist.destroy_process_group()


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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logging.getLogger().setLevel(logging.ERROR if ranks.rank() > 0 else logging.INFO)
