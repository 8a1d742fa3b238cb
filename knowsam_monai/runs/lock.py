"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError
from knowsam_monai.files import LOCK, write_text

HOLDER = ".lock.json"

_held: list[FileLock] = []  # of this process: one run's


def lock_folder(folder: str | os.PathLike, enabled: bool = True) -> None:
    """
    Keep a run's folder to this process, until :func:`unlock_folder`, the next run in this process, or its end.

    The operating system gives the lock up when the process ends, however that happens: the files that a killed run
    leaves do not matter. It is ``flock`` (``LockFileEx`` on Windows): it holds among all processes of a machine, and
    among machines where the shared file system passes it on, as NFS does unless mounted with ``nolock`` or
    ``local_lock``, Lustre with ``flock``, and CephFS and GPFS always.

    Args:
        folder: the run's, made when missing.
        enabled: False does nothing (a preflight). Under several processes all but the first do nothing either.

    Raises:
        RuntimeError: when another process holds the folder; it says which.

    Example:
        >>> lock_folder("output")     # doctest: +SKIP
    """
    if not enabled or ranks.rank() != 0:
        return
    unlock_folder()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise KnowSAMRuntimeError(
            f"`output_dir` must be the folder of one run at a time but {folder} is in use by {_holder(folder)}; wait "
            "for it, stop it, or name another --output_dir."
        ) from None
    _held.append(lock)
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "command": shlex.join(sys.orig_argv)}
    write_text(folder / HOLDER, json.dumps(holder))


def unlock_folder() -> None:
    """
    Let another run have the folder of :func:`lock_folder`; without one before it, do nothing.

    Example:
        >>> unlock_folder()
    """
    while _held:
        lock = _held.pop()
        (Path(lock.lock_file).parent / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return "process {pid} on {host} since {since} ({command})".format(**holder)
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or lets go
        return "another process"
