"""The data list of a run: a phantom, ACDC or left-atrium data in either format, or a user's own list."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from knowsam_monai.data.acdc import ACDC_FORMS, ACDC_LABELED_SLICES, acdc_datalist, find_acdc
from knowsam_monai.data.left_atrium import (
    LEFT_ATRIUM_FORMS,
    LEFT_ATRIUM_LABELED,
    find_left_atrium,
    left_atrium_datalist,
)
from knowsam_monai.data.overlap import labels_as_images, shared_names
from knowsam_monai.data.phantom import phantom_datalist, write_phantom
from knowsam_monai.data.split import read_json, unknown_folder
from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.files import expand_path

logger = logging.getLogger(__name__)

SECTIONS = ("labeled", "unlabeled", "validation", "test")
ITEM_KEYS = ("image", "label", "patient")


def load_datalist(
    dataset_dir: str | Path | None,
    phantom_dir: str | Path,
    labeled_patients: int | None = None,
    holdout_patients: int = 0,
    phantom: dict | None = None,
    required: Sequence[str] = ("labeled", "validation"),
    existing: bool = True,
) -> dict[str, list[dict]]:
    """Return the `labeled`, `unlabeled`, `validation` and `test` items of a run.

    Args:
        dataset_dir: None for the synthetic phantom; a folder of ACDC or left-atrium data, recognized by its content,
            see `acdc_datalist` and `left_atrium_datalist`; or the path of a MONAI data-list JSON with `labeled`,
            `unlabeled` (no labels), `validation` and optionally `test`, each a list of `{"image": path, "label":
            path}`. Paths are relative to the JSON's folder; a list of paths gives the channels of one image. Other
            keys, such as a description, are ignored, but misspellings of these four are refused.
        phantom_dir: folder to which the phantom is written once. It is not used with a `dataset_dir`; "" if a
            `dataset_dir` is required.
        labeled_patients: number of patients (or cases) with labels: ACDC 3, 7, 21 or 70; left atrium 4, 8 or 16.
            None: 7 for ACDC, 8 for the left atrium.
        holdout_patients: number of training patients to validate on instead, see the two functions above.
        phantom: further arguments of `write_phantom`, such as its `anatomy`.
        required: lists that a JSON must have.
        existing: whether the files in a JSON must exist.

    Raises:
        ValueError: if the folder has no known format, or if the data list is not valid.
        FileNotFoundError: if a listed file does not exist; the message names the first one.

    Example:
        >>> items = load_datalist(None, phantom_dir="phantom")     # doctest: +SKIP
    """
    if dataset_dir is None:
        datalist = phantom_datalist(write_phantom(phantom_dir, **(phantom or {})))
        logger.warning(
            "NO DATA SET GIVEN (`dataset_dir` is null): this run uses a SYNTHETIC PHANTOM in %s with %d labeled and %d "
            "unlabeled volumes. Its results say nothing about patients.%s",
            phantom_dir,
            len(datalist["labeled"]),
            len(datalist["unlabeled"]),
            "" if labeled_patients is None else " `labeled_patients` is ignored.",
        )
        return datalist
    path = Path(expand_path(dataset_dir, "dataset_dir"))
    if path.suffix == ".json":
        return _read_json(path, required, existing)
    given = {} if labeled_patients is None else {"labeled_patients": labeled_patients}
    known = {
        "ACDC": (find_acdc, acdc_datalist, LEFT_ATRIUM_LABELED, "acdc"),
        "the left atrium": (find_left_atrium, left_atrium_datalist, ACDC_LABELED_SLICES, "la"),
    }
    for name, (find, datalist_of, others, bundle) in known.items():
        if find(path):
            if labeled_patients in others:  # the default of the other data's bundle
                raise KnowSAMValueError(
                    f"`dataset_dir` must be data that is published with {labeled_patients} labeled patients but {path} "
                    f"is a folder of {name}; train with `knowsam train {bundle}`, or set `labeled_patients`."
                )
            logger.info("Reading %s as a folder of %s.", path, name)
            try:
                return datalist_of(path, holdout_patients=holdout_patients, **given)
            except ValueError as error:
                raise KnowSAMValueError(f"In {path}, a folder of {name}: {error}") from None
    raise unknown_folder(path, ACDC_FORMS + LEFT_ATRIUM_FORMS, or_phantom=bool(phantom_dir))


def _read_json(path: Path, required: Sequence[str], existing: bool) -> dict[str, list[dict]]:
    if not os.path.isfile(path):
        raise KnowSAMFileNotFoundError(f"`dataset_dir` must be an existing data-list JSON but {path} does not exist.")
    try:
        content = read_json(path)
    except ValueError as error:
        raise KnowSAMValueError(f"`dataset_dir` must be valid JSON but {path} is not: {error}.") from error
    if not isinstance(content, dict):
        raise KnowSAMValueError(f"`dataset_dir` must be a JSON object with the lists {SECTIONS} but {path} is not.")
    _refuse_unknown_sections(path, content)
    datalist = {name: _read_section(path, name, content.get(name, []), existing) for name in SECTIONS}
    for name in required:
        if not datalist[name]:
            raise KnowSAMValueError(
                f"`{name}` must list at least one item but is empty or missing in {path}, which has {sorted(content)}"
                f"{'; a list of `test` alone is for prediction' if set(content) == {'test'} else ''}."
            )
    for shared in shared_names(datalist):
        raise KnowSAMValueError(f"{shared} (in {path}); remove it from one of them.")
    for shared in labels_as_images(datalist):
        raise KnowSAMValueError(f"{shared} (in {path}); correct one of them.")
    return datalist


def _refuse_unknown_sections(path: Path, content: Mapping[str, object]) -> None:
    """Other keys may describe the data, but a list of items under another name would be ignored silently."""
    for name, value in content.items():
        if name in SECTIONS:
            continue
        has_items = isinstance(value, list) and any(isinstance(item, dict) and "image" in item for item in value)
        intended = _closest(name, SECTIONS, cutoff=0.6 if has_items else 0.85)
        if intended or has_items:
            remedy = f"did you mean `{intended}`?" if intended else "rename or remove it."
            raise KnowSAMValueError(f"`{name}` must be one of the lists {SECTIONS} but is not in {path}; {remedy}")


def _closest(name: str, known: Sequence[str], cutoff: float = 0.85) -> str:
    """The known name that was misspelled; "" if there is none."""
    by_letters = {"".join(sorted(known_name)): known_name for known_name in known}
    same_letters = by_letters.get("".join(sorted(name.strip().lower())))
    return same_letters or next(iter(difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=cutoff)), "")


def _read_section(path: Path, name: str, items: object, existing: bool) -> list[dict]:
    if not isinstance(items, list):
        raise KnowSAMValueError(f"`{name}` must be a list of items but is {type(items).__name__} in {path}.")
    section = []
    for number, item in enumerate(items):
        if isinstance(item, str) and name in ("unlabeled", "test"):
            item = {"image": item}  # MONAI's data lists may list images without labels as plain paths
        where = f"item {number} of `{name}` in {path}"
        if isinstance(item, dict):
            for key in item.keys() - set(ITEM_KEYS):
                intended = _closest(key, [known for known in ITEM_KEYS if known not in item])
                if intended:
                    raise KnowSAMValueError(
                        f"`{key}` must be a known key of an item but is not in {where}; did you mean `{intended}`?"
                    )
        if not isinstance(item, dict) or not item.get("image"):
            raise KnowSAMValueError(f"`image` must be a path but {where} has none.")
        if name == "unlabeled" and "label" in item:
            raise KnowSAMValueError(
                f"`unlabeled` items must have no label but {where} has {item['label']!r}; remove it."
            )
        if name in ("labeled", "validation") and not item.get("label"):
            raise KnowSAMValueError(f"`label` must be a path but {where} has none.")
        section.append({key: _resolve(path, key, value, where, existing) for key, value in item.items()})
    return section


def _resolve(path: Path, key: str, value, where: str, existing: bool):
    if key not in ("image", "label"):
        return value
    if isinstance(value, list) and value:
        return [_resolve(path, key, element, where, existing) for element in value]
    if not isinstance(value, str):
        raise KnowSAMValueError(f"`{key}` must be a path or a list of paths but {where} has {value!r}.")
    try:
        file = expand_path(value, key, path.parent)
    except KnowSAMValueError as error:
        raise KnowSAMValueError(f"{str(error).removesuffix('.')} ({where}).") from error
    if existing and not os.path.exists(file):
        raise KnowSAMFileNotFoundError(f"`{key}` must exist but {file} does not ({where}).")
    return file
