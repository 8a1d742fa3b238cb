"""What inference and evaluation run on: a folder of images, or one split of a data list."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping
from os import PathLike

from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.phantom import phantom_datalist, write_phantom

__all__ = ["inference_items", "split_items"]

logger = logging.getLogger(__name__)


def inference_items(
    dataset_dir: str | PathLike | None,
    pattern: str = "*.nii*",
    phantom_dir: str | PathLike = "phantom",
    phantom: dict | None = None,
) -> list[dict]:
    """List the images to segment.

    Args:
        dataset_dir: a folder of images; one image file; a data-list JSON, whose `test` images are taken; or None for
            the test images of the synthetic phantom.
        pattern: glob pattern below the folder, such as "*.nii.gz" or "*/*frame[0-9][0-9].nii.gz"; "**" recurses.
        phantom_dir: where the phantom is, or is written to.
        phantom: further arguments of `write_phantom`, as in training.

    Returns:
        [{"image": path}, ...], sorted by path.

    Raises:
        ValueError: if `dataset_dir` does not exist or nothing in it matches `pattern`.

    Example:
        >>> inference_items("/data/scans", "*.nii.gz")     # doctest: +SKIP
    """
    if dataset_dir is None:
        logger.warning(
            "No `dataset_dir` was given: the SYNTHETIC PHANTOM's test images in %s are segmented, which show no "
            "patient. Give --dataset_dir FOLDER for your own files.",
            phantom_dir,
        )
        datalist = phantom_datalist(write_phantom(phantom_dir, **(phantom or {})))
        return [{"image": item["image"]} for item in datalist["test"]]
    folder = os.path.expanduser(dataset_dir)
    if folder.endswith(".json"):
        return [{"image": item["image"]} for item in _filled(load_datalist(folder, phantom_dir=phantom_dir), "test")]
    if os.path.isfile(folder):
        return [{"image": folder}]
    if not os.path.isdir(folder):
        raise ValueError(f"`dataset_dir` must be a folder of images or an image file but {folder} does not exist.")
    paths = sorted(
        p for p in glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True) if os.path.isfile(p)
    )
    if not paths:
        raise ValueError(
            f"`dataset_dir` must hold files that match {pattern!r} but {folder} has none; set `image_pattern`, "
            "for example --image_pattern '**/*.nii.gz'."
        )
    return [{"image": path} for path in paths]


def split_items(datalist: Mapping[str, list[dict]], split: str = "validation") -> list[dict]:
    """Take the labelled items of one split, such as "validation" or "test", to evaluate on.

    Args:
        datalist: of ``load_datalist``.
        split: its key.

    Raises:
        ValueError: if there is no such split, it is empty, or one of its items has no label.

    Example:
        >>> split_items({"test": [{"image": "a.nii", "label": "a_gt.nii"}]}, "test")
        [{'image': 'a.nii', 'label': 'a_gt.nii'}]
    """
    items = _filled(datalist, split)
    for item in items:
        if not item.get("label"):
            raise ValueError(f"`split` {split!r} must have a label for every image but {item['image']} has none.")
    return list(items)


def _filled(datalist: Mapping[str, list[dict]], split: str) -> list[dict]:
    if not datalist.get(split):
        filled = ", ".join(key for key, items in datalist.items() if items)
        raise ValueError(f"`split` must be one of the data list's filled splits, {filled}, but is {split!r}.")
    return datalist[split]
