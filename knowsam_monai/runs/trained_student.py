"""The student of a bundle, and the record of its training."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from knowsam_monai.data.overlap import image_paths
from knowsam_monai.data.phantom import LIST_NAME, is_phantom
from knowsam_monai.errors import KnowSAMValueError, root_cause
from knowsam_monai.files import InvalidCheckpointError, copy_whole, iter_csv, read_tensor_file, write_text
from knowsam_monai.runs.config import read_config

logger = logging.getLogger(__name__)

MODEL, RECORD, CONFIG = "model.pt", "model.json", "config.json"
KEY_METRIC = "val_mean_dice"
PHANTOM = "synthetic phantom"
# keys that training and inference share by name but not by value
NOT_OF_THE_STUDENT = {
    *("imports", "bundle_root", "dataset_dir", "output_dir", "device", "initialize", "run", "finalize"),
    "window_overlap",  # the published overlap is too slow for validation during training
}

SHARED_SETTINGS = ("image_size", "spacing", "intensity_window")  # of the images that the student sees
STUDENT_SETTINGS = (*SHARED_SETTINGS, "crop_size", "in_channels", "num_classes", "channels", "aggregation_channels")
STARTS = "run.json"  # what a run records about its starts, in its folder


def publish_student(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike, replace: bool = True) -> None:
    """
    Copy a run's best student and its config into the bundle, with a record of the training in ``model.json``.

    The record has the run's name, the training data (the phantom, or the last part of the data set's path), the hashes
    of both files, the metrics of the validation that chose the student, and the settings that every use of it shares. A
    class that no validation label has is left out of the metrics.

    Args:
        output_dir: the run's folder, with ``model.pt``, ``config.json`` and ``results.csv``.
        ckpt_dir: the bundle's ``models``, created if missing.
        replace: False keeps another student that was published after this one was trained.

    Raises:
        OSError: if a file of the run is missing or `ckpt_dir` cannot be written.
        ValueError: if ``model.pt`` is damaged.

    Example:
        >>> publish_student("output/knowsam_phantom_seed0", "models")     # doctest: +SKIP
    """
    run, folder = Path(output_dir).resolve(), Path(ckpt_dir)
    try:
        read_tensor_file(run / MODEL)
    except InvalidCheckpointError as error:
        raise KnowSAMValueError(f"{run / MODEL} must be a run's student but it {error}") from error
    hashes = _hashes(run)
    try:
        published = read_record(folder)
    except ValueError:  # none, or it was not written completely
        published = {"run": run.name, "sha256": hashes}
    is_other = (published["run"], published["sha256"][MODEL]) != (run.name, hashes[MODEL])
    if is_other and not replace and os.path.getmtime(folder / RECORD) >= os.path.getmtime(run / MODEL):
        message = "Student: %s is still that of %s, which is newer; to publish this run's, remove it and repeat."
        logger.warning(message, folder / MODEL, published["run"])
        return
    try:
        rows = [row for row in iter_csv(run / "results.csv") if math.isfinite(float(row[KEY_METRIC]))]
        best = max(rows, key=lambda row: float(row[KEY_METRIC]))
        found = {key: float(value) for key, value in best.items() if key.startswith(KEY_METRIC)}
    except (ValueError, KeyError, csv.Error) as error:  # the student itself is intact
        logger.warning("%s cannot be read (%s), so %s has no metrics.", run / "results.csv", error, RECORD)
        found = {}
    metrics = {key: round(value, 4) for key, value in found.items() if math.isfinite(value)}  # JSON has no NaN
    trained_on = training_data(ConfigParser.load_config_file(str(run / CONFIG)))
    record = {"run": run.name, "trained_on": trained_on, "sha256": hashes, "metrics": metrics}
    record["settings"] = student_options(run / CONFIG, SHARED_SETTINGS)
    copy_whole(run / MODEL, folder / MODEL)
    copy_whole(run / CONFIG, folder / CONFIG)
    write_text(folder / RECORD, json.dumps(record, indent=4) + "\n")
    replaced = f" (replaces that of {published['run']})" if published["run"] != run.name else ""
    logger.info("Student: %s%s", folder / MODEL, replaced)


def read_record(ckpt_dir: str | os.PathLike) -> dict[str, Any]:
    """
    Read the record that :func:`publish_student` wrote.

    Args:
        ckpt_dir: the bundle's ``models``.

    Returns:
        `run`: its name; `trained_on`; `sha256`: of ``model.pt`` and, except in the Model Zoo's zip, of ``config.json``;
        `metrics`: Dice, 0..1, by name; and `settings`: size, spacing and intensity window of its images.

    Raises:
        ValueError: if there is no record, or it does not match the student or the config in the folder.

    Example:
        >>> read_record("models")["metrics"]["val_mean_dice"]     # doctest: +SKIP
    """
    folder = Path(ckpt_dir)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = record["sha256"]  # in a zip, of the weights alone
        is_valid = MODEL in hashes and hashes == _hashes(folder, hashes)
        is_valid = is_valid and {"run", "trained_on", "metrics"} <= set(record)
    except (OSError, ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise KnowSAMValueError(
            f"{folder / MODEL} must be next to the {RECORD} and {CONFIG} of the run that trained it, but they are "
            "missing or belong to another run; copy all three files from that run's bundle."
        )
    return record


def warn_of_phantom(
    ckpt_path: str | os.PathLike, dataset_dir: str | os.PathLike | None, items: Sequence[Mapping] = ()
) -> None:
    """
    Warn if a student that was trained on the phantom is used for a user's scans.

    Args:
        ckpt_path: the student's weights; there is no warning if nothing beside them tells their training.
        dataset_dir: the user's scans; there is no warning for a phantom. None: the images of `items`, or the phantom.
        items: the images that are segmented, `{"image": path}`.

    Example:
        >>> warn_of_phantom("models/model.pt", "/data/scans")
    """
    path = Path(ckpt_path)
    if dataset_dir is None and len(items) > 0:
        dataset_dir = image_paths(items[0])[0]
    if dataset_dir is None or _are_of_a_phantom(Path(dataset_dir).resolve()):
        return
    record = _origin(path)
    if record.get("trained_on") == PHANTOM:
        logger.warning(
            "%s comes from the run %s, which was trained on the %s, so its segmentations of patients are useless. "
            "Train on your own data first, or use another student (--ckpt_path FILE; with `knowsam predict` also --run "
            "FOLDER).",
            path,
            record["run"],
            PHANTOM,
        )


def warn_of_other_settings(ckpt_path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """
    Warn if the size, spacing or intensity window of the images differs from that in the training of a student.

    Args:
        ckpt_path: the student's weights; there is no warning if nothing beside them tells their training.
        settings: the settings of this evaluation or inference.

    Example:
        >>> warn_of_other_settings("models/model.pt", {"image_size": 256})
    """
    trained = trained_settings(ckpt_path)
    for key in sorted(set(SHARED_SETTINGS) & trained.keys() & settings.keys()):
        value = list(settings[key]) if isinstance(settings[key], tuple) else settings[key]
        if value != trained[key]:
            logger.warning(
                "`%s` is %s but %s was trained with %s; set it to that (--%s %s; in `knowsam predict` --run FOLDER "
                "without --set %s).",
                *(key, value, ckpt_path, trained[key], key),
                "'$None'" if trained[key] is None else shlex.quote(str(trained[key])),
                key,
            )


def trained_settings(ckpt_path: str | os.PathLike) -> dict[str, Any]:
    """
    The settings of a student's training, as its record or its run's ``run.json`` beside it has them; maybe none.

    Args:
        ckpt_path: the student's weights, of any name.

    Example:
        >>> trained_settings("output/my_run/last_model_epoch=4.pt")     # doctest: +SKIP
        {'image_size': 64, 'intensity_window': None}
    """
    settings = _origin(ckpt_path).get("settings")
    return {key: settings[key] for key in STUDENT_SETTINGS if key in settings} if isinstance(settings, Mapping) else {}


def student_options(config: str | os.PathLike, known: Iterable[str]) -> dict[str, Any]:
    """
    The settings that inference must share with the training of a student: its network, classes and sizes.

    Args:
        config: ``config.json`` of the run. It contains code, which is executed.
        known: keys of the inference config.

    Returns:
        The values of these keys in the run; ``network_def`` as written, all others evaluated.

    Raises:
        ValueError: if the file is damaged or one of its values cannot be evaluated.

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
            except Exception as error:  # the code in a config can raise anything
                raise KnowSAMValueError(
                    f"`run` must have a config that can be evaluated but `{key}` in {config} cannot be "
                    f"({root_cause(error)}); copy the file again from where it was trained."
                ) from error
    return options


