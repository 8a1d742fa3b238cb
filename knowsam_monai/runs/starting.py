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
    Get ready to train: processes that know each other, folders that can be written, a log.

    For the first line of a bundle's `run`: who only loads a bundle, as ``monai.bundle.load`` does, gets none of this.

    Args:
        output_dir: folder of the run.
        ckpt_dir: folder that the best student is copied to.
        device: of this process.
        resume: add to the log of the run before.
        preflight: write no log.
        fast_matmul: see :func:`knowsam_monai.runs.cpu.fast_cpu_matmul`; on a CPU only.
        process_timeout: seconds that processes wait for each other; None for one process.

    Raises:
        PermissionError: when a folder cannot be written.
        RuntimeError: when several processes are asked for and ``torchrun`` has not started this one.

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
    if ranks.rank() == 0:
        open_log(output_dir, resume, not preflight)
    if fast_matmul and device.type == "cpu":
        fast_cpu_matmul()


def seed_ranks(seed: int) -> None:
    """
    Let each of several processes draw its own random numbers; one process alone goes on with those it has.

    Args:
        seed: of the run.

    Example::

        seed_ranks(0)     # after networks are built, which must be the same in all
    """
    if ranks.world_size() > 1:
        torch.manual_seed(seed + ranks.rank())


def end_run(process_timeout: float | None = None) -> None:
    """
    Undo what :func:`start_run` took for the process: signals, the lock of the folder, the group of processes.

    Args:
        process_timeout: as :func:`start_run` had it; None leaves a group alone.

    Example::

        end_run()     # when the run is over: of a bundle, in `finalize`
    """
    give_back()
    unlock_folder()
    if process_timeout is not None and ranks.is_distributed():
        dist.destroy_process_group()


def _join_processes(device: torch.device, timeout: float) -> None:
    """Meet the processes that torchrun has started, and leave logging to the first."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except ValueError as error:  # what torchrun sets in the environment is missing
            raise KnowSAMRuntimeError(
                f"`process_timeout` must be None for a process that torchrun has not started but is {timeout}; start "
                "configs/multi_gpu_train.json with `torchrun --nproc_per_node=2 -m monai.bundle run ...`."
            ) from error
    idist.sync()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logging.getLogger().setLevel(logging.ERROR if ranks.rank() > 0 else logging.INFO)
