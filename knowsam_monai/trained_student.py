"""The student of a bundle, and beside it what it was trained on."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from knowsam_monai.checkpoint_file import copy_whole
from knowsam_monai.whole_file import write_whole

logger = logging.getLogger(__name__)

MODEL, RECORD, CONFIG = "model.pt", "model.json", "config.json"
KEY_METRIC = "val_mean_dice"


def publish_student(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike) -> None:
    """
    Copy the student that a run kept, and the run's config, to where the bundle has them, ``model.json`` beside them.

    ``model.json`` names the run, the hash of its ``model.pt``, and what the validation measured that it was kept by.

    Args:
        output_dir: the run's folder, with ``model.pt``, ``config.json`` and ``results.csv``.
        ckpt_dir: the bundle's ``models``, made when missing.

    Raises:
        OSError: when a file of the run is missing or `ckpt_dir` cannot be written.

    Example:
        >>> publish_student("output/knowsam_phantom_seed0", "models")     # doctest: +SKIP
    """
    run, folder = Path(output_dir).resolve(), Path(ckpt_dir)
    with open(run / "results.csv", newline="", encoding="utf-8") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row[KEY_METRIC]))
    metrics = {key: round(float(value), 4) for key, value in best.items() if key.startswith(KEY_METRIC)}
    record = {"run": run.name, "sha256": _hash(run / MODEL), "metrics": metrics}
    copy_whole(run / MODEL, folder / MODEL)
    copy_whole(run / CONFIG, folder / CONFIG)
    write_whole(folder / RECORD, lambda file: file.write((json.dumps(record, indent=4) + "\n").encode()))


def read_record(ckpt_dir: str | os.PathLike) -> dict[str, Any]:
    """
    What :func:`publish_student` wrote.

    Args:
        ckpt_dir: the bundle's ``models``.

    Returns:
        `run`, the run's name, `sha256` of ``model.pt``, and `metrics`, the validation's Dice, 0..1, by name.

    Raises:
        ValueError: when there is no record, or it is of another ``model.pt`` than the one beside it.

    Example:
        >>> read_record("models")["metrics"]["val_mean_dice"]     # doctest: +SKIP
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


def warn_of_phantom(ckpt_path: str | os.PathLike, dataset_dir: str | os.PathLike | None) -> None:
    """
    Say of a student that was trained on the phantom that it knows no scans of a user's.

    Args:
        ckpt_path: the student's weights; of those without a record beside them nothing is said.
        dataset_dir: the user's scans; None, which means the phantom's own, is no reason to warn.

    Example:
        >>> warn_of_phantom("models/model.pt", "/data/scans")
    """
    path = Path(ckpt_path)
    if dataset_dir is None or path.name != MODEL or not (path.parent / RECORD).is_file():
        return
    run = read_record(path.parent)["run"]
    if "phantom" in run:
        logger.warning(
            "%s is of the run %s, trained on the synthetic phantom: it can't segment scans of patients. Train on your "
            "own data first, or name another student's weights with `ckpt_path`.",
            path,
            run,
        )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
