from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events

from knowsam_monai import ranks
from knowsam_monai.files import iter_csv, write_csv
from knowsam_monai.runs.validation_case import check_class_names

logger = logging.getLogger(__name__)


class ValidationHistory:
    """
    Write ``results.csv``: one row per validation, with every metric of the evaluator and the Dice of each structure.

    A row has `epoch`, the evaluator's metrics under their own names and, for each metric that keeps its details
    (MONAI's ``save_details``), the mean over the cases of each structure as ``<metric>/<structure>``. Rows of earlier
    epochs are kept; rows of the same or a later epoch, left by an earlier start, are replaced. The metrics are also
    logged in one line, with the best key metric so far.

    Args:
        output_dir: folder of the file, created if missing.
        class_names: names of classes 1, 2, ... (no background).

    Raises:
        ValueError: if `class_names` is empty, a single string, or contains a name twice.

    Example::

        SupervisedEvaluator(..., val_handlers=[ValidationHistory("output", ["RV", "myocardium", "LV"])])
    """

    def __init__(self, output_dir: str | os.PathLike, class_names: Sequence[str]) -> None:
        self.path = os.path.join(output_dir, "results.csv")
        self.class_names = check_class_names(class_names)

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if ranks.rank() != 0:
            return
        logger.info(self.line(engine))
        row = {"epoch": engine.state.epoch, **self.metrics(engine)}
        write_csv(self.path, [*self._earlier_rows(engine.state.epoch), row])

    def metrics(self, engine: Engine) -> dict[str, float]:
        """The metrics of a validation, and behind each the means of the structures."""
        found = {}
        for name, value in engine.state.metrics.items():
            found[name] = float(value)
            details = engine.state.metric_details.get(name)
            if isinstance(details, torch.Tensor) and details.ndim == 2 and details.shape[1] == len(self.class_names):
                for class_name, mean in zip(self.class_names, details.nanmean(0).tolist()):
                    found[f"{name}/{class_name}"] = mean
        return found

    def write_scalars(self, engine: Engine, writer: Any) -> None:
        """Write the same to TensorBoard, for the `epoch_event_writer` of MONAI's ``TensorBoardStatsHandler``."""
        for name, value in self.metrics(engine).items():
            writer.add_scalar(name, value, engine.state.epoch)
        writer.flush()

    def line(self, engine: Engine) -> str:
        """One line such as ``Validation 3  mean dice 0.812 (best 0.820 of 2)  teacher dice 0.801``."""
        state = engine.state
        parts = [f"Validation {state.epoch}"]
        for name, value in state.metrics.items():
            part = f"{name.removeprefix('val_').replace('_', ' ')} {float(value):.3f}"
            if name == state.key_metric_name and state.best_metric_epoch > 0:
                is_best = state.best_metric_epoch == state.epoch
                part += " (best)" if is_best else f" (best {state.best_metric:.3f} of {state.best_metric_epoch})"
            parts.append(part)
        return "  ".join(parts)

    def _earlier_rows(self, epoch: int) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        if os.path.isfile(self.path):
            try:
                for row in iter_csv(self.path):
                    rows += [row] if int(row["epoch"]) < epoch else []
            except (ValueError, KeyError, csv.Error) as error:
                logger.warning("%s is damaged (%s); only its first %d rows are kept.", self.path, error, len(rows))
        return rows
