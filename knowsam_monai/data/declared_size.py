"""What an image file says about itself, checked before a voxel of it is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from knowsam_monai.errors import KnowSAMValueError

__all__ = ["LARGEST_IMAGE", "check_size", "detached_files"]

# Bytes of the voxels in memory, where each takes 4 or more: a CT of 512 x 512 x 2048.
LARGEST_IMAGE = 2 * 2**30
# Deflate, which .gz, NRRD and MetaImage use, makes 1032 bytes of one at most.
LARGEST_RATIO = 1032
LARGEST_HEADER = 2**20

# In MetaImage the field is the header's last; in NRRD an empty line ends the header.
NRRD_FIELD = re.compile(rb"^[ \t]*data[ \t]*file[ \t]*:[ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)
META_FIELD = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)


def check_size(shape: Sequence[int], itemsize: int, held: int | None = None, ratio: int = 1) -> None:
    """Refuse an image by the size that its header declares.

    Args:
        shape: of the voxels, channels included.
        itemsize: bytes of a voxel in the file.
        held: bytes in the file for the voxels; None where that cannot be known.
        ratio: bytes of voxels that a byte of the file can become.

    Raises:
        ValueError: why no image can be meant, without the file's name.

    Example:
        >>> check_size((512, 512, 4096), itemsize=2)
        Traceback (most recent call last):
        ValueError: its header declares 512 x 512 x 4096 voxels, 4.0 GiB in memory, and the limit is 2 GiB; crop ...
    """
    declared = " x ".join(map(str, shape))
    count = math.prod(int(size) for size in shape)
    if count <= 0:
        raise KnowSAMValueError(f"its header declares {declared} voxels, which is no image.")
    in_memory = count * max(4, itemsize)
    if in_memory > LARGEST_IMAGE:
        raise KnowSAMValueError(
            f"its header declares {declared} voxels, {in_memory / 2**30:.1f} GiB in memory, and the limit is "
            f"{LARGEST_IMAGE / 2**30:g} GiB; crop or resample it."
        )
    if held is not None and count * itemsize > held * ratio:
        raise KnowSAMValueError(
            f"its header declares {declared} voxels of {itemsize} bytes, which {max(held, 0)} bytes of the file cannot "
            "hold; it is cut off or damaged."
        )


def detached_files(header: str | os.PathLike) -> list[Path]:
    """The files that hold the voxels of an NRRD or MetaImage header; none where it holds them itself.

    Raises:
        ValueError: if it points at a file that does not lie in its own folder, without the header's name.

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
        raise KnowSAMValueError(f"its first {LARGEST_HEADER} bytes have no `ElementDataFile`, which ends its header.")
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
            f"it names its data files by a pattern, {name!r}, which is not read; join them to one file."
        )
    file = header.parent / name
    if not file.resolve().is_relative_to(header.parent.resolve()):
        raise KnowSAMValueError(
            f"it points at {name!r}, which lies outside of its own folder; put the data file beside it."
        )
    return file
