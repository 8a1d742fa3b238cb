"""Checks of image headers before any voxel is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from knowsam_monai.errors import KnowSAMValueError

# Bytes in memory, with 4 or more per voxel: a CT of 512 x 512 x 2048.
LARGEST_IMAGE = 2 * 2**30
# Maximum compression ratio of deflate, which .gz, NRRD and MetaImage use.
LARGEST_RATIO = 1032
LARGEST_HEADER = 2**20

# This field is the last of a MetaImage header; an empty line ends an NRRD header.
NRRD_FIELD = re.compile(rb"^[ \t]*data[ \t]*file[ \t]*:[ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)
META_FIELD = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)


def check_size(shape: Sequence[int], itemsize: int, num_bytes: int | None = None, ratio: int = 1) -> None:
    """Refuse an image whose header declares an impossible size.

    Args:
        shape: declared shape, channels included.
        itemsize: bytes per voxel in the file.
        num_bytes: bytes that the file has for its voxels; None if unknown.
        ratio: maximum compression ratio.

    Raises:
        ValueError: if the size is zero, above the limit, or more than the file can contain; without the file's name.

    Example:
        >>> check_size((512, 512, 100), itemsize=2, num_bytes=52_428_800)
    """
    declared = " x ".join(map(str, shape))
    count = math.prod(int(size) for size in shape)
    if count <= 0:
        raise KnowSAMValueError(f"its header declares {declared} voxels; it is empty or damaged.")
    in_memory = count * max(4, itemsize)
    if in_memory > LARGEST_IMAGE:
        raise KnowSAMValueError(
            f"its header declares {declared} voxels, {in_memory / 2**30:.1f} GiB in memory, but the limit is "
            f"{LARGEST_IMAGE / 2**30:g} GiB; crop or resample it."
        )
    if num_bytes is not None and count * itemsize > num_bytes * ratio:
        raise KnowSAMValueError(
            f"its header declares {declared} voxels of {itemsize} bytes, more than its {max(num_bytes, 0)} bytes can "
            "contain; it is truncated or damaged."
        )


def detached_files(header: str | os.PathLike) -> list[Path]:
    """Return the data files of a detached NRRD or MetaImage header; none if the header's file has its own voxels.

    Raises:
        ValueError: if a data file is outside the header's folder; without the header's name.

    Example:
        >>> detached_files("lgemri.nhdr")     # doctest: +SKIP
        [PosixPath('lgemri.raw.gz')]
    """
    path = Path(header)
    with path.open("rb") as file:
        content = file.read(LARGEST_HEADER)
    is_meta = path.suffix.lower() in (".mha", ".mhd")
    if not is_meta:
        content = content.partition(b"\n\n")[0]
    content = content.replace(b"\r", b"\n")
    fields = list((META_FIELD if is_meta else NRRD_FIELD).finditer(content))
    if is_meta and not fields:
        raise KnowSAMValueError(
            f"its first {LARGEST_HEADER} bytes have no `ElementDataFile`, which must end its header."
        )
    files = []
    for field in fields:
        value = field[1].strip()
        if is_meta and value.upper() == b"LOCAL":
            break
        names = content[field.end() :].splitlines() if value.upper().split()[:1] == [b"LIST"] else [value]
        files += [_beside(path, name.strip().decode("utf-8", "surrogateescape")) for name in names if name.strip()]
    return files


def _beside(header: Path, name: str) -> Path:
    if "%" in name:
        raise KnowSAMValueError(
            f"it names its data files with a pattern, {name!r}, which is not supported; merge them into one file."
        )
    file = header.parent / name
    if not file.resolve().is_relative_to(header.parent.resolve()):
        raise KnowSAMValueError(f"it points to {name!r}, which is outside its folder; put the data file next to it.")
    return file
