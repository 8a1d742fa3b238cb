"""Processes that tests start, kill and let talk to each other; what they need is loaded once and forked."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("monai.bundle", "monai.engines", "pytest", "segment_anything", "torch.utils.tensorboard"),
        *("knowsam_monai.data.loader", "knowsam_monai.handlers", "knowsam_monai.networks"),
        *("knowsam_monai.runs.finishing", "knowsam_monai.runs.validation_report", "knowsam_monai.runs.values"),
    ]
)


def start(log: Path, target: Callable, *args: Any, **kwargs: Any) -> BaseProcess:
    """A process that calls `target`, a function of a module, and writes what it says into `log`."""
    process = CONTEXT.Process(target=_call, args=(str(log), os.getcwd(), target, args, kwargs))
    process.start()
    return process


def finish(process: BaseProcess, log: Path, seconds: float = 300) -> int:
    """Its exit code, negative for a signal; a process that does not end is killed and fails the test."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a process did not end in {seconds} s: {log.read_text()[-3000:]}")
    return process.exitcode


def run_module(log: Path, module: str, *words: Any) -> tuple[int, str]:
    """Exit code and output of `python -m module words` where the interpreter's start is not what is tested."""
    code = finish(start(log, _run_module, module, *map(str, words)), log)
    assert code >= 0, f"the process died of signal {-code}: {log.read_text()[-3000:]}"
    return code, log.read_text()


def wait_for(condition: Callable[[], Any], process: BaseProcess, seconds: float = 300) -> bool:
    """Whether the condition came true before the process ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        if process.exitcode is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError(f"nothing came in {seconds} s")


def start_ranks(
    folder: Path, world_size: int, target: Callable, *args: Any, in_group: bool = True, **kwargs: Any
) -> list[BaseProcess]:
    """
    Processes of one gloo group, each calling `target`; they write rank0.log, rank1.log, ...

    With `in_group` False they have torchrun's environment, and `target` makes the group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(folder / f"rank{rank}.log", _as_rank, rank, world_size, port, in_group, target, args, kwargs)
        for rank in range(world_size)
    ]


def _call(log: str, folder: str, target: Callable, args: tuple, kwargs: dict) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.chdir(folder)
    os.setsid()  # a signal to it and its workers reaches nobody else
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a run of its own
    import torch

    torch.set_num_threads(1)
    target(*args, **kwargs)


def _run_module(module: str, *words: str) -> None:
    sys.argv = [module, *words]
    sys.stdout.reconfigure(line_buffering=True)  # the error comes last, as on a screen
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the interpreter does; multiprocessing would print every traceback
        sys.exit(1)


def _as_rank(
    rank: int, world_size: int, port: int, in_group: bool, target: Callable, args: tuple, kwargs: dict
) -> None:
    import torch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if in_group:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    target(*args, **kwargs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
