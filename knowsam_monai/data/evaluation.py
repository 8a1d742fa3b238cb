"""What inference and evaluation run on: a folder of images, or one split of a data list."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from os import PathLike

from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.phantom import phantom_datalist, write_phantom

__all__ = ["images_root", "inference_items", "split_items"]

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
        ValueError: if `dataset_dir` does not exist, nothing in it matches `pattern`, something outside of it does, or
            two images would be segmented into one file.

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
        images = [item["image"] for item in _filled(load_datalist(folder, phantom_dir=phantom_dir), "test")]
        _refuse_same_names(images)
        return [{"image": image} for image in images]
    if os.path.isfile(folder):
        return [{"image": folder}]
    if not os.path.isdir(folder):
        raise ValueError(f"`dataset_dir` must be a folder of images or an image file but {folder} does not exist.")
    # a link to nothing matches too, so that it is said of it
    found = glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True)
    paths = sorted(path for path in found if not os.path.isdir(path))
    outside = next((path for path in paths if os.path.relpath(path, folder).split(os.sep)[0] == os.pardir), None)
    if outside is not None:
        raise ValueError(
            f"`image_pattern` must match files below `dataset_dir`, {folder}, but {pattern!r} matches {outside}, whose "
            "segmentation would lie outside of the output folder; name the folder that holds both as `dataset_dir`."
        )
    if not paths:
        raise ValueError(
            f"`dataset_dir` must hold files that match {pattern!r} but {folder} has none; set `image_pattern`, "
            "for example --image_pattern '**/*.nii.gz'."
        )
    _refuse_same_names(paths)
    return [{"image": path} for path in paths]


def images_root(dataset_dir: str | PathLike | None, items: Sequence[Mapping]) -> str:
    """The folder below which the images of ``inference_items`` lie: segmentations keep their images' subfolders.

    Args:
        dataset_dir: as given to ``inference_items``.
        items: what it returned.

    Returns:
        `dataset_dir` where that is a folder, of a data list the folder that all its images share, and "" of a single
        image and of the phantom.

    Example:
        >>> images_root("list.json", [{"image": "/data/a/mri.nrrd"}, {"image": "/data/b/mri.nrrd"}])
        '/data'
    """
    folder = "" if dataset_dir is None else os.path.expanduser(dataset_dir)
    if folder.endswith(".json"):
        return os.path.commonpath([os.path.dirname(os.path.abspath(_first_file(item["image"]))) for item in items])
    return folder if os.path.isdir(folder) else ""


def _refuse_same_names(images: Sequence[str | Sequence[str]]) -> None:
    """A segmentation is named like its image's first file but for the extension."""
    firsts: dict[str, str] = {}
    for image in map(_first_file, images):
        stem = re.sub(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|h5|hdf5)$", "", image)
        if stem in firsts:
            raise ValueError(
                f"`dataset_dir` must have one image of a name but {firsts[stem]} and {image} would be segmented into "
                "one file; rename one, or choose by `image_pattern`."
            )
        firsts[stem] = image


def _first_file(image: str | Sequence[str]) -> str:
    """Of an image whose channels are files of their own the first."""
    return str(image) if isinstance(image, (str, PathLike)) else str(image[0])


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
        filled = ", ".join(key for key, items in datalist.items() if items and items[0].get("label"))
        none = " (none of its cases is in the folder)" if split in datalist else ""
        raise ValueError(
            f"`split` must be one of the data list's splits with labels, {filled}, but is {split!r}{none}."
        )
    return datalist[split]
