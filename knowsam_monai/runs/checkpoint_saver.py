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
    MONAI's ``CheckpointSaver``, whose files are whole and finite whenever the process ends.

    MONAI's deletes the best model before it writes the better one, writes in place, and takes weights as they come.
    This one writes under a temporary name and renames, deletes afterwards, and refuses weights that are not finite. Of
    the files that an earlier start of the run left at intervals it keeps as many as `n_saved` says.

    Args:
        *args: and `**kwargs` as of MONAI's ``CheckpointSaver``.

    Raises:
        RuntimeError: during the run, when weights are not finite or a file cannot be written.

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
        """Save; before the first time count in what an earlier start has left."""
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
        kept = [file for file in files if file[0] < now][-checkpoint.n_saved :]  # later ones are of steps made again
        for file in files:
            if file not in kept:
                checkpoint.save_handler.remove(file[1])
        checkpoint.load_state_dict({"_saved": kept})


class _WholeFiles(BaseSaveHandler):
    """In the place of Ignite's writer."""

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
            self._outdated.append(os.path.basename(filename))  # not before the one that takes its place is whole
