"""The student of a bundle, and beside it what it was trained on."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from knowsam_monai.checkpoint_file import copy_whole
from knowsam_monai.whole_file import write_whole

MODEL, RECORD = "model.pt", "model.json"
KEY_METRIC = "val_mean_dice"


def publish_student(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike) -> None:
    """
    Copy the student that a run kept to where its bundle has it, and write ``model.json`` beside it.

    ``model.json`` names the run, the hash of its ``model.pt``, and what the validation measured that it was kept by.

    Args:
        output_dir: the run's folder, with ``model.pt`` and ``results.csv``.
        ckpt_dir: the bundle's ``models``.

    Example:
        >>> publish_student("output/knowsam_phantom_seed0", "models")     # doctest: +SKIP
    """
    run, folder = Path(output_dir).resolve(), Path(ckpt_dir)
    with open(run / "results.csv", newline="", encoding="utf-8") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row[KEY_METRIC]))
    metrics = {key: round(float(value), 4) for key, value in best.items() if key.startswith(KEY_METRIC)}
    record = {"run": run.name, "sha256": _hash(run / MODEL), "metrics": metrics}
    copy_whole(run / MODEL, folder / MODEL)
    write_whole(folder / RECORD, lambda file: file.write((json.dumps(record, indent=4) + "\n").encode()))


def read_record(ckpt_dir: str | os.PathLike) -> dict[str, Any]:
    """
    What :func:`publish_student` wrote.

    Raises:
        ValueError: when there is no record, or it is of another ``model.pt`` than the one beside it.
    """
    folder = Path(ckpt_dir)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["sha256"] == _hash(folder / MODEL)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(
            f"{folder / MODEL} must have beside it the {RECORD} of the run that trained it, but has none or another's; "
            "copy both from where it was trained."
        )
    return record


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
