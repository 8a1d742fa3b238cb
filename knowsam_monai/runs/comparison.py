"""What identifies a run, as plain data: its settings and the content of its data. All starts of a run must agree."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from knowsam_monai.files import sha256
from knowsam_monai.runs.config import SECTIONS, plain_values
from knowsam_monai.texts import shortened

# A run may resume if these differ: they affect where it runs and what it shows, but not its result.
LEFT_OUT = {
    # paths: the content is compared instead, see `DATA` and `WEIGHTS`
    *("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "run_name", "sam_cache_dir", "cache_dir", "log_dir"),
    "teacher_pretrained_on",  # a note for the report
    # machine, processes and threads
    *("device", "sync_batchnorm", "process_timeout", "num_workers", "cache_workers", "pin_memory"),
    # starting and logging
    *(*SECTIONS, "log_interval", "preflight", "resume"),
}
DATA = {"datalist", "data_check"}  # top-level keys that read the data
PLACED = {"network", "validate#dataloader", "validate#sampler"}  # moved to devices and ranks by multi_gpu_train.json
WATCHING = {  # handlers that change nothing in the run, and the functions that assemble them
    *("StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "MLFlowHandler", "LossTerms"),
    *("TrainingProgress", "WholeCheckpointSaver", "Resume", "RunRecord", "Preflight", "ValidationHistory"),
    *("ValidationReport", "training_handlers", "validation_handlers"),
}
WEIGHTS = {"sam_checkpoint", "teacher_bundle"}  # a file, a folder, or weights that come with the package
# files of a folder that are compared: of a bundle's network, and of a model as the hub stores it
OF_A_MODEL = ("configs/inference.*", "models/model.pt", "models/model.ts", "config.json", "*.safetensors")
TRAINED_ON = ("labeled", "unlabeled", "validation")


def configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The part of a config that affects a run's result, flat, by the keys of MONAI's command line.

    A plain top-level key has its evaluated value. Everything inside a component has its text.

    Args:
        config: a merged config, see :func:`knowsam_monai.runs.config.running_config`.

    Example:
        >>> configured({"lr": "$1 / 4", "device": "cpu", "loss": {"_target_": "DiceLoss", "sigmoid": True}})
        {'lr': 0.25, 'loss#_target_': 'DiceLoss', 'loss#sigmoid': True}
    """
    values = {key: value for key, value in plain_values(config).items() if _is_data(value)}
    settings: dict[str, Any] = {}
    for key, part in config.items():
        if key in WEIGHTS and key in values:
            if values.get("use_sam", True):
                settings[key] = _content(values[key])
        elif key in values and key not in LEFT_OUT:
            settings[key] = _as_json(values[key])
        elif key not in LEFT_OUT | DATA | PLACED:
            settings.update(_leaves(part, key))
    return settings


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    The settings that differ, one phrase for each key.

    Args:
        before: the result of :func:`configured` in the run to be resumed.
        now: its result in this start.

    Example:
        >>> other_settings({"lr": 0.1, "seed": 0}, {"lr": 0.3, "seed": 0})
        ['`lr` must be 0.1 but is 0.3']
    """
    keys = [key for key in {**before, **now} if key not in before or key not in now or before[key] != now[key]]
    return [f"`{key}` must be {_short(before, key)} but is {_short(now, key)}" for key in keys]


def digests(contents: Mapping[str, Sequence[tuple[str, str]]] | None) -> dict[str, list[str]] | None:
    """
    The hashes of all items in the sets that a training reads; None if `contents` is None.

    Args:
        contents: ``DatalistReport.contents``, see :class:`knowsam_monai.data.DatalistReport`.

    Example:
        >>> digests({"labeled": [("a.nii", "07")], "test": [("b.nii", "1e")]})
        {'labeled': ['07']}
    """
    if contents is None:
        return None
    return {name: [digest for _, digest in contents[name]] for name in TRAINED_ON if contents.get(name)}


def other_data(
    before: Mapping[str, Sequence[str]] | None, contents: Mapping[str, Sequence[tuple[str, str]]] | None
) -> list[str]:
    """
    The items that changed, moved to another list or are new; empty if either argument is None. Paths may differ.

    Args:
        before: the result of :func:`digests` in the run to be resumed.
        contents: ``DatalistReport.contents`` in this start.

    Example:
        >>> other_data({"labeled": ["07", "1e"]}, {"labeled": [("a.nii", "07"), ("b.nii", "5f")]})
        ['b.nii or its label must be unchanged but is new or has different content']
    """
    if before is None or contents is None:
        return []
    places = {digest: name for name, all_of_list in before.items() for digest in all_of_list}
    differences = []
    for name in TRAINED_ON:
        old, new = before.get(name, []), contents.get(name, [])
        known = set(old)
        others = [(file, places.get(digest)) for file, digest in new if digest not in known]
        if len(old) != len(new):
            differences.append(f"`{name}` must have {len(old)} items but has {len(new)}")
        elif not others and list(old) != [digest for _, digest in new]:
            differences.append(f"`{name}` must have its items in the same order but has them in another")
        for file, place in others:
            moved = f"{file} must be in `{place}` of the data list but is in `{name}`"
            changed = f"{file} or its label must be unchanged but is new or has different content"
            differences.append(moved if place else changed)
    return differences


def _leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The path and text of everything in a section."""
    if path in PLACED or path.rpartition("#")[2] in LEFT_OUT or _watches(part):
        return
    if isinstance(part, (list, tuple)):
        part = dict(enumerate(entry for entry in part if not _watches(entry)))
    if isinstance(part, Mapping) and part:
        for name, inner in part.items():
            yield from _leaves(inner, f"{path}#{name}")
    elif _is_data(part):  # an object that Python code inserted has no text
        yield path, part


def _watches(part: Any) -> bool:
    return isinstance(part, Mapping) and str(part.get("_target_")).rpartition(".")[2] in WATCHING


def _content(weights: Any) -> Any:
    """The hashes of a file or folder, independent of its place; a value that is neither is returned as it is."""
    if not isinstance(weights, (str, os.PathLike)) or not Path(weights).exists():
        return weights
    path = Path(weights)
    if path.is_file():
        return f"a file of {_hash(path)}"
    files = sorted(file for pattern in OF_A_MODEL for file in path.glob(pattern))
    return {str(file.relative_to(path)): _hash(file) for file in files}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256 {sha256(file)}"


def _is_data(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _as_json(value: Any) -> Any:
    """The value as JSON stores it: a tuple equals a list."""
    return json.loads(json.dumps(value))


def _short(settings: Mapping[str, Any], key: str) -> str:
    return shortened(repr(settings[key]), 80) if key in settings else "left out"
