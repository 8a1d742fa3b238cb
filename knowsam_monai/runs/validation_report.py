from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import write_csv, write_whole
from knowsam_monai.runs.validation_case import (
    ValidationCase,
    case_names,
    check_class_names,
    class_dice,
    of_all_processes,
    validation_cases,
)
from knowsam_monai.runs.validation_picture import SliceView, choose_views, draw, draw_slice, slice_views
from knowsam_monai.texts import printable, shortened

logger = logging.getLogger(__name__)

PRED_KEYS = ("pred", "teacher_pred")  # in the evaluator's output
MODELS = ("student", "teacher")


class ValidationReport:
    """
    A table of Dice and pictures of a few validation slices, with image, truth and prediction side by side.

    The report keeps the best validation so far, by the key metric of the evaluator, as checkpoints do, or by the mean
    Dice if there is none. At the end of the run :meth:`write` logs a table and writes three more products:

    - The table has the Dice per structure over whole volumes, averaged over the cases, for the student and, if the
      evaluator's output has ``teacher_pred``, for the teacher. The best validation is chosen on the same volumes, so
      the student of the last validation is reported too. A class that is predicted where the
      label lacks it has a Dice of 0; one that both lack is left out.
    - ``validation.png``: the first rows are slices with large structures, of cases spread evenly from the best to the
      median; the last row is the worst slice.
    - ``validation_slices/``: the same slices, one file each, described in the PNG's text fields.
    - ``validation_cases.csv``: the Dice of every case, for student and teacher.

    Args:
        output_dir: folder of the files, created if missing.
        class_names: names of classes 1, 2, ... (no background).
        num_slices: rows of the picture.
        split: the volumes' part of the data set, for the head of the table.

    Raises:
        ValueError: if `class_names` is empty, a single string or contains a name twice, or `num_slices` is below 1.

    Example::

        report = ValidationReport("eval", ["RV", "myocardium", "LV"])
        evaluator = SupervisedEvaluator(..., val_handlers=[report])
        trainer.run()
        report.write()
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str],
        num_slices: int = 4,
        split: str = "validation",
    ) -> None:
        if num_slices < 1:
            raise KnowSAMValueError(f"`num_slices` must be at least 1 but is {num_slices}.")
        self.output_dir = str(output_dir)
        self.class_names = check_class_names(class_names, reserved=["case", "model", "mean"])
        self.num_slices = num_slices
        self.split = split
        self.score = float("-inf")  # of the kept validation
        self._num_validations = 0
        self._num_restored = 0
        self._kept: dict[str, Any] = {}
        self._last: list[float] = []  # the student's Dice in the last validation, a column of the table
        self._dice: dict[str, dict[str, Tensor]] = {}  # path -> key of the prediction -> Dice (C - 1,)
        self._contents: dict[str, int] = {}
        self._views: list[SliceView] = []

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI evaluator, after its postprocessing."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Forget the cases of the previous validation."""
        self._dice, self._contents, self._views = {}, {}, []

    def __call__(self, engine: Engine) -> None:
        num_classes = len(self.class_names) + 1
        for case in validation_cases(engine, num_classes, PRED_KEYS, seen=self._contents):
            self._contents[case.path] = case.content
            self._dice[case.path] = {key: class_dice(pred, case.label, num_classes) for key, pred in case.preds.items()}
            if ranks.rank() == 0:
                self._views += self._views_of(case, num_classes)

    def _views_of(self, case: ValidationCase, num_classes: int) -> list[SliceView]:
        """The slices of a case that may be shown; an empty list and a warning if they cannot be taken."""
        try:
            return slice_views(case, num_classes)
        except Exception as error:  # a picture must not end a training, whatever is wrong with it
            reason = f"{type(error).__name__}: {printable(str(error))}"
            logger.warning("No picture of %s: %s", printable(case.path), reason)
            return []

    def completed(self, engine: Engine) -> None:
        """Gather the Dice of all ranks, and keep this validation if it is the one to report."""
        self._num_validations += 1
        cases = of_all_processes(self._dice, self._contents)
        if not cases:
            return
        dice = {key: {path: of_case[key] for path, of_case in cases.items() if key in of_case} for key in PRED_KEYS}
        means = {key: mean_over_cases(by_case) for key, by_case in dice.items() if by_case}
        self._last = means["pred"]
        if math.isnan(self._last[-1]):
            logger.warning("No label of the validation has a structure, so there is no Dice; list cases that have one.")
        score = engine.state.metrics.get(getattr(engine.state, "key_metric_name", None), self._last[-1])
        if not self._kept or score > self.score:
            self.score = float(score)
            self._kept = {
                "dice": means,
                "cases": {key: {path: d.tolist() for path, d in rows.items()} for key, rows in dice.items()},
                "num_cases": len(cases),
                "validation": self._num_validations,
                "views": choose_views(self._views, dice["pred"], self.num_slices),
            }
        self._views = []

    def state_dict(self) -> dict[str, Any]:
        """The kept validation as tensors and plain values; Dice is in lists, because saved tensors must be finite."""
        views = [
            [torch.as_tensor(x.copy()) if isinstance(x, np.ndarray) else x for x in view]
            for view in (view._replace(dice=view.dice.tolist()) for view in self._kept.get("views", []))
        ]
        kept = {**self._kept, "views": views}
        return {"kept": kept, "last": self._last, "score": self.score, "num": self._num_validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the validation that another report has kept."""
        self.score, self._num_validations, self._kept = state["score"], state["num"], dict(state["kept"])
        self._last, self._num_restored = list(state["last"]), self._num_validations
        views = [SliceView(*(x.numpy() if isinstance(x, Tensor) else x for x in v)) for v in self._kept.pop("views")]
        views = [view._replace(dice=np.asarray(view.dice)) for view in views]
        if self._kept:
            self._kept["views"] = views

    def table(self) -> list[str]:
        """The lines of the table, for a fixed-width font."""
        kept = self._kept
        which = f", the best of {self._num_validations} validations (number {kept['validation']})"
        which = which if self._num_validations > 1 else ""
        columns = [(MODELS[PRED_KEYS.index(key)], dice) for key, dice in kept["dice"].items()]
        if self._num_validations > 1:
            columns.append((f"{MODELS[0]}, last", self._last))
        names = [shortened(name, 40) for name in (*self.class_names, "mean")]
        width = max(len(name) for name in (*names, "structure"))
        rule = "  " + "-" * (width + sum(max(len(title), 7) + 4 for title, _ in columns))
        number = "1 volume" if kept["num_cases"] == 1 else f"{kept['num_cases']} volumes"
        head = f"  {'structure':<{width}}" + "".join(f"{title:>{max(len(title), 7) + 4}}" for title, _ in columns)
        lines = [f"{self.split.capitalize()} Dice, {number}{which}", head, rule]
        for i, name in enumerate(names):
            cells = "".join(f"{dice[i]:>{max(len(title), 7) + 4}.3f}" for title, dice in columns)
            lines += [rule] * (i == len(self.class_names)) + [f"  {name:<{width}}{cells}"]
        return lines

    @property
    def is_empty(self) -> bool:
        """True if no validation has run."""
        return not self._kept

    @property
    def is_restored(self) -> bool:
        """True if no validation has run since a finished run was resumed."""
        return 0 < self._num_restored == self._num_validations

    def write(self) -> str | None:
        """
        Write pictures and cases and log the table, on the first rank only.

        Returns:
            The picture's path; None if no validation has run, and on other ranks.
        """
        if ranks.rank() != 0:
            return None
        if self.is_empty:
            logger.warning("No validation has run, so there is no validation report.")
            return None
        self.log_table()
        self.write_cases()
        self.write_slices()
        return self.write_picture()

    def log_table(self) -> None:
        """Log :meth:`table`, line by line."""
        for line in self.table():
            logger.info("%s", line)

    def _names(self) -> dict[str, str]:
        """The name of each case, by its path."""
        paths = sorted(self._kept["cases"]["pred"])
        return dict(zip(paths, case_names(paths)))

    def write_picture(self) -> str | None:
        """Write ``validation.png`` and return its path; None if the first rank had no case."""
        views = self._kept["views"]
        if not views:
            return None
        path = os.path.join(self.output_dir, "validation.png")
        figure = draw(views, self._names(), self.class_names)
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
        logger.info("%s slices, truth and prediction: %s", self.split.capitalize(), path)
        return path

    def write_cases(self) -> None:
        """Write ``validation_cases.csv``."""
        rows: list[dict[str, str]] = []
        for path, name in self._names().items():
            for key, model in zip(PRED_KEYS, MODELS):
                dice = torch.tensor(self._kept["cases"][key].get(path, []))
                if len(dice):
                    values = zip((*self.class_names, "mean"), (*dice.tolist(), dice.nanmean().item()))
                    cells = {column: "" if value != value else f"{value:.4f}" for column, value in values}
                    rows.append({"case": name, "model": model, **cells})
        write_csv(os.path.join(self.output_dir, "validation_cases.csv"), rows)

    def write_slices(self) -> None:
        """Write ``validation_slices/``, replacing all pictures in it."""
        folder = Path(self.output_dir) / "validation_slices"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        views, names = self._kept["views"], self._names()
        for i, view in enumerate(views):
            last_kind = "worst slice" if len(views) > 1 else "largest slice"
            kind = last_kind if i == len(views) - 1 else "best case" if i == 0 else "between best and median"
            dice = {n: None if d != d else round(float(d), 4) for n, d in zip(self.class_names, view.dice)}
            title = f"{names[view.path]}, {view.position}"
            fields = {"Title": title, "Comment": kind, "Description": json.dumps(dice), "Software": None}
            save = partial(draw_slice(view, len(self.class_names)).savefig, format="png", dpi=150, metadata=fields)
            write_whole(folder / f"{i + 1}.png", save)


def mean_over_cases(dice: dict[str, Tensor]) -> list[float]:
    """Mean Dice of each class, then of all: over each case's classes first, then over the cases. nan is skipped."""
    stacked = torch.stack(list(dice.values()))  # (cases, C - 1)
    return [*stacked.nanmean(0).tolist(), stacked.nanmean(1).nanmean().item()]
