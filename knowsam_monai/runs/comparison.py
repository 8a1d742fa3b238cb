"""What a run is, as plain data: what was configured, and what its data hold. Two starts of one run agree in both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from knowsam_monai.files import sha256
from knowsam_monai.runs.config import SECTIONS, plain_values

# A run may go on when these differ: they say where it runs and what it shows, and not what it comes to.
LEFT_OUT = {
    # places: what lies there is compared instead, see `DATA` and `WEIGHTS`
    *("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "run_name", "sam_cache_dir", "cache_dir", "log_dir"),
    # machine, processes and threads
    *("device", "sync_batchnorm", "process_timeout", "num_workers", "cache_workers", "pin_memory", "fast_cpu_matmul"),
    # starting and logging
    *(*SECTIONS, "log_interval", "preflight", "resume"),
}
DATA = {"datalist", "data_check"}  # top-level keys that read the data
PLACED = {"network", "validate#dataloader", "validate#sampler"}  # put on devices and ranks, by multi_gpu_train.json
WATCHING = {  # handlers, and what assembles them, that change nothing in the run
    *("StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "MLFlowHandler", "LossTerms"),
    *("TrainingProgress", "WholeCheckpointSaver", "Resume", "RunRecord", "Preflight", "ValidationHistory"),
    *("ValidationReport", "training_handlers", "validation_handlers"),
}
WEIGHTS = "sam_checkpoint"  # names a file, or weights that come with the package
TRAINED_ON = ("labeled", "unlabeled", "validation")


def configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The part of a config that a run's result depends on, flat, by the keys that MONAI's command line takes.

    A plain top-level key has its value, whether it was given or is the default; what is in a component has its text.

    Args:
        config: a merged config, see :func:`knowsam_monai.runs.config.running_config`.

    Example:
        >>> configured({"lr": "$1 / 4", "device": "cpu", "loss": {"_target_": "DiceLoss", "sigmoid": True}})
        {'lr': 0.25, 'loss#_target_': 'DiceLoss', 'loss#sigmoid': True}
    """
    values = {key: value for key, value in plain_values(config).items() if _is_data(value)}
    found: dict[str, Any] = {}
    for key, part in config.items():
        if key == WEIGHTS and key in values:
            if values.get("use_sam", True):
                found[key] = _content(values[key])
        elif key in values and key not in LEFT_OUT:
            found[key] = _as_list(values[key])
        elif key not in LEFT_OUT | DATA | PLACED:
            found.update(_leaves(part, key))
    return found


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    Say of each key what it was and what it is; nothing where they agree.

    Args:
        before: of :func:`configured`, from the run that is to go on.
        now: the same of this start.

    Example:
        >>> other_settings({"lr": 0.1, "seed": 0}, {"lr": 0.3, "seed": 0})
        ['`lr` must be 0.1 but is 0.3']
    """
    keys = [key for key in {**before, **now} if key not in before or key not in now or before[key] != now[key]]
    return [f"`{key}` must be {_short(before, key)} but is {_short(now, key)}" for key in keys]


def digests(contents: Mapping[str, Sequence[tuple[str, str]]] | None) -> dict[str, list[str]] | None:
    """
    What is kept of the data: a hash for each item of the sets that a training reads. None of None.

    Args:
        contents: of :class:`knowsam_monai.data.DatalistReport`.

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
    Say which files hold something else than before, wherever they lie; nothing where either is not known.

    Args:
        before: of :func:`digests`, from the run that is to go on.
        contents: of this start.

    Example:
        >>> other_data({"labeled": ["07", "1e"]}, {"labeled": [("a.nii", "07"), ("b.nii", "5f")]})
        ['b.nii, or its label, must be as it was but has other content']
    """
    if before is None or contents is None:
        return []
    found = []
    for name in TRAINED_ON:
        then, now = before.get(name, []), contents.get(name, [])
        if len(then) != len(now):
            found.append(f"`{name}` must have {len(then)} items but has {len(now)}")
            continue
        others = [file for (file, digest), one in zip(now, then) if digest != one]
        found += [f"{file}, or its label, must be as it was but has other content" for file in others]
    return found


def _leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Path and text of all that is in a section."""
    if path in PLACED or path.rpartition("#")[2] in LEFT_OUT or _watches(part):
        return
    if isinstance(part, (list, tuple)):
        part = dict(enumerate(entry for entry in part if not _watches(entry)))
    if isinstance(part, Mapping) and part:
        for name, inner in part.items():
            yield from _leaves(inner, f"{path}#{name}")
    elif _is_data(part):  # an object that Python code put in has no text
        yield path, part


def _watches(part: Any) -> bool:
    return isinstance(part, Mapping) and str(part.get("_target_")).rpartition(".")[2] in WATCHING


def _content(weights: Any) -> Any:
    """The hash of a file, in whichever folder it lies; what is no file is what it is."""
    if not isinstance(weights, (str, os.PathLike)) or not Path(weights).expanduser().is_file():
        return weights
    with open(Path(weights).expanduser(), "rb") as file:
        return f"a file of sha256 {sha256(file)}"


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_data(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _as_list(value: Any) -> Any:
    """As JSON has it: whether a list or a tuple was configured makes no difference."""
    if isinstance(value, Mapping):
        return {key: _as_list(part) for key, part in value.items()}
    return [_as_list(part) for part in value] if isinstance(value, (list, tuple)) else value


def _short(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "left out"
    return text if len(text) <= 80 else f"{text[:60]}..."
