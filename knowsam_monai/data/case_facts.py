"""Facts about each case of a data list, cached between runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from tqdm import tqdm

from knowsam_monai.data.declared_size import detached_files
from knowsam_monai.data.overlap import image_paths
from knowsam_monai.data.readers import LoadCased
from knowsam_monai.data.slice_axis import slice_axis
from knowsam_monai.data.transforms import CheckDatad, align_label, known_spacing
from knowsam_monai.files import expand_path, write_text

logger = logging.getLogger(__name__)

# Increment if facts or checks change; entries of other versions are ignored.
VERSION = 9


@dataclass
class CaseFacts:
    """Facts about one case, with lengths in mm; unknown values are None or empty."""

    fault: str = ""  # why training would refuse it, in one sentence
    size: Sequence[int] = ()  # voxels
    channels: int = 0
    low: float = 0.0
    high: float = 0.0
    spacing: Sequence[float] | None = None
    orientation: str | None = None  # such as "LPS": the direction of each axis
    normal: Sequence[float] | None = None  # direction across the slices of a volume, of length 1
    content: Sequence[str] = ()  # hash of the voxels of each slice that is not constant
    digest: str = ""  # hash of the data that training uses: voxels of image and label, spacings, orientations
    label_alignment: str = ""  # see `align_label`
    label_values: Sequence[int] | None = None  # after the check's corrections
    label_is_mask: bool = False  # values 0 and 255, read as 0 and 1


class CaseReader:
    """Read a case as training does, and collect its facts.

    Args:
        num_classes: as in `CheckDatad`.
        num_channels: as in `CheckDatad`.
        slice_axis: see `H5Reader`.
        num_axes: as in `CheckDatad`.

    Example:
        >>> read = CaseReader(num_classes=4)
        >>> read({"image": "patient001_frame01.nii.gz"}).size     # doctest: +SKIP
        (216, 256, 10)
    """

    def __init__(
        self, num_classes: int = 4, num_channels: int | None = None, slice_axis: int = 0, num_axes: int | None = None
    ) -> None:
        keys = ("image", "label")
        self.settings = f"{VERSION} {num_classes} {num_channels} {slice_axis} {num_axes}"
        self.load = LoadCased(keys, slice_axis=slice_axis, allow_missing_keys=True, ensure_channel_first=True)
        self.check = CheckDatad(num_classes=num_classes, num_channels=num_channels, num_axes=num_axes, warn=False)

    def __call__(self, item: dict) -> CaseFacts:
        try:
            case = self.load({key: item[key] for key in ("image", "label") if key in item})
        except ValueError as error:
            return CaseFacts(fault=str(error))
        image, label = case["image"], case.get("label")
        facts = CaseFacts(size=tuple(image.shape[1:]), channels=len(image))
        facts.spacing, facts.orientation = _geometry(image)
        if facts.spacing is not None and image.ndim == 4:
            step = image.affine[:3, slice_axis(image)]
            facts.normal = [round(value, 4) for value in (step / step.norm()).tolist()]
        facts.low, facts.high, facts.content = _intensities(image)
        if label is not None:
            facts.label_alignment = align_label(image, label)[1]
        facts.digest = _digest(facts, image, label)
        try:
            checked = self.check(case)
        except ValueError as error:
            facts.fault = str(error)
        else:
            if label is not None:
                counts = np.bincount(np.asarray(checked["label"]).astype(np.int64).ravel())
                facts.label_values = np.flatnonzero(counts).tolist()
                facts.label_is_mask = facts.label_values[-1] == 1 and bool(label.max() > 254)
        return facts


def read_cases(
    items: Sequence[dict],
    read: CaseReader,
    cache_dir: str | os.PathLike | None = None,
    num_workers: int = 4,
    progress: bool = True,
) -> tuple[list[CaseFacts], int]:
    """Return the facts of each item and the number of items that had to be read.

    Args:
        items: data-list items.
        read: the reader.
        cache_dir: folder for a JSON file with the facts, which are valid while a file's size and time stamps are
            unchanged. None reads all items.
        num_workers: number of reading threads.
        progress: whether to show a progress bar, on a terminal.

    Example:
        >>> facts, num_read = read_cases(items, CaseReader(), cache_dir="facts")     # doctest: +SKIP
    """
    keys, states = zip(*(_key_and_state(item, read.settings) for item in items)) if items else ((), ())
    path = None if cache_dir is None or not items else _cache_file(items, Path(expand_path(cache_dir, "cache_dir")))
    cached = {} if path is None else _read_cache(path)
    facts = [_cached_facts(cached, key, state) for key, state in zip(keys, states)]
    unread = [index for index, fact in enumerate(facts) if fact is None]
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        results = pool.map(read, [items[index] for index in unread])
        is_shown = progress and len(unread) > 0 and sys.stderr.isatty()
        bar = tqdm(results, total=len(unread), desc="Checking data", unit="case", disable=not is_shown)
        for index, fresh in zip(unread, bar):
            facts[index] = fresh
            if states[index] is not None and not fresh.fault:  # a fault may be temporary
                cached[keys[index]] = {"state": states[index], "facts": vars(fresh)}
    if path is not None and unread:
        _write_cache(path, cached)
    return facts, len(unread)


def _intensities(image: torch.Tensor) -> tuple[float, float, list[str]]:
    """Minimum, maximum, and hashes of the slices, which depend neither on names nor on the order of axes in a file."""
    array = np.asarray(image, dtype=np.float32)
    slices = array[None] if array.ndim == 3 else np.ascontiguousarray(np.moveaxis(array, 1 + slice_axis(image), 0))
    extremes = [(float(image_slice.min()), float(image_slice.max())) for image_slice in slices]
    hashes = []
    for image_slice, (low, high) in zip(slices, extremes):
        if low < high:
            hashes.append(hashlib.blake2b(_unturned(image_slice), digest_size=12).hexdigest())
    return min(low for low, _ in extremes), max(high for _, high in extremes), hashes


def _unturned(image_slice: np.ndarray) -> bytes:
    """The shape and the values of a slice (ch, H, W), the same for each of its turned and mirrored copies."""
    copies = [side[:, ::y, ::x] for side in (image_slice, image_slice.swapaxes(1, 2)) for y in (1, -1) for x in (1, -1)]
    shape, values = min((copy.shape, copy.tobytes()) for copy in copies)
    return str(shape).encode() + values


def _digest(facts: CaseFacts, image: torch.Tensor, label: torch.Tensor | None) -> str:
    geometry = [facts.spacing, facts.orientation, *((None, None) if label is None else _geometry(label))]
    digest = hashlib.blake2b(json.dumps(geometry).encode(), digest_size=12)
    for array in [np.asarray(image)] + ([] if label is None else [np.asarray(label)]):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _geometry(image: torch.Tensor) -> tuple[tuple[float, ...] | None, str | None]:
    """Spacing and orientation; None for files without them, such as h5 packs."""
    spacing = known_spacing(image)
    if spacing is None:
        return None, None
    codes = nibabel.aff2axcodes(np.asarray(image.affine, dtype=float))[: len(spacing)]
    return tuple(round(step, 4) for step in spacing.tolist()), "".join(code or "?" for code in codes)


def _key_and_state(item: dict, settings: str) -> tuple[str, list | None]:
    """Paths of an item's files, and sizes and time stamps of these and of detached voxels; None if one is missing."""
    files = {key: [os.path.abspath(path) for path in image_paths(item, key)] for key in ("image", "label")}
    try:
        paths = [path for names in files.values() for path in names]
        headers = [path for path in paths if path.lower().endswith((".nhdr", ".nrrd", ".mhd", ".mha"))]
        stats = [os.stat(path) for path in (*paths, *(file for path in headers for file in detached_files(path)))]
    except (OSError, ValueError):  # missing, or not a valid file name
        stats = None
    state = None if stats is None else [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
    return json.dumps([settings, files]), state


def _cache_file(items: Sequence[dict], folder: Path) -> Path:
    """One cache file per data folder, shared by all its data lists."""
    folders = {os.path.abspath(os.path.dirname(path)) for item in items for path in image_paths(item)}
    common = os.path.commonpath(folders)
    return folder / f"checked_{hashlib.blake2b(common.encode(), digest_size=8).hexdigest()}.json"


def _read_cache(path: Path) -> dict[str, dict]:
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged
        return {}
    return cached if isinstance(cached, dict) else {}


def _cached_facts(cached: dict[str, dict], key: str, state: list | None) -> CaseFacts | None:
    try:
        return CaseFacts(**cached[key]["facts"]) if state is not None and cached[key]["state"] == state else None
    except (KeyError, TypeError):  # missing, or from another version
        return None


def _write_cache(path: Path, cached: dict[str, dict]) -> None:
    try:
        write_text(path, json.dumps(cached))
    except OSError as error:
        logger.info(
            "The results of the data check could not be saved to %s (%s); the next run checks all files again.",
            path,
            error,
        )
