from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from ignite.handlers.checkpoint import BaseSaveHandler, DiskSaver
from monai.handlers import CheckpointSaver

from knowsam_monai import ranks
from knowsam_monai.files import save_checkpoint


class WholeCheckpointSaver(CheckpointSaver):
    """
    MONAI's ``CheckpointSaver``, except that its files are complete and finite even if the process is killed.

    MONAI's saver deletes the best model before it writes the better one, writes in place, and accepts any weights. This
    one writes under a temporary name, renames, deletes the outdated file last, and refuses weights that are not finite.
    Its `n_saved` also counts the files that an earlier start of the same run saved at intervals.

    Args:
        *args: arguments of MONAI's ``CheckpointSaver``, like `**kwargs`.

    Raises:
        RuntimeError: during the run, if weights are not finite or a file cannot be written.

    Example::

        WholeCheckpointSaver(save_dir="output", save_dict={"model": network}, save_key_metric=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                checkpoint.save_handler = _WholeFiles(checkpoint.save_handler)
        self._knows_earlier_files = self._interval_checkpoint is None or self._interval_checkpoint.n_saved is None

    def interval_completed(self, engine: Engine) -> None:
        """Save; the first time, take over the files of an earlier start."""
        if not self._knows_earlier_files:
            self._count_earlier_files(engine)
        super().interval_completed(engine)

    def _count_earlier_files(self, engine: Engine) -> None:
        self._knows_earlier_files = True
        checkpoint = self._interval_checkpoint
        kind, now = ("epoch", engine.state.epoch) if self.epoch_level else ("iteration", engine.state.iteration)
        name = "checkpoint" if len(self.save_dict) > 1 else next(iter(self.save_dict))
        prefix = f"{checkpoint.filename_prefix}_" if checkpoint.filename_prefix else ""
        pattern = re.compile(rf"{re.escape(prefix + name)}_{kind}=(\d+)\.pt")
        found = filter(None, (pattern.fullmatch(path.name) for path in Path(self.save_dir).glob("*.pt")))
        files = sorted((int(match[1]), match[0]) for match in found)
        kept = [file for file in files if file[0] < now][
            -checkpoint.n_saved :
        ]  # later ones belong to steps that are repeated
        for file in files:
            if file not in kept:
                checkpoint.save_handler.remove(file[1])
        checkpoint.load_state_dict({"_saved": kept})


class _WholeFiles(BaseSaveHandler):
    """A replacement for Ignite's ``DiskSaver``."""

    def __init__(self, writer: DiskSaver) -> None:
        self.folder = Path(writer.dirname)
        self.fixed_name: str | None = writer.filename
        self._outdated: list[str] = []

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        filename = self.fixed_name or filename
        if ranks.rank() == 0:
            save_checkpoint(checkpoint, self.folder / filename)
            for name in self._outdated:
                if name != filename:
                    (self.folder / name).unlink(missing_ok=True)
        self._outdated = []

    def remove(self, filename: str) -> None:
        if self.fixed_name is None:
            self._outdated.append(os.path.basename(filename))  # deleted once its successor is complete
