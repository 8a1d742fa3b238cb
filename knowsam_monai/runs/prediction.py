from __future__ import annotations

import ast
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ignite.handlers import ProgressBar
from monai.bundle import ConfigWorkflow, ReferenceResolver

from knowsam_monai.errors import KnowSAMError, KnowSAMFileNotFoundError, KnowSAMValueError, named_as_set, root_cause
from knowsam_monai.files import expand_path
from knowsam_monai.runs.bundle_folder import SHIPPED
from knowsam_monai.runs.checks import check_writable
from knowsam_monai.runs.config import literal, parts, plain_values, read_config
from knowsam_monai.runs.segmenting import SkippingLoader, reason
from knowsam_monai.runs.trained_student import CONFIG, MODEL, student_options, trained_settings

# Keys of inference.json that `predict_folder` has arguments for.
OWN_ARGUMENTS = {
    "bundle_root": "use `bundle` (--bundle)",
    "dataset_dir": "use `scans`",
    "output_dir": "use `output` (--output)",
    "ckpt_path": "use `ckpt_path` (--ckpt_path)",
    "device": "use `device` (--device)",
    "image_pattern": "use `image_pattern` (--image_pattern)",
}

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
    Segment scans with a bundle's ``inference.json``, showing a progress bar.

    If some images cannot be segmented, all others are segmented first; then an error lists the failed images with their
    reasons.

    Args:
        scans: a folder of images, or one image.
        bundle: the bundle's folder. Its configs contain code, which is executed; so does the config of `run`.
        output: folder of the segmentations, created if missing.
        run: folder of a training, whose student is used with the image size and classes of that training; None for the
            bundle's ``models``, where its last training published them.
        ckpt_path: weights of another student, used with the sizes in the ``run.json`` of a run beside them; else with
            those of `run` or ``inference.json``.
        image_pattern: glob pattern of the images below `scans`; None for the config's own.
        device: such as "cpu"; None for the config's own.
        overrides: further keys of ``inference.json`` by name, with values as JSON (`256`, `[64, 64, 32]`, `null`), as
            in Python (`True`, `None`), or text. Expressions, references and components are refused.

    Returns:
        Number of scans.

    Raises:
        FileNotFoundError: if the bundle, its student, the run or the file of weights does not exist.
        PermissionError: if `output` cannot be written.
        ValueError: if a config is damaged, the run belongs to another bundle, a key is not in ``inference.json``, a
            value of `overrides` does not work, the device does not exist or the bundle refuses the scans; and at the
            end, if images could not be segmented, with a line for each.

    Example:
        >>> predict_folder("/data/scans", "bundles/knowsam_acdc", "segmentations")     # doctest: +SKIP
    """
    bundle = Path(expand_path(bundle, "bundle"))
    config_file = next((f for f in sorted((bundle / "configs").glob("inference.*"))), None)
    if config_file is None:
        raise KnowSAMFileNotFoundError(
            f"`bundle` must be a bundle's folder but {bundle} has no configs/inference.json."
        )
    known = read_config(config_file, "bundle")
    values = _parsed_overrides(overrides or {}, known, config_file)
    scans, output = expand_path(scans, "scans"), expand_path(output, "output")
    options: dict[str, Any] = {"bundle_root": literal(str(bundle)), "dataset_dir": literal(scans)}
    options["output_dir"] = literal(output)
    if image_pattern is not None:
        options["image_pattern"] = literal(image_pattern)
    if run is None and ckpt_path is None and (bundle / "models" / CONFIG).is_file():
        run = bundle / "models"
    if run is not None:
        options.update(_options_of_run(Path(expand_path(run, "run")), known))
    if ckpt_path is not None:
        weights = _existing_weights(Path(expand_path(ckpt_path, "ckpt_path")))
        if run is None:
            beside = trained_settings(weights).items()
            options.update({key: value for key, value in beside if key in known and not _is_code(value)})
        options["ckpt_path"] = literal(str(weights))
    student = plain_values({**known, **options}).get("ckpt_path")
    if run is None and ckpt_path is None and student is not None and not os.path.isfile(student):
        name = bundle.name.removeprefix("knowsam_") if bundle.parent == SHIPPED else bundle
        raise KnowSAMFileNotFoundError(
            f"`bundle` must have a trained student but {student} does not exist; run `knowsam train {name}` first, or "
            "choose a student (--run FOLDER, --ckpt_path FILE)."
        )
    if device is not None:
        options["device"] = literal(device)  # `check_config` turns it into a device
    options.update({key: literal(value) for key, value in values.items()})

    _quieten()
    sys.path.insert(1, str(bundle))  # `scripts` of the bundle
    assignments = " ".join(f"{key}={value}" for key, value in (overrides or {}).items())
    try:
        workflow = ConfigWorkflow(str(config_file), logging_file=False, workflow_type="infer", **options)
        with named_as_set({"output_dir": "output"}):
            loader = _segment(workflow, output)
    except Exception as error:
        root = root_cause(error)
        if not overrides or isinstance(root, KnowSAMError):
            raise
        raise KnowSAMValueError(
            f"`overrides` (--set) must be values that {config_file} works with but {assignments} failed with "
            f"{reason(root)}; correct them or leave them out."
        ) from error
    logger.info("%d segmentation%s in %s", loader.num_segmented, "" if loader.num_segmented == 1 else "s", output)
    with named_as_set({"output_dir": "output"}):
        loader.raise_if_broken("scans", f"correct --set {assignments}, or " if assignments else "")
    return loader.num_segmented


def _segment(workflow: ConfigWorkflow, output: str) -> SkippingLoader:
    """Run the workflow, and return its loader, which knows the images that could not be segmented."""
    workflow.initialize()
    if "datalist" in workflow.parser:
        workflow.parser.get_parsed_content("datalist")  # reports missing scans before problems of the student
    loader = SkippingLoader(workflow.evaluator)
    ProgressBar(desc="Segmenting", persist=True).attach(workflow.evaluator)
    check_writable(output=output)
    workflow.run()
    workflow.finalize()
    loader.raise_if_faulty()
    return loader


def _existing_weights(path: Path) -> Path:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise KnowSAMFileNotFoundError(
            f"`ckpt_path` must be a file with a student's weights but {path} {found}; pass the file, such as model.pt."
        )
    return path


def _parsed_overrides(overrides: Mapping[str, str], known: Iterable[str], config_file: Path) -> dict[str, Any]:
    """The values as JSON, Python or text; whatever the config's parser would evaluate, look up or build is refused."""
    values = {}
    for key, text in overrides.items():
        if key not in known:
            raise KnowSAMValueError(
                f"`{key}` must be a key of {config_file} but is not; its keys are {', '.join(known)}."
            )
        if key in OWN_ARGUMENTS:
            raise KnowSAMValueError(
                f"`{key}` must be left out of `overrides` (--set) but is {text!r}; {OWN_ARGUMENTS[key]}."
            )
        values[key] = _parsed(text)
        if _is_code(values[key]):
            raise KnowSAMValueError(
                f"`{key}` must be a plain value in `overrides` (--set) but is {text!r}; pass the value itself, or "
                "put the expression into a config of your own."
            )
    return values


