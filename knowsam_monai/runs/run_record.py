"""What a run records about itself in its folder: the config as run, an entry for each start, and the log."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

import knowsam_monai
from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import write_text
from knowsam_monai.runs.config import plain_values, running_config
from knowsam_monai.runs.trained_student import STARTS, STUDENT_SETTINGS, training_data
from knowsam_monai.teachers.provenance import describe
from knowsam_monai.texts import command_line

logger = logging.getLogger(__name__)

CONFIG, LOG = "config.json", "log.txt"
PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel", "segment-anything")


class RunRecord:
    """
    Write ``config.json`` and ``run.json`` into a run's folder when training starts.

    - ``config.json``: the merged config as run, including overlays and the command line. `monai.bundle run` accepts it.
      It is written only if a bundle's config builds this handler.
    - ``run.json``: one entry for each start, with time, command, folder, bundle, seed, teacher, versions, the
      student's settings, a scan to segment and, if the package lies in a git working tree, its revision.

    Put it after :class:`Resume`: a start that is refused there leaves the record unchanged.

    Args:
        output_dir: the run's folder, created if missing.
        seed: recorded as given.
        resume: True adds to the entries of earlier starts, False discards them.
        teacher: the teacher, if there is one.
        data: for each set, the files and the hashes of their contents, see :func:`check_data`.

    Example::

        SupervisedTrainer(..., train_handlers=[Resume(objects, "output"), RunRecord("output", seed=0)])
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        seed: int | None = None,
        resume: bool = True,
        teacher: nn.Module | None = None,
        data: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.resume = resume
        self.teacher = None if teacher is None else describe(teacher)
        self.data = data or {}
        self.config = running_config()

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Resume`."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if ranks.rank() != 0:
            return
        if self.config is not None:
            write_text(self.output_dir / CONFIG, json.dumps(self.config, indent=4, default=str))
        start = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "timestamp": time.time(),
            "command": command_line(sys.orig_argv),
            "seed": self.seed,
            "teacher": self.teacher,
            "git_revision": git_revision(Path(knowsam_monai.__file__)),
            "versions": versions(),
            "student": self._student(),
            **self._for_next_steps(),
        }
        starts = [*(self._earlier_starts() if self.resume else []), start]
        write_text(self.output_dir / STARTS, json.dumps({"starts": starts}, indent=1))

    def _student(self) -> dict[str, Any] | None:
        """What those need to know who use the run's student."""
        values = plain_values(self.config or {})
        if "dataset_dir" not in values:
            return None
        return {
            "run": self.output_dir.resolve().name,
            "trained_on": training_data(self.config),
            "settings": {key: values[key] for key in STUDENT_SETTINGS if key in values},
        }

    def _for_next_steps(self) -> dict[str, Any]:
        """What :func:`knowsam_monai.runs.next_steps.next_steps` needs to know."""
        values = plain_values(self.config or {})
        bundle_root, has_one_channel = values.get("bundle_root"), values.get("in_channels", 1) == 1
        split = "test" if self.data.get("test") else "validation"
        files = [os.path.abspath(file) for file, _ in self.data.get(split, ())]
        return {
            "folder": os.getcwd(),
            "bundle_root": None if bundle_root is None else os.path.abspath(bundle_root),
            "split": split,
            "scan": files[0] if files and has_one_channel else None,  # of several, each may have a file of its own
        }

    def _earlier_starts(self) -> list[dict[str, Any]]:
        try:
            return read_starts(self.output_dir)
        except ValueError as error:
            logger.warning(
                "%s must list the run's starts but cannot be read (%s); it is replaced.",
                self.output_dir / STARTS,
                error,
            )
            return []


class RunLog(logging.FileHandler):
    """The log file of a run. If it cannot be written anymore, it warns once and stops."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logger.warning("%s cannot be written anymore (%s); the run continues without it.", LOG, sys.exc_info()[1])


def open_log(folder: str | os.PathLike, resume: bool = True) -> None:
    """
    From now on, write everything that is logged to ``log.txt`` in a run's folder too; for a bundle's `run`.

    Args:
        folder: the run's folder, created if missing.
        resume: True appends to an existing log, False replaces it.

    Raises:
        PermissionError: if the file cannot be written.

    Example:
        >>> open_log("output")     # doctest: +SKIP
    """
    close_log()
    path = Path(folder) / LOG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RunLog(path, mode="a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise KnowSAMPermissionError(
            f"`output_dir` must be writable but {path} is not ({error.strerror}); choose another --output_dir, or "
            "remove what is in the way."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def close_log() -> None:
    """Close the log file of an earlier run in the same process."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, RunLog)]:
        root.removeHandler(handler)
        handler.close()


def read_starts(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read the entries of a folder's ``run.json``; an empty list if there is no such file.

    Args:
        folder: the run's folder.

    Raises:
        ValueError: if the file is damaged or of another format.
    """
    path = Path(folder) / STARTS
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise KnowSAMValueError("it has no list of `starts`")
    return starts


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that affect a run's numbers, and the machine."""
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
    """
    The commit of the working tree that tracks a file, with ``-dirty`` appended if there are local changes.

    Students in the bundles' `models` folders, which every training replaces, do not count as changes.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # fails in an environment that merely lies in a repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bundles/*/models/*")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
