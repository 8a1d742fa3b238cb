"""Reading a run's folder: TensorBoard scalars, results.csv, cases, slices, config and starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.files import expand_path, iter_csv
from knowsam_monai.runs.run_record import CONFIG, STARTS, read_starts

Curve = tuple[list[int], list[float]]  # iterations, values


class SliceImage(NamedTuple):
    """A PNG, a description of it, and the Dice of each structure in it; None if the structure is absent."""

    png: bytes
    title: str
    kind: str
    dice: dict[str, float | None]


class RunFolder(NamedTuple):
    """
    Args:
        name: name of the folder.
        path: the folder.
        terms: every loss term, weight and Dice of the training by name, at the logged iterations.
        validations: rows of results.csv by column; nan if a row has no value.
        cases: rows of validation_cases.csv: `case`, `model`, each structure, `mean`.
        slices: from best to worst.
        starts: starts of the run, see :class:`knowsam_monai.runs.RunRecord`.
        config: the config as run.
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
        """Names of the structures that have their own column of Dice."""
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

    Args:
        folder: `output_dir` of a training.

    Raises:
        FileNotFoundError: if the folder does not exist, or has neither `results.csv` nor `tensorboard`.
        ValueError: if one of its files is damaged, naming the file.

    Example:
        >>> read_run("output/knowsam_phantom_seed0").terms["loss"]     # doctest: +SKIP
    """
    path = Path(expand_path(folder, "folder"))
    if not path.is_dir():
        raise KnowSAMFileNotFoundError(f"`folder` must be a run's folder but {path} does not exist.")
    if not (path / "results.csv").is_file() and not (path / "tensorboard").is_dir():
        raise KnowSAMFileNotFoundError(
            f"`folder` must be the `output_dir` of a training but {path} has neither results.csv nor tensorboard/."
        )
    starts = _starts(path)
    return RunFolder(
        name=path.resolve().name,
        path=path,
        terms=_scalars(path / "tensorboard" / "train", since=starts[0]["timestamp"] if starts else 0.0),
        validations=_validations(path / "results.csv"),
        cases=_cases(path / "validation_cases.csv"),
        slices=_slices(path / "validation_slices"),
        starts=starts,
        config=_config(path / CONFIG),
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn any error of reading a file into one that names the file."""
    try:
        yield
    except Exception as error:  # PIL, TensorBoard, csv and json each fail in their own way
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise KnowSAMValueError(
            f"`folder` must have intact files but {file} cannot be read ({reason}); move it away, and the report shows "
            "the rest."
        ) from error


def _starts(folder: Path) -> list[dict[str, Any]]:
    with _reading(folder / STARTS):
        starts = read_starts(folder)
        for start in starts:
            start |= {"time": str(start["time"]), "timestamp": float(start["timestamp"])}
            start["versions"] = dict(start.get("versions", {}))
    return starts


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with _reading(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _validations(file: Path) -> list[dict[str, float]]:
    with _reading(file):
        rows = [{column: _number(text) for column, text in row.items()} for row in _rows(file)]
        for row in rows:
            int(row["epoch"])  # the x axis of every curve must be neither missing nor nan
    return rows


def _cases(file: Path) -> list[dict[str, str]]:
    with _reading(file):
        rows = _rows(file)
        for row in rows:
            for column in row.keys() - {"case", "model"} | {"mean"}:
                _number(row[column])
            row["case"], row["model"]
    return rows


def _scalars(folder: Path, since: float) -> dict[str, Curve]:
    """
    Every scalar in a folder of event files; of a step that a resumed run repeated, the later value.

    Args:
        folder: the folder, searched recursively.
        since: seconds since 1970; older values were left by an earlier run and are skipped.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    by_name: dict[str, dict[int, tuple[float, float]]] = {}
    for file in sorted(folder.glob("**/events.out.tfevents.*")):
        with _reading(file):  # if the file is incomplete, this returns the complete records
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
        with _reading(file):
            with Image.open(file) as image:
                image.load()  # only this detects a truncated picture
                fields = dict(image.info)
            named = json.loads(fields.get("Description", "{}")).items()
            dice = {name: None if value is None else float(value) for name, value in named}
        slices.append(SliceImage(file.read_bytes(), fields.get("Title", file.name), fields.get("Comment", ""), dice))
    return slices


def _rows(path: Path) -> list[dict[str, str]]:
    return list(iter_csv(path)) if path.is_file() else []


def _number(text: str | None) -> float:
    return float(text) if text else math.nan
