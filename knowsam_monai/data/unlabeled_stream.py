"""An unlabeled stream beside a labeled dataset: its files, and the labeled images' transforms without the label."""

from __future__ import annotations

import copy
import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from monai.data import CacheDataset
from monai.transforms import Compose, MapTransform, RandSpatialCropd, ResizeWithPadOrCropd
from monai.utils import CommonKeys as Keys

from knowsam_monai.data.split import read_json
from knowsam_monai.data.transforms import rows_of
from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError, root_cause
from knowsam_monai.files import expand_path
from knowsam_monai.seeds import kept_random_state

logger = logging.getLogger(__name__)

SMOOTH_MODES = ("area", "bicubic", "bilinear", "linear", "trilinear")  # of interpolation; they invent label values


def unlabeled_dataset(
    labeled: Any, images: str | Sequence[Any], cache_rate: float = 1.0, num_workers: int = 0
) -> CacheDataset:
    """
    Unlabeled images with the transforms of a labeled dataset.

    Transforms that need a label are left out; the log names them. A crop around the label becomes a random crop of its
    size. All other transforms are kept, random ones too, so that the network sees both streams alike.

    Args:
        labeled: dataset of ``{"image": ..., "label": ...}`` items with its transforms in `.transform`, as MONAI's
            datasets have them. It stays as it is.
        images: see :func:`unlabeled_items`.
        cache_rate: the part of the images that is kept in memory after the transforms before the first random one.
        num_workers: threads that fill the cache.

    Raises:
        ValueError: if `labeled` has no transforms, or if one fails on the first image; names it.
        FileNotFoundError: if there is no image.

    Example::

        unlabeled = unlabeled_dataset(labeled, "data/unlabeled/*.nii.gz")
        loader = SemiSupervisedLoader(labeled, unlabeled, labeled_batch_size=2, unlabeled_batch_size=2)
    """
    items = unlabeled_items(images)
    transform = without_label(labeled, items[0])
    return CacheDataset(items, transform, cache_rate=cache_rate, num_workers=max(1, num_workers), progress=False)


def unlabeled_items(images: str | Sequence[Any]) -> list[dict]:
    """
    The items ``{"image": ...}`` of a file pattern, a JSON list, or a list.

    Args:
        images: a glob pattern (``**`` for any depth of folders); the path of a JSON file with a list, or with a list
            under the key "unlabeled"; or the list itself. An element is a path; a dict with the key "image", whose
            other keys are left out; or a dict of files that the transforms combine into "image". Paths in a JSON file
            are relative to its folder.

    Raises:
        ValueError: if the JSON is not as described.
        FileNotFoundError: if there is no image.

    Example:
        >>> unlabeled_items(["a.nii.gz", {"image": ["b_t1.nii.gz", "b_t2.nii.gz"], "label": "b_seg.nii.gz"}])
        [{'image': 'a.nii.gz'}, {'image': ['b_t1.nii.gz', 'b_t2.nii.gz']}]
    """
    given, expand = images, partial(_in_full, folder="")
    if isinstance(images, str) and images.endswith(".json"):
        path = Path(expand_path(images, "unlabeled"))
        images, expand = _listed(path), partial(_in_full, folder=path.parent)
    elif isinstance(images, str):
        images, expand = sorted(glob.glob(expand_path(images, "unlabeled"), recursive=True)), str
    if len(images) == 0:
        raise KnowSAMFileNotFoundError(
            f"`unlabeled` must name at least one image but there is none for {given!r}; give a file pattern in "
            "quotation marks, or a JSON list."
        )
    return [{key: expand(value) for key, value in _images_of(item).items()} for item in images]


def _images_of(item: Any) -> dict[str, Any]:
    """The image of an element of the list, or the parts of which the transforms make one."""
    if not isinstance(item, dict):
        return {str(Keys.IMAGE): item}
    if Keys.IMAGE in item:
        return {str(Keys.IMAGE): item[Keys.IMAGE]}
    return {str(key): value for key, value in item.items() if key != Keys.LABEL}


