"""The weights of the zip: their run, its metrics, and its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser

from knowsam_monai.runs.student_loader import StudentCheckpointLoader
from knowsam_monai.runs.trained_student import (
    CONFIG,
    KEY_METRIC,
    MODEL,
    PHANTOM,
    SHARED_SETTINGS,
    read_record,
    student_options,
)


class Training(NamedTuple):
    """
    The training run of the weights.

    Args:
        name: name of the run's folder.
        trained_on: the phantom, or the name of a data set.
        metrics: metrics of its best validation.
        student: network, classes and sizes of the student, by key of the bundle's configs.
        sha256: hash of the weights.
    """

    name: str
    trained_on: str
    metrics: dict[str, float]
    student: dict[str, Any]
    sha256: str

    @property
    def record(self) -> dict[str, Any]:
        """The zip's ``model.json``, without the run's config, which contains local paths."""
        return {
            "run": self.name,
            "trained_on": self.trained_on,
            "sha256": {MODEL: self.sha256},
            "metrics": self.metrics,
            "settings": {key: self.student[key] for key in SHARED_SETTINGS if key in self.student},
        }

    @property
    def sentence(self) -> str:
        data = self.trained_on
        if data == PHANTOM:
            data = f"the {PHANTOM}, not on patients, for trying out the bundle"
        dice = f"; mean validation Dice {self.metrics[KEY_METRIC]:.3f}" if KEY_METRIC in self.metrics else ""
        return f"The weights in models/model.pt are from the run {self.name}, trained on {data}{dice}."


def find_training(bundle: Path) -> Training:
    """
    Find the training run of a bundle's ``models/model.pt`` in its ``model.json``.

    Args:
        bundle: the bundle's folder.

    Raises:
        ValueError: if weights or record are missing, or if the weights belong to another student.
    """
    weights = bundle / "models" / MODEL
    if not weights.is_file():
        raise ValueError(
            f"`bundle` must have a trained student but {weights} does not exist; train one with "
            f"`make train BUNDLE={bundle}`."
        )
    record = read_record(weights.parent)
    if CONFIG not in record["sha256"]:
        raise ValueError(
            f"`bundle` must have the {CONFIG} of its training run but {bundle} is from a zip; build the zip where the "
            "student was trained."
        )
    inference = ConfigParser.load_config_file(bundle / "configs" / "inference.json")
    student = student_options(weights.parent / CONFIG, [*inference, "class_names"])
    parser = ConfigParser({**inference, **student})
    network, num_classes = parser.get_parsed_content("network_def"), parser.get_parsed_content("num_classes")
    StudentCheckpointLoader(weights, network, num_classes).load()
    return Training(record["run"], record["trained_on"], record["metrics"], student, record["sha256"][MODEL])
