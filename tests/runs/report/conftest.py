"""Folders as a training leaves them, written by the same writers and without training."""

from __future__ import annotations

import csv
import json
import shutil
import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from knowsam_monai.runs import ValidationReport
from tests.runs.test_validation_report import NAMES, item, validate

TERMS = {"loss": 3.0, "sam_loss": 1.0, "gate_weight": 1.0, "student_labeled_dice": 0.5, "teacher_labeled_dice": 0.6}


def write_scalars(folder, steps, scale=1.0):
    with SummaryWriter(folder / "tensorboard" / "train") as writer:
        for step in steps:
            for name, value in TERMS.items():
                writer.add_scalar(name, scale * value / step, step)


def write_run(folder, names=("a", "b", "c"), teacher_offset=2, started=None, config=None):
    """Three validations, `steps` logged, cases and slices written."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {"time": "2026-01-02T03:04:05+00:00", "timestamp": time.time() - 60 if started is None else started}
    start |= {
        "seed": 7,
        "teacher": "Sam2Teacher tiny",
        "command": "python -m x",
        "git_revision": "0123abc",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    (folder / "config.json").write_text(json.dumps(config or {"seed": 7, "train": {"lr": [0.1, 0.2]}}))
    write_scalars(folder, range(10, 40, 10))
    with open(folder / "results.csv", "w", newline="") as file:
        columns = ["epoch", "val_mean_dice", *(f"val_mean_dice/{name}" for name in NAMES), "val_teacher_dice"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for epoch, dice in ((1, 0.25), (2, 0.875), (3, 0.75)):
            writer.writerow(dict(zip(columns, (epoch, dice, dice, "nan", "" if epoch == 1 else 0.5))))
    report = validate(ValidationReport(folder, NAMES), [item(n, k, teacher_offset) for k, n in enumerate(names)])
    report.write()
    return folder


@pytest.fixture(scope="session")
def written_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def run_folder(written_run, tmp_path):
    """One finished run."""
    return shutil.copytree(written_run, tmp_path / "my run")
