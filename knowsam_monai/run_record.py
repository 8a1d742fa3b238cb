"""What a run leaves about itself in its folder: the config as run, a line about each start, and the log."""

from __future__ import annotations

import inspect
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
from monai.bundle import ConfigParser

import knowsam_monai

CONFIG, STARTS, LOG = "config.json", "run.json", "log.txt"
PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel", "segment-anything")


class RunLog(logging.FileHandler):
    """The log file of a run, on the root logger."""


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
        config: of :func:`running_config`; None leaves that file out.
        seed: noted as it is.
        resume: True adds to the starts that are there, False begins anew.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        ConfigParser.export_config_file(config, str(folder / CONFIG), indent=4, default=str)
    starts = read_starts(folder) if resume else []
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
    (folder / STARTS).write_text(json.dumps({"starts": starts}, indent=1), encoding="utf-8")


def open_log(folder: str | os.PathLike, resume: bool = True, enabled: bool = True) -> None:
    """
    Write whatever is logged from here on to ``log.txt`` in a run's folder too; for a bundle's `initialize`.

    Args:
        folder: the run's, made when missing.
        resume: True adds to the log that is there, False begins anew.
        enabled: False does nothing (a preflight). Under several processes all but the first do nothing either.
    """
    if not enabled or os.environ.get("RANK", "0") != "0":
        return
    close_log()
    Path(folder).mkdir(parents=True, exist_ok=True)
    handler = RunLog(Path(folder) / LOG, mode="a" if resume else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def close_log() -> None:
    """Close the log file of the run before this one in the same process."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, RunLog)]:
        root.removeHandler(handler)
        handler.close()


def read_starts(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a folder's ``run.json``; none where there is no such file."""
    path = Path(folder) / STARTS
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []


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


def running_config() -> dict[str, Any] | None:
    """
    The config whose parser is building what this was called from; None outside of one.

    A component of a config is given what it refers to and never the config itself, so it is looked for in the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            return {key: value for key, value in parser.config.items() if key != parser.meta_key}
        frame = frame.f_back
    return None
