"""Locking a run's folder, so that only one run at a time writes there."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from knowsam_monai.errors import KnowSAMRuntimeError
from knowsam_monai.files import LOCK, write_text
from knowsam_monai.texts import command_line

logger = logging.getLogger(__name__)

HOLDER = ".lock.json"
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # answers of a file system

_held: list[FileLock] = []  # of this process, at most one


def lock_folder(folder: str | os.PathLike) -> None:
    """
    Lock a run's folder until :func:`unlock_folder`, the next run in this process, or the end of the process.

    The operating system releases the lock however the process ends, so the files that a killed run leaves behind do
    not matter. The lock is ``flock`` (``LockFileEx`` on Windows). It works between all processes of a machine, and
    between machines if their shared file system supports it: NFS unless mounted with ``nolock`` or ``local_lock``,
    Lustre with ``flock``, CephFS and GPFS always. On a file system without locks there is a warning and no lock.

    Args:
        folder: the run's folder, created if missing.

    Raises:
        RuntimeError: if another process holds the lock, naming it.

    Example:
        >>> lock_folder("output")     # doctest: +SKIP
    """
    unlock_folder()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise KnowSAMRuntimeError(
            f"`output_dir` must not be used by another run but {folder} is in use by {_holder(folder)}; wait for "
            "that run, stop it, or choose another --output_dir."
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning(
            "%s cannot be locked (%s), so nothing keeps a second run out of it; start only one at a time there.",
            folder,
            error.strerror,
        )
        return
    _held.append(lock)
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "command": command_line(sys.orig_argv)}
    write_text(folder / HOLDER, json.dumps(holder))


def unlock_folder() -> None:
    """
    Release the lock of :func:`lock_folder`, if there is one.

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
    except (OSError, ValueError, KeyError, TypeError):  # it is only just taking the lock, or releasing it
        return "another process"
