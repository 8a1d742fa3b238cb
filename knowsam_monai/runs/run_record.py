"""What a run leaves about itself in its folder: the config as run, a line about each start, and the log."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import knowsam_monai
from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import write_text

logger = logging.getLogger(__name__)

CONFIG, STARTS, LOG = "config.json", "run.json", "log.txt"
PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel", "segment-anything")


class RunLog(logging.FileHandler):
    """The log file of a run, on the root logger. Where it can't be written any more, it says so once and ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logger.warning("%s can't be written any more (%s); the run goes on without it.", LOG, sys.exc_info()[1])


def write_record(
    folder: str | os.PathLike, config: dict[str, Any] | None = None, seed: int | None = None, resume: bool = True
) -> None:
    """
    Write ``config.json`` and ``run.json``.

    - ``config.json``: the merged config as it runs, overlays and command line included. `monai.bundle run` takes it.
    - ``run.json``: one entry for each start of the run with time, command, seed, versions and, where the package lies
      in a git working tree, its revision.

    Args:
        folder: the run's, made when missing.
        config: of :func:`knowsam_monai.runs.config.running_config`; None leaves that file out.
        seed: noted as it is.
        resume: True adds to the starts that are there, False begins anew.

    Example:
        >>> write_record("output", {"lr": 0.1}, seed=0)     # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_text(folder / CONFIG, json.dumps(config, indent=4, default=str))
    starts = _earlier_starts(folder) if resume else []
    starts.append(
        {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "timestamp": time.time(),
            "command": shlex.join(sys.orig_argv),
            "seed": seed,
            "git_revision": git_revision(Path(knowsam_monai.__file__)),
            "versions": versions(),
        }
    )
    write_text(folder / STARTS, json.dumps({"starts": starts}, indent=1))


def open_log(folder: str | os.PathLike, resume: bool = True, enabled: bool = True) -> None:
    """
    Write whatever is logged from here on to ``log.txt`` in a run's folder too; for a bundle's `run`.

    Args:
        folder: the run's, made when missing.
        resume: True adds to the log that is there, False begins anew.
        enabled: False does nothing (a preflight). Under several processes all but the first do nothing either.

    Raises:
        PermissionError: when the file cannot be written.

    Example:
        >>> open_log("output")     # doctest: +SKIP
    """
    if not enabled or ranks.rank() > 0:
        return
    close_log()
    path = Path(folder) / LOG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RunLog(path, mode="a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise KnowSAMPermissionError(
            f"`output_dir` must be a folder that can be written but {path} cannot ({error.strerror}); name another "
            "--output_dir, or free that file."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def close_log() -> None:
    """Close the log file of the run before this one in the same process."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, RunLog)]:
        root.removeHandler(handler)
        handler.close()


def read_starts(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    The entries of a folder's ``run.json``; none where there is no such file.

    Args:
        folder: the run's.

    Raises:
        ValueError: when the file is torn or another's.
    """
    path = Path(folder) / STARTS
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise KnowSAMValueError("it has no list of `starts`")
    return starts


def _earlier_starts(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_starts(folder)
    except ValueError as error:
        logger.warning("%s must list the run's starts but can't be read (%s); it begins anew.", folder / STARTS, error)
        return []


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the numbers of a run depend on; the device's name too."""
    found = {"knowsam_monai": knowsam_monai.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_revision(file: Path) -> str | None:
    """Commit of the working tree that a file is part of, with ``-dirty`` after it where that differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment in someone's repository is no part of it
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
