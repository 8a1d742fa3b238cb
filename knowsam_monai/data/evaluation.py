"""The items for inference and evaluation: a folder of images, or one split of a data list."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePath

from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.nifti_writer import is_label_map
from knowsam_monai.data.overlap import image_paths
from knowsam_monai.data.phantom import LIST_NAME, phantom_datalist, write_phantom
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import expand_path

IMAGE_ENDING = re.compile(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|h5|hdf5)$")

SCAN_ENDING = re.compile(r"[-_.](image|img|scan|ct|mr|mri|0000)$", re.IGNORECASE)
LABEL_ENDING = re.compile(r"[-_.](seg|segmentation|label|labels|gt|mask)$", re.IGNORECASE)

logger = logging.getLogger(__name__)


def inference_items(
    dataset_dir: str | PathLike | None,
    pattern: str = "*.nii*",
    phantom_dir: str | PathLike = "phantom",
    phantom: dict | None = None,
    output_dir: str | PathLike | None = None,
) -> list[dict]:
    """List the images to segment, readable or not.

    Args:
        dataset_dir: a folder of images; one image file; a data-list JSON, for its `test` images; or None for the test
            images of the synthetic phantom.
        pattern: glob pattern relative to the folder, such as "*.nii.gz" or "*/*frame[0-9][0-9].nii.gz"; "**" recurses.
            Links are followed.
        phantom_dir: folder of the phantom, which is written if it is missing.
        phantom: further arguments of `write_phantom`, as in training.
        output_dir: folder of the segmentations, which are not listed.

    Returns:
        [{"image": path}, ...], sorted by path. An image that must not be segmented has the reason under "left_out":
        another one would write the same output file, it lies in `output_dir`, or its header declares labels, as those
        of `NiftiGeometryWriter` do. `LoadCased` refuses it with that reason. Files that are named as the label of
        another one, such as a_gt.nii beside a.nii or a_label.nii beside a_image.nii, are not listed, with a warning.

    Raises:
        ValueError: if `dataset_dir` does not exist, if no image matches `pattern`, if the pattern leaves the folder, or
            if `output_dir` is the folder itself.

    Example:
        >>> inference_items("/data/scans", "*.nii.gz")     # doctest: +SKIP
    """
    if dataset_dir is None:
        logger.warning(
            "No `dataset_dir` is given: segmenting the test images of the SYNTHETIC PHANTOM in %s, which are not from "
            "patients. Pass --dataset_dir FOLDER for your own files.",
            phantom_dir,
        )
        datalist = phantom_datalist(write_phantom(phantom_dir, **(phantom or {})))
        return [{"image": item["image"]} for item in datalist["test"]]
    folder = expand_path(dataset_dir, "dataset_dir")
    if folder.endswith(".json"):
        datalist = load_datalist(folder, phantom_dir, required=("test",), existing=False)
        return _items([{"image": item["image"]} for item in datalist["test"]], {})
    if os.path.isfile(folder):
        return [{"image": folder}]
    if not os.path.isdir(folder):
        raise KnowSAMValueError(
            f"`dataset_dir` must be a folder of images or an image file but {folder} does not exist."
        )
    if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
        raise KnowSAMValueError(
            f"`image_pattern` must be relative to the folder of the images but is {pattern!r}; set `dataset_dir` to "
            "the parent folder."
        )
    root = os.path.realpath(folder)
    output = None if output_dir is None else os.path.realpath(expand_path(output_dir, "output_dir"))
    if output == root:
        raise KnowSAMValueError(
            f"`output_dir` must not be the folder of the images but is {folder}, where the next run would read "
            "segmentations as images; name another folder, such as a subfolder."
        )
    # dangling links and folders with an image's name are listed, so that they are reported as unreadable
    matching = glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True)
    images = sorted(path for path in matching if not os.path.isdir(path) or IMAGE_ENDING.search(path))
    written = {
        path
        for path in images
        if _is_below(output, root) and _is_below(os.path.realpath(os.path.dirname(path)), output)
    }
    label_maps = {path for path in images if is_label_map(path)}
    if written | label_maps == set(images):
        found = f"only has {len(images)} that are segmentations" if images else "has none"
        datalist = os.path.join(folder, LIST_NAME)
        remedy = "set `image_pattern`, for example --image_pattern '**/*.nii.gz'"
        if os.path.isfile(datalist):
            remedy = f"pass the data list {datalist} to segment its test images, or {remedy}."
        else:
            remedy += ". DICOM must be converted first, for example with dcm2niix."
        raise KnowSAMValueError(
            f"`dataset_dir` must contain files that match {pattern!r} but {folder} {found}; {remedy}"
        )
    left_out = {path: f"`image` must not lie in `output_dir` but {path} does; move it." for path in written}
    for path in label_maps:
        left_out[path] = (
            f"`image` must be a scan but {path} is a label map by its header, such as an earlier segmentation; move "
            "it, or select the scans with `image_pattern`."
        )
    images = [path for path in images if path not in written & label_maps]
    labels = _labels_beside_scans([path for path in images if path not in left_out])
    if labels:
        logger.warning(
            "Files that are named as labels of others are not segmented (%d, such as %s); to segment such a file, "
            "select it alone with `image_pattern`.",
            len(labels),
            labels[0],
        )
    return _items([{"image": path} for path in images if path not in labels], left_out)


def _labels_beside_scans(images: Sequence[str]) -> list[str]:
    """Files that are, by their names, labels of scans in the same folder."""
    stems = {path: _output_stem(path) for path in images}
    scans = {name for stem in stems.values() for name in (stem, SCAN_ENDING.sub("", stem))}
    unlabeled = {path: LABEL_ENDING.sub("", stem) for path, stem in stems.items()}
    return [path for path, stem in stems.items() if unlabeled[path] != stem and unlabeled[path] in scans]


def images_root(dataset_dir: str | PathLike | None, items: Sequence[Mapping]) -> str:
    """Return the common folder of the images of ``inference_items``; segmentations keep subfolders relative to it.

    Args:
        dataset_dir: as passed to ``inference_items``.
        items: its result.

    Returns:
        `dataset_dir` if it is a folder, the common folder of all images of a data list, and "" for a single image and
        the phantom.

    Example:
        >>> images_root("list.json", [{"image": "/data/a/mri.nrrd"}, {"image": "/data/b/mri.nrrd"}])
        '/data'
    """
    folder = "" if dataset_dir is None else expand_path(dataset_dir, "dataset_dir")
    if folder.endswith(".json"):
        return os.path.commonpath([os.path.dirname(os.path.abspath(image_paths(item)[0])) for item in items])
    return folder if os.path.isdir(folder) else ""


def _is_below(path: str | None, folder: str) -> bool:
    return path is not None and Path(path).is_relative_to(folder)


def _items(items: Sequence[dict], left_out: Mapping[str, str]) -> list[dict]:
    """The items, with the reasons for those that are left out."""
    outputs: dict[str, list[str]] = {}
    files = [image_paths(item)[0] for item in items]
    for file in files:
        if file not in left_out:
            outputs.setdefault(_output_stem(file), []).append(file)
    reasons = dict(left_out)
    for same in outputs.values():
        if len(same) > 1:
            reasons |= dict.fromkeys(
                same,
                f"`image` must have a name of its own but {' and '.join(same)} would write the same output file; "
                "rename one, or select one with `image_pattern`.",
            )
    return [{**item, "left_out": reasons[file]} if file in reasons else item for item, file in zip(items, files)]


def _output_stem(file: str) -> str:
    """A segmentation has the name of its image's first file, except for the extension, as in MONAI's SaveImage."""
    return os.path.splitext(file.removesuffix(".gz"))[0]


def split_items(datalist: Mapping[str, list[dict]], split: str = "validation") -> list[dict]:
    """Return the labeled items of one split, such as "validation" or "test", for evaluation.

    Args:
        datalist: the result of ``load_datalist``.
        split: its key.

    Raises:
        ValueError: if the split is missing or empty, or if one of its items has no label.

    Example:
        >>> split_items({"test": [{"image": "a.nii", "label": "a_gt.nii"}]}, "test")
        [{'image': 'a.nii', 'label': 'a_gt.nii'}]
    """
    if not datalist.get(split):
        filled = ", ".join(key for key, items in datalist.items() if items and items[0].get("label"))
        empty = ", which has no cases in the folder" if split in datalist else ""
        raise KnowSAMValueError(
            f"`split` must be one of the data list's splits with labels, {filled}, but is {split!r}{empty}."
        )
    for item in datalist[split]:
        if not item.get("label"):
            raise KnowSAMValueError(
                f"`split` {split!r} must have a label for every image but {item['image']} has none; add one."
            )
    return list(datalist[split])