def _are_of_a_phantom(scans: Path) -> bool:
    """Whether the path is a phantom's folder, its data list, or a patient's folder or file in it."""
    folders = (scans, *scans.parents[:2])
    return is_phantom(scans) or any(is_phantom(folder / LIST_NAME) for folder in folders)


def _origin(ckpt_path: str | os.PathLike) -> dict[str, Any]:
    """What is known of a student's training: its record, or what the run wrote in whose folder it is; maybe nothing."""
    path = Path(ckpt_path)
    with suppress(ValueError):
        if path.name == MODEL:
            return read_record(path.parent)
    try:
        return dict(json.loads((path.parent / STARTS).read_text(encoding="utf-8"))["starts"][-1]["student"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # the origin of these weights is unknown
        return {}


def training_data(config: Mapping[str, Any]) -> str:
    """
    What a run trains on, in words for ``model.json``.

    Args:
        config: the run's merged config.

    Example:
        >>> training_data({"dataset_dir": None})
        'synthetic phantom'
    """
    parser = ConfigParser(dict(config))
    dataset_dir = parser.get_parsed_content("dataset_dir")
    if dataset_dir is None and "load_datalist" not in json.dumps(parser.config.get("datalist", "load_datalist")):
        return "the data list in its config"
    if dataset_dir is None or is_phantom(Path(dataset_dir)):
        return PHANTOM
    return Path(dataset_dir).resolve().name


def _hashes(folder: Path, names: Iterable[str] = (MODEL, CONFIG)) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
