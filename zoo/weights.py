"""The weights of the zip: of which run they are, and what that run measured."""

from __future__ import annotations

import csv
import filecmp
from pathlib import Path
from typing import NamedTuple

from monai.bundle import ConfigParser

from knowsam_monai.handlers.student_loader import StudentLoader

MEAN_DICE = "val_mean_dice"


class Training(NamedTuple):
    """The run that wrote the weights: its `name`, whether it was on the `phantom`, its best validation's `metrics`."""

    name: str
    phantom: bool
    metrics: dict[str, float]

    @property
    def sentence(self) -> str:
        data = "the synthetic phantom, no patient: they are for trying the bundle out" if self.phantom else "its data"
        dice = f"; mean validation Dice {self.metrics[MEAN_DICE]:.3f}" if MEAN_DICE in self.metrics else ""
        return f"The weights in models/model.pt are of the run {self.name}, trained on {data}{dice}."


def find_training(bundle: Path, run: Path | None = None) -> Training:
    """
    Find the run that a bundle's ``models/model.pt`` is of.

    Args:
        bundle: the bundle's folder.
        run: the run's folder; default is the one in the bundle's ``output`` with the same ``model.pt``.

    Raises:
        ValueError: if there are no weights, no such run, or the weights are not of the bundle's student.
    """
    weights = bundle / "models" / "model.pt"
    if not weights.is_file():
        raise ValueError(
            f"`bundle` must have a trained student but {weights} does not exist; train one with "
            f"`make train BUNDLE={bundle}`."
        )
    written = [run / "model.pt"] if run else sorted((bundle / "output").glob("*/model.pt"))
    same = [path for path in written if path.is_file() and filecmp.cmp(path, weights, shallow=False)]
    if not same:
        raise ValueError(
            f"`run` must be the folder of the run that wrote {weights} but {run or bundle / 'output'} has no such "
            "model.pt; name the folder, so that the weights can be named for what they were trained on."
        )
    name = same[0].parent.name
    training = Training(name, "phantom" in name, _best_validation(same[0].with_name("results.csv")))
    _check(weights, bundle / "configs" / "inference.json", training.phantom)
    return training


def _best_validation(path: Path) -> dict[str, float]:
    """The metrics of the validation by whose Dice the student was kept."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row[MEAN_DICE]))
    return {key: round(float(value), 4) for key, value in best.items() if key.startswith(MEAN_DICE)}


def _check(weights: Path, config: Path, phantom: bool) -> None:
    """Refuse weights that are not of the student that inference builds."""
    parser = ConfigParser(ConfigParser.load_config_file(config))
    parser["dataset_dir"] = None if phantom else "a data set"
    num_classes = parser.get_parsed_content("num_classes")
    StudentLoader(weights, parser.get_parsed_content("network_def"), num_classes).check()
