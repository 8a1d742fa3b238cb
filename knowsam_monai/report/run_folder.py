"""Reading what a run has left: TensorBoard's scalars, results.csv, the cases, the slices, config and starts."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from knowsam_monai.run_record import CONFIG, read_starts

__all__ = ["RunFolder", "SliceImage", "read_run"]

Curve = tuple[list[int], list[float]]  # iterations, values


class SliceImage(NamedTuple):
    """A PNG, what it shows in words, and the Dice of each structure in it, None where it is absent."""

    png: bytes
    title: str
    kind: str
    dice: dict[str, float | None]


class RunFolder(NamedTuple):
    """
    Args:
        name: the folder's.
        path: the folder.
        terms: of the training, by name: every loss term, weight and Dice, at the iterations that were logged.
        validations: rows of results.csv, by the file's columns; nan where a row has no value.
        cases: rows of validation_cases.csv: `case`, `model`, each structure, `mean`.
        slices: best first, worst last.
        starts: of the run, see :func:`knowsam_monai.handlers.RunRecord`.
        config: as run.
    """

    name: str
    path: Path
    terms: dict[str, Curve]
    validations: list[dict[str, float]]
    cases: list[dict[str, str]]
    slices: list[SliceImage]
    starts: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def structures(self) -> list[str]:
        """Names of the structures that have a Dice of their own."""
        prefix = "val_mean_dice/"
        names = dict.fromkeys(key for row in self.validations for key in row if key.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def validation_curve(self, column: str) -> Curve:
        """A column of results.csv over the epochs."""
        rows = [row for row in self.validations if math.isfinite(row.get(column, math.nan))]
        return [int(row["epoch"]) for row in rows], [row[column] for row in rows]


def read_run(folder: str | os.PathLike) -> RunFolder:
    """
    Read a run's folder, finished or not.

    Raises:
        FileNotFoundError: when there is no such folder, or neither `results.csv` nor `tensorboard` in it.
        ValueError: when one of its files is broken; it is named.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"`folder` must be a run's folder but {path} does not exist.")
    if not (path / "results.csv").is_file() and not (path / "tensorboard").is_dir():
        raise FileNotFoundError(
            f"`folder` must be the `output_dir` of a training but {path} has neither results.csv nor tensorboard/."
        )
    try:
        starts = read_starts(path)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8")) if (path / CONFIG).is_file() else {}
        validations = [{k: _number(v) for k, v in row.items()} for row in _rows(path / "results.csv")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The record in {path} must be whole but cannot be read ({error}).") from error
    return RunFolder(
        name=path.resolve().name,
        path=path,
        terms=_scalars(path / "tensorboard" / "train", since=starts[0]["timestamp"] if starts else 0.0),
        validations=validations,
        cases=_rows(path / "validation_cases.csv"),
        slices=_slices(path / "validation_slices"),
        starts=starts,
        config=config,
    )


def _scalars(folder: Path, since: float) -> dict[str, Curve]:
    """
    Every scalar of a folder of event files; where a run that was broken off repeated a step, the later value.

    Args:
        since: seconds since 1970; what a run before this one has left in the folder is older and left out.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    by_name: dict[str, dict[int, tuple[float, float]]] = {}
    for file in sorted(folder.glob("**/events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
        for name in events.Tags()[SCALARS]:
            for event in events.Scalars(name):
                steps = by_name.setdefault(name, {})
                if event.wall_time >= since and event.wall_time >= steps.get(event.step, (0.0, 0.0))[0]:
                    steps[event.step] = (event.wall_time, event.value)
    return {name: (sorted(s), [s[step][1] for step in sorted(s)]) for name, s in sorted(by_name.items()) if s}


def _slices(folder: Path) -> list[SliceImage]:
    from PIL import Image

    slices = []
    for file in sorted(folder.glob("*.png"), key=lambda p: (len(p.name), p.name)):
        with Image.open(file) as image:
            fields = dict(image.info)
        dice = json.loads(fields.get("Description", "{}"))
        slices.append(SliceImage(file.read_bytes(), fields.get("Title", file.name), fields.get("Comment", ""), dice))
    return slices


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str | None) -> float:
    return float(text) if text else math.nan