def _listed(path: Path) -> list[Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise KnowSAMValueError(f"`unlabeled` must be a JSON list but {path} is not: {error}.") from error
    listed = content.get("unlabeled") if isinstance(content, dict) else content
    if not isinstance(listed, list):
        raise KnowSAMValueError(
            f"`unlabeled` must be a list in {path}, or a list under its key 'unlabeled', but there is none."
        )
    for number, item in enumerate(listed):
        for key, file in _images_of(item).items():
            if not all(isinstance(part, str) for part in (file if isinstance(file, list) else [file])):
                raise KnowSAMValueError(
                    f"`{key}` must be a path or a list of paths but item {number} in {path} has {file!r}."
                )
    return listed


def _in_full(file: Any, folder: str | Path) -> Any:
    if isinstance(file, (list, tuple)):
        return [_in_full(part, folder) for part in file]
    return expand_path(file, "image", folder) if isinstance(file, (str, os.PathLike)) else file


@kept_random_state()
def without_label(labeled: Any, item: dict) -> Compose:
    """
    The transforms of a labeled dataset for items that have only an image.

    Args:
        labeled: the dataset.
        item: an unlabeled item, on which the transforms are tried.

    Raises:
        ValueError: if the dataset has no transforms, or if one fails on the item.

    Example::

        transform = without_label(labeled, {"image": "scan.nii.gz"})
    """
    whole = getattr(labeled, "transform", None)
    if whole is None:
        raise KnowSAMValueError(
            "`labeled` must be a dataset with its transforms in `.transform`, as MONAI's CacheDataset, but is a "
            f"{type(labeled).__name__} without."
        )
    kept: list[Callable] = []
    left_out: list[str] = []
    rows = [item]
    of_label = {str(Keys.LABEL)}  # the label and its copies
    for step in transform_steps(whole):
        name = type(step).__name__
        if _reads(of_label, step) or of_label >= set(getattr(step, "keys", [""])):
            of_label.update(getattr(step, "names", ()))  # CopyItemsd
            crop = _crop_of_same_size(step)
            left_out.append(f"{name} (a random crop of the same size takes its place)" if crop else name)
            steps = crop
        else:
            steps = [_tolerant(step)]
        try:
            for tried in steps:
                rows = [new for row in rows for new in rows_of(tried(row))]
        except KeyError:  # a custom transform that reads the label, or what another has computed from it
            left_out.append(name)
            continue
        except Exception as error:  # each transform fails in its own way
            first = next(iter(item.values()), None)
            file = first if isinstance(first, (str, os.PathLike)) else "the first image"
            raise KnowSAMValueError(
                f"`unlabeled` images must fit the transforms of the labeled ones but {name} fails on {file}: "
                f"{root_cause(error)}"
            ) from error
        kept += steps
    if Keys.IMAGE not in rows[0]:
        raise KnowSAMValueError(
            "`unlabeled` items must have `image`, or keys of which the transforms make it, but the first has "
            f"{list(item)}."
        )
    logger.info(
        "Unlabeled images get the transforms of the labeled ones; left out, because they need a label: %s.",
        ", ".join(left_out) or "none",
    )
    return Compose(kept, lazy=getattr(whole, "lazy", False))


def transform_steps(transform: Any) -> Iterator[Any]:
    """The transforms of a nested ``Compose``, one by one; ``OneOf`` and the like are one."""
    if type(transform) is Compose:
        for part in transform.transforms:
            yield from transform_steps(part)
    else:
        yield transform


def smooths_labels(transform: Any) -> bool:
    """
    Whether a transform resamples labels with an interpolation that invents values between the classes.

    Example:
        >>> from monai.transforms import Zoomd
        >>> smooths_labels(Zoomd(["image", "label"], 2)), smooths_labels(Zoomd(["image", "label"], 2, mode="nearest"))
        (True, False)
    """
    keys, modes = getattr(transform, "keys", ()), getattr(transform, "mode", ())
    if Keys.LABEL not in keys:
        return False
    mode = modes if isinstance(modes, (str, int)) or not modes else modes[list(keys).index(Keys.LABEL)]
    return mode in SMOOTH_MODES if isinstance(mode, str) else isinstance(mode, int) and mode > 0  # order of a spline


def _reads(keys: set[str], step: Any) -> bool:
    """Does a transform take something from these, beside changing them: ``label_key``, ``source_key``, ..."""
    inner = getattr(step, "transforms", ())
    read = [value for name, value in vars(step).items() if name != "keys"] if hasattr(step, "__dict__") else []
    texts = [text for value in read for text in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(text, str) and text in keys for text in texts) or any(_reads(keys, part) for part in inner)


def _tolerant(step: Any) -> Any:
    """A copy that passes over the missing label."""
    step = copy.deepcopy(step)
    for part in (step, *getattr(step, "transforms", ())):
        if isinstance(part, MapTransform):
            part.allow_missing_keys = True
    return step


def _crop_of_same_size(step: Any) -> list[Callable]:
    """A random crop for one around the label; padded, where an image is smaller."""
    size = getattr(getattr(step, "cropper", None), "spatial_size", None)
    keys = [key for key in getattr(step, "keys", ()) if key != Keys.LABEL]
    if size is None or not keys:
        return []
    return [
        RandSpatialCropd(keys, roi_size=size, random_size=False, allow_missing_keys=True),
        ResizeWithPadOrCropd(keys, spatial_size=size, allow_missing_keys=True),
    ]
