from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.handlers import ProgressBar
from monai.bundle import ConfigParser, ConfigWorkflow

from knowsam_monai.trained_student import CONFIG, MODEL, student_options

__all__ = ["predict_folder"]

logger = logging.getLogger(__name__)


def predict_folder(
    scans: str | os.PathLike,
    bundle: str | os.PathLike,
    output: str | os.PathLike,
    run: str | os.PathLike | None = None,
    ckpt_path: str | os.PathLike | None = None,
    image_pattern: str | None = None,
    device: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> int:
    """
    Segment scans by a bundle's ``inference.json``, with a progress bar.

    Args:
        scans: a folder of images, or one image.
        bundle: the bundle's folder. Its configs are code that is run, and so is that of `run`.
        output: folder of the segmentations, made when missing.
        run: folder of a training, whose student is taken at the size and with the classes of that training; None for
            the bundle's ``models``, where its last training left these.
        ckpt_path: another student's weights, at the sizes of ``inference.json``.
        image_pattern: glob pattern of the images below `scans`; None for the config's own.
        device: such as "cpu"; None for the config's own.
        overrides: further keys of ``inference.json`` by name, their values as JSON (`256`, `[64, 64, 32]`, `null`) or
            text.

    Returns:
        Number of scans.

    Raises:
        FileNotFoundError: when there is no such bundle or run.
        ValueError: when a key is none of ``inference.json`` or there is no such device; or of the bundle, about the
            scans.

    Example:
        >>> predict_folder("/data/scans", "bundles/knowsam_acdc", "segmentations")     # doctest: +SKIP
    """
    bundle = Path(bundle).expanduser()
    config_file = next((f for f in sorted((bundle / "configs").glob("inference.*"))), None)
    if config_file is None:
        raise FileNotFoundError(f"`bundle` must be a bundle's folder but {bundle} has no configs/inference.json.")
    known = ConfigParser.load_config_file(str(config_file))
    unknown = [key for key in overrides or {} if key.split("#")[0] not in known]
    if unknown:
        raise ValueError(f"`{unknown[0]}` must be a key of {config_file} but is none; it has {', '.join(known)}.")

    options: dict[str, Any] = {"bundle_root": str(bundle), "dataset_dir": str(scans), "output_dir": str(output)}
    if image_pattern is not None:
        options["image_pattern"] = image_pattern
    if run is None and ckpt_path is None and (bundle / "models" / CONFIG).is_file():
        run = bundle / "models"
    if run is not None:
        options.update(_options_of_run(Path(run).expanduser(), known))
    if ckpt_path is not None:
        options["ckpt_path"] = str(ckpt_path)
    if device is not None:
        options["device"] = f"$torch.device({_checked(device)!r})"
    options.update({key: _value(value) for key, value in (overrides or {}).items()})

    _quieten()
    workflow = ConfigWorkflow(str(config_file), logging_file=False, workflow_type="infer", **options)
    sys.path.insert(1, str(bundle))  # `scripts` of the bundle
    workflow.initialize()
    evaluator = workflow.evaluator
    ProgressBar(desc="Segmenting", persist=True).attach(evaluator)
    workflow.run()
    workflow.finalize()
    number = len(evaluator.data_loader.dataset)
    logger.info("%d segmentations in %s", number, output)
    return number


def _value(text: str) -> Any:
    """A number, list, true, false or null as JSON has them; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(device: str) -> str:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`device` must be one of this machine but is {device!r} ({reason}); cpu is always there."
        ) from None
    return device


def _quieten() -> None:
    """The bar says how far it is: no line for each file, nor that the bundle's own logging is not used."""
    for name in ("monai.bundle.workflows", "monai.data.image_writer", "ignite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _options_of_run(run: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a run, and what inference must share with their training."""
    for name in (MODEL, CONFIG):
        if not (run / name).is_file():
            raise FileNotFoundError(f"`run` must be the `output_dir` of a training but {run} has no {name}.")
    return {**student_options(run / CONFIG, known), "ckpt_path": str(run / MODEL)}