def _parsed(text: str) -> Any:
    """The value of JSON or a Python literal; other texts as they are, which fire would cut at a `#`."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return parse(text)
    return text


def _is_code(value: Any) -> bool:
    """Whether MONAI's parser would evaluate, look up or build something in a value."""
    return any(
        name.rpartition("#")[2].startswith("_") or isinstance(part, str) and part.startswith(("$", "@", "%"))
        for name, part in parts(value)
    )


def _quieten() -> None:
    """Silence a line for each file and a note on the bundle's logging; the bar shows the progress."""
    for name in ("monai.bundle.workflows", "monai.data.image_writer", "ignite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _options_of_run(run: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a run, and the settings that inference must share with their training."""
    for name in (MODEL, CONFIG):
        if not (run / name).is_file():
            raise KnowSAMFileNotFoundError(f"`run` must be the `output_dir` of a training but {run} has no {name}.")
    options = student_options(run / CONFIG, known)
    network, own = options.get("network_def"), known.get("network_def")
    references = [name.split("::")[0] for name in ReferenceResolver.find_refs_in_config(network, "network_def")]
    unknown = [name for name in references if name not in known]
    dims = [part.get("spatial_dims") if isinstance(part, Mapping) else None for part in (network, own)]
    problem = f"needs `{unknown[0]}`, which the bundle does not have" if unknown else ""
    if None not in dims and dims[0] != dims[1]:
        problem = f"is {dims[0]}D and the bundle's is {dims[1]}D"
    if problem:
        raise KnowSAMValueError(
            f"`run` must be a training of this bundle but the network in {run / CONFIG} {problem}; choose the bundle "
            "it was trained with, or another run."
        )
    return {**options, "ckpt_path": str(run / MODEL)}
