from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.handlers.checkpoint import BaseSaveHandler, DiskSaver
from monai.handlers import CheckpointSaver

from knowsam_monai.checkpoint_file import save_checkpoint


class WholeCheckpointSaver(CheckpointSaver):
    """
    MONAI's ``CheckpointSaver``, whose files are whole and finite whenever the process ends.

    MONAI's deletes the best model before it writes the better one, writes in place, and takes weights as they come.
    This one writes under a temporary name and renames, deletes afterwards, and refuses weights that are not finite.

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


class _WholeFiles(BaseSaveHandler):
    """In the place of Ignite's writer."""

    def __init__(self, writer: DiskSaver) -> None:
        self.folder = Path(writer.dirname)
        self.fixed_name: str | None = writer.filename
        self._outdated: list[str] = []

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        filename = self.fixed_name or filename
        if idist.get_rank() == 0:
            save_checkpoint(checkpoint, self.folder / filename)
            for name in self._outdated:
                if name != filename:
                    (self.folder / name).unlink(missing_ok=True)
        self._outdated = []

    def remove(self, filename: str) -> None:
        if self.fixed_name is None:
            self._outdated.append(os.path.basename(filename))  # not before the one that takes its place is whole
