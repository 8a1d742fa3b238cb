"""The weights of the zip: of which run they are, and what that run measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from monai.bundle import ConfigParser

from knowsam_monai.handlers.student_loader import StudentLoader
from knowsam_monai.trained_student import KEY_METRIC, MODEL, read_record


class Training(NamedTuple):
    """The run that wrote the weights: its `name`, whether it was on the `phantom`, its best validation's `metrics`."""

    name: str
    phantom: bool
    metrics: dict[str, float]

    @property
    def sentence(self) -> str:
        data = "the synthetic phantom, no patient: they are for trying the bundle out" if self.phantom else "its data"
        dice = f"; mean validation Dice {self.metrics[KEY_METRIC]:.3f}" if KEY_METRIC in self.metrics else ""
        return f"The weights in models/model.pt are of the run {self.name}, trained on {data}{dice}."


def find_training(bundle: Path) -> Training:
    """
    Find the run that a bundle's ``models/model.pt`` is of, in the ``model.json`` beside it.

    Args:
        bundle: the bundle's folder.

    Raises:
        ValueError: if there are no weights or no such record, or the weights are not of the bundle's student.
    """
    weights = bundle / "models" / MODEL
    if not weights.is_file():
        raise ValueError(
            f"`bundle` must have a trained student but {weights} does not exist; train one with "
            f"`make train BUNDLE={bundle}`."
        )
    record = read_record(weights.parent)
    training = Training(record["run"], "phantom" in record["run"], record["metrics"])
    _check(weights, bundle / "configs" / "inference.json", training.phantom)
    return training


def _check(weights: Path, config: Path, phantom: bool) -> None:
    """Refuse weights that are not of the student that inference builds."""
    parser = ConfigParser(ConfigParser.load_config_file(config))
    parser["dataset_dir"] = None if phantom else "a data set"
    num_classes = parser.get_parsed_content("num_classes")
    StudentLoader(weights, parser.get_parsed_content("network_def"), num_classes).check()
