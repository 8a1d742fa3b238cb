"""The one place that chooses the data: a phantom, ACDC or left-atrium data in either form, or a user's own list."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from knowsam_monai.data.acdc import ACDC_FORMS, acdc_datalist, find_acdc
from knowsam_monai.data.left_atrium import LEFT_ATRIUM_FORMS, find_left_atrium, left_atrium_datalist
from knowsam_monai.data.overlap import shared_names
from knowsam_monai.data.phantom import phantom_datalist, write_phantom
from knowsam_monai.data.split import unknown_folder

__all__ = ["load_datalist"]

logger = logging.getLogger(__name__)

SECTIONS = ("labeled", "unlabeled", "validation", "test")


def load_datalist(
    dataset_dir: str | Path | None,
    phantom_dir: str | Path,
    labeled_patients: int = 7,
    holdout_patients: int = 0,
    phantom: dict | None = None,
) -> dict[str, list[dict]]:
    """Give the `labeled`, `unlabeled`, `validation` and `test` items of a run.

    Args:
        dataset_dir: None for the synthetic phantom; a folder of ACDC or of left-atrium data, told apart by what is in
            it, see `acdc_datalist` and `left_atrium_datalist`; or the path of a MONAI data-list JSON with `labeled`,
            `unlabeled` (no labels), `validation` and optionally `test`, each a list of `{"image": path, "label":
            path}`. Its paths are relative to the JSON's folder; a list of paths gives the channels of one image.
        phantom_dir: where the phantom is written once and then reused. Not touched with a `dataset_dir`; "" where there
            must be one.
        labeled_patients: patients (or cases) with labels: ACDC 3, 7, 21 or 70; left atrium 4, 8 or 16.
        holdout_patients: validate on the last so many training patients, see the two data lists.
        phantom: further arguments of `write_phantom`, such as its `anatomy`.

    Raises:
        ValueError: if the folder has no known form or the data list is not valid; it says what is wrong.
        FileNotFoundError: if a file that is listed does not exist; it names the first one.

    Example:
        >>> items = load_datalist(None, phantom_dir="/tmp/phantom")     # doctest: +SKIP
    """
    if dataset_dir is None:
        datalist = phantom_datalist(write_phantom(phantom_dir, **(phantom or {})))
        logger.warning(
            "NO DATA SET GIVEN (`dataset_dir` is null): this run uses a SYNTHETIC PHANTOM in %s, %d labeled and %d "
            "unlabeled volumes. Its numbers say nothing about patients. `labeled_patients` is not used.",
            phantom_dir,
            len(datalist["labeled"]),
            len(datalist["unlabeled"]),
        )
        return datalist
    path = Path(dataset_dir).expanduser()
    if path.suffix == ".json":
        return _read_json(path)
    known = {"ACDC": (find_acdc, acdc_datalist), "the left atrium": (find_left_atrium, left_atrium_datalist)}
    for name, (find, datalist_of) in known.items():
        if find(path):
            logger.info("%s is read as a folder of %s.", path, name)
            try:
                return datalist_of(path, labeled_patients=labeled_patients, holdout_patients=holdout_patients)
            except ValueError as error:
                raise ValueError(f"In {path}, a folder of {name}: {error}") from None
    raise unknown_folder(path, ACDC_FORMS + LEFT_ATRIUM_FORMS, or_phantom=bool(phantom_dir))


def _read_json(path: Path) -> dict[str, list[dict]]:
    if not path.is_file():
        raise FileNotFoundError(f"`dataset_dir` must be an existing data-list JSON but {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`dataset_dir` must be valid JSON but {path} is not: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`dataset_dir` must be a JSON object with the lists {SECTIONS} but {path} is no object.")
    datalist = {name: _read_section(path, name, content.get(name, [])) for name in SECTIONS}
    for name in ("labeled", "validation"):
        if not datalist[name]:
            raise ValueError(
                f"`{name}` must list at least one item but is empty or missing in {path}, which has {sorted(content)}."
            )
    for shared in shared_names(datalist):
        raise ValueError(f"{shared} (in {path}). Leave it in one of them.")
    return datalist


def _read_section(path: Path, name: str, items: object) -> list[dict]:
    if not isinstance(items, list):
        raise ValueError(f"`{name}` must be a list of items but is {type(items).__name__} in {path}.")
    section = []
    for number, item in enumerate(items):
        if isinstance(item, str) and name in ("unlabeled", "test"):
            item = {"image": item}  # MONAI's data lists give images without a label as plain paths
        where = f"item {number} of `{name}` in {path}"
        if not isinstance(item, dict) or not item.get("image"):
            raise ValueError(f"`image` must be a path but {where} has none.")
        if name == "unlabeled" and "label" in item:
            raise ValueError(f"`unlabeled` items must have no label but {where} has {item['label']!r}. Remove it.")
        if name in ("labeled", "validation") and not item.get("label"):
            raise ValueError(f"`label` must be a path but {where} has none.")
        section.append({key: _resolve(path, key, value, where) for key, value in item.items()})
    return section


def _resolve(path: Path, key: str, value, where: str):
    if key not in ("image", "label"):
        return value
    if isinstance(value, list) and value:
        return [_resolve(path, key, one, where) for one in value]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a path or a list of paths but {where} has {value!r}.")
    file = path.parent / Path(value).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"`{key}` must exist but {file} does not ({where}).")
    return str(file)
