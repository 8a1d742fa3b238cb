"""Helpers of the data lists: splitting a published list of training patients, and reading files."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.files import expand_path


def split_training(
    training: Sequence[str], labeled_patients: int, holdout_patients: int, protocols: Collection[int]
) -> tuple[list[str], list[str], list[str]]:
    """Split a training list, in its order, into labeled, unlabeled and held-out patients.

    Args:
        training: names of the training patients; the first `labeled_patients` are labeled.
        labeled_patients: one of `protocols`.
        holdout_patients: number of patients to hold out from the end of the list.
        protocols: the published numbers of labeled patients.

    Raises:
        ValueError: if `labeled_patients` is not a published number, or if the list is too short.

    Example:
        >>> split_training("abcdef", labeled_patients=2, holdout_patients=1, protocols=(2, 3))
        (['a', 'b'], ['c', 'd', 'e'], ['f'])
    """
    if type(labeled_patients) is not int or labeled_patients not in protocols:
        raise KnowSAMValueError(
            f"`labeled_patients` must be one of {list(protocols)} but is {labeled_patients!r}; "
            "write a data-list JSON for other selections."
        )
    if labeled_patients > len(training):
        raise KnowSAMValueError(
            f"`labeled_patients` must be at most the {len(training)} patients of the training list "
            f"but is {labeled_patients}."
        )
    most = len(training) - labeled_patients
    if type(holdout_patients) is not int or not 0 <= holdout_patients <= most:
        raise KnowSAMValueError(
            f"`holdout_patients` must be from 0 to {most} with {labeled_patients} labeled patients "
            f"but is {holdout_patients}."
        )
    kept = len(training) - holdout_patients
    return list(training[:labeled_patients]), list(training[labeled_patients:kept]), list(training[kept:])


def without_labels(items: Sequence[dict]) -> list[dict]:
    """The same items without a label key."""
    return [{key: value for key, value in item.items() if key != "label"} for item in items]


def existing_file(path: Path, content: str) -> str:
    """The path of a file that must exist, as text; `content` describes for the error what is required."""
    if not os.path.isfile(path):
        raise KnowSAMFileNotFoundError(
            f"`dataset_dir` must contain {content} but {path} is missing; unpack the data again."
        )
    return str(path)


def listed_names(path: Path) -> list[str]:
    """The names in a text file with one name per line; names that leave the folder are refused."""
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise KnowSAMValueError(
            f"`{path.name}` must be a text file of names but {path} is not; unpack it again."
        ) from error
    for name in names:
        if ".." in (PurePosixPath(name).parts or "..") or name.startswith("/"):
            raise KnowSAMValueError(
                f"`{path.name}` must only have names in its own folder but {path} has {name!r}; correct the list."
            )
    return names


def read_json(path: str | Path) -> Any:
    """Read a JSON file, with or without a byte-order mark.

    Raises:
        ValueError: if it cannot be read, is not JSON, is nested too deeply, or has a duplicate key in an object;
            without the file's name.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise KnowSAMValueError("it is nested too deeply") from None
    except OSError as error:
        raise KnowSAMValueError(error.strerror) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        duplicate = next(key for key in content if sum(key == other for other, _ in pairs) > 1)
        raise KnowSAMValueError(f"the key {duplicate!r} appears twice")
    return content


def unknown_folder(dataset_dir: str | Path, forms: Sequence[str], or_phantom: bool = False) -> KnowSAMValueError:
    """The error for a `dataset_dir` without a known format; `forms` describe the supported ones."""
    root = Path(expand_path(dataset_dir, "dataset_dir"))
    lists: list[Path] = []
    if not os.path.exists(root):
        found = "does not exist"
    elif not os.path.isdir(root):
        found = "is a file"
    elif not os.access(root, os.R_OK | os.X_OK):
        found = "cannot be read"
    else:
        found = "contains none of them" if any(root.iterdir()) else "is empty"
        lists = [path for path in sorted(root.glob("*.json")) if _is_datalist(path)]
    remedy = f"use its data list {lists[0]}" if lists else "use the folder that contains one of these"
    phantom = ", or leave out `dataset_dir` to use the synthetic phantom" if or_phantom else ""
    return KnowSAMValueError(
        f"`dataset_dir` must be {', '.join(forms)} or a data-list *.json but {root} {found}; {remedy}{phantom}."
    )


def _is_datalist(path: Path) -> bool:
    try:
        content = read_json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("labeled"), list)
