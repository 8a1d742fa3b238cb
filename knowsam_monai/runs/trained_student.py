"""The student of a bundle, and beside it what it was trained on."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from knowsam_monai.data.phantom import LIST_NAME, is_phantom
from knowsam_monai.errors import KnowSAMValueError, root_cause
from knowsam_monai.files import copy_whole, read_csv, write_whole

logger = logging.getLogger(__name__)

MODEL, RECORD, CONFIG = "model.pt", "model.json", "config.json"
KEY_METRIC = "val_mean_dice"
PHANTOM = "synthetic phantom"
# what training and inference have under the same name, each its own
NOT_OF_THE_STUDENT = {
    *("imports", "bundle_root", "dataset_dir", "output_dir", "device", "initialize", "run", "finalize"),
    "window_overlap",  # the published one is too slow for the validations of a training
}


def publish_student(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike) -> None:
    """
    Copy the student that a run kept, and the run's config, to where the bundle has them, ``model.json`` beside them.

    ``model.json`` names the run, what it was trained on (the phantom, or a data set by the last part of its path), the
    hashes of both files, and what the validation measured that the student was kept by.

    Args:
        output_dir: the run's folder, with ``model.pt``, ``config.json`` and ``results.csv``.
        ckpt_dir: the bundle's ``models``, made when missing.

    Raises:
        OSError: when a file of the run is missing or `ckpt_dir` cannot be written.

    Example:
        >>> publish_student("output/knowsam_phantom_seed0", "models")     # doctest: +SKIP
    """
    run, folder = Path(output_dir).resolve(), Path(ckpt_dir)
    try:
        best = max(read_csv(run / "results.csv"), key=lambda row: float(row[KEY_METRIC]))
    except (ValueError, KeyError, csv.Error) as error:  # torn or another's: the student is whole all the same
        logger.warning("%s cannot be read (%s), so %s has no metrics.", run / "results.csv", error, RECORD)
        best = {}
    metrics = {key: round(float(value), 4) for key, value in best.items() if key.startswith(KEY_METRIC)}
    record = {"run": run.name, "trained_on": _trained_on(run / CONFIG), "sha256": _hashes(run), "metrics": metrics}
    copy_whole(run / MODEL, folder / MODEL)
    copy_whole(run / CONFIG, folder / CONFIG)
    write_whole(folder / RECORD, lambda file: file.write((json.dumps(record, indent=4) + "\n").encode()))


def read_record(ckpt_dir: str | os.PathLike) -> dict[str, Any]:
    """
    What :func:`publish_student` wrote.

    Args:
        ckpt_dir: the bundle's ``models``.

    Returns:
        `run`, its name, `trained_on`, `sha256` of ``model.pt`` and, but in the Model Zoo's zip, of ``config.json``, and
        `metrics`: Dice, 0..1, by name.

    Raises:
        ValueError: when there is no record, or it is of another student or config than those beside it.

    Example:
        >>> read_record("models")["metrics"]["val_mean_dice"]     # doctest: +SKIP
    """
    folder = Path(ckpt_dir)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = record["sha256"]  # a zip's record is of the weights alone
        same = MODEL in hashes and hashes == _hashes(folder, hashes) and {"run", "trained_on", "metrics"} <= set(record)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise KnowSAMValueError(
            f"{folder / MODEL} must have beside it the {RECORD} and {CONFIG} of the run that trained it, but has none "
            "or another's; copy all three from where it was trained."
        )
    return record


def warn_of_phantom(ckpt_path: str | os.PathLike, dataset_dir: str | os.PathLike | None) -> None:
    """
    Say of a student that was trained on the phantom that it knows no scans of a user's; else say nothing.

    Args:
        ckpt_path: the student's weights; of those without a record beside them nothing is said.
        dataset_dir: the user's scans; those of a phantom, or None, which means the phantom's own, are no reason to
            warn.

    Example:
        >>> warn_of_phantom("models/model.pt", "/data/scans")
    """
    path = Path(ckpt_path)
    if dataset_dir is None or path.name != MODEL or _are_of_a_phantom(Path(dataset_dir).expanduser().resolve()):
        return
    try:
        record = read_record(path.parent)
    except ValueError:  # whose weights these are is not known
        return
    if record["trained_on"] == PHANTOM:
        logger.warning(
            "%s is of the run %s, trained on the %s: it can't segment scans of patients. Train on your own data first, "
            "or name another student (--ckpt_path FILE; in `python -m knowsam_monai predict` also --run FOLDER).",
            path,
            record["run"],
            PHANTOM,
        )


def student_options(config: str | os.PathLike, known: Iterable[str]) -> dict[str, Any]:
    """
    What inference must share with the training of a student: its network, classes and sizes.

    Args:
        config: ``config.json`` of the run, code that is run.
        known: keys of the config that is to share them.

    Returns:
        The values by key, where a run has such a key; ``network_def`` as it is written, all else evaluated.

    Raises:
        ValueError: when the file is damaged or one of its values cannot be evaluated.

    Example:
        >>> student_options("bundles/knowsam_acdc/models/config.json", ["image_size", "device"])     # doctest: +SKIP
        {'image_size': 64}
    """
    parser = ConfigParser(read_config(config, "run"))
    options = {}
    for key in known:
        if key not in parser or key in NOT_OF_THE_STUDENT:
            continue
        if key == "network_def":
            options[key] = parser[key]
        elif not isinstance(parser[key], dict) and not str(parser[key]).startswith("$@network"):
            try:
                options[key] = parser.get_parsed_content(key)
            except Exception as error:  # whatever its code raises
                raise KnowSAMValueError(
                    f"`run` must have a config that can be evaluated but `{key}` of {config} cannot "
                    f"({root_cause(error)}); copy it anew from where it was trained."
                ) from error
    return options


def read_config(path: str | os.PathLike, argument: str) -> dict[str, Any]:
    """
    Read a config file.

    Args:
        path: a JSON or YAML file.
        argument: what named it, for the error.

    Raises:
        ValueError: when it cannot be read or holds no config.

    Example:
        >>> read_config("bundles/knowsam_acdc/configs/inference.json", "bundle")["num_classes"]     # doctest: +SKIP
        4
    """
    try:
        config = ConfigParser.load_config_file(str(path))
    except Exception as error:  # JSON's, YAML's and the operating system's
        reason = " ".join(str(error).split())
        raise KnowSAMValueError(
            f"`{argument}` must have a whole config but {path} is damaged ({reason}); copy it anew."
        ) from error
    if not isinstance(config, dict):
        raise KnowSAMValueError(
            f"`{argument}` must have a config of keys and values but {path} has none; copy it anew."
        )
    return config


def _are_of_a_phantom(scans: Path) -> bool:
    """Is it a phantom's folder, its data list, a patient's folder in it, or a file of that?"""
    folders = (scans, *scans.parents[:2])
    return is_phantom(scans) or any(is_phantom(folder / LIST_NAME) for folder in folders)


def _trained_on(config: Path) -> str:
    parser = ConfigParser(ConfigParser.load_config_file(str(config)))
    dataset_dir = parser.get_parsed_content("dataset_dir")
    if dataset_dir is None or is_phantom(Path(dataset_dir).expanduser()):
        return PHANTOM
    return Path(dataset_dir).expanduser().resolve().name


def _hashes(folder: Path, names: Iterable[str] = (MODEL, CONFIG)) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
