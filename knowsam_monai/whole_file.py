"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import csv
import io
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PART = ".knowsam-part"  # how the names of files end that are still being written


def write_whole(path: str | os.PathLike, write: Callable[[IO[bytes]], Any], sync: bool = True) -> None:
    """
    Write under a temporary name in the same folder, bring that to the disk, and rename it.

    Args:
        path: of the file; its folder is made when missing.
        write: ``write(file)`` fills a binary file, which it can read too.
        sync: False leaves it to the system when the bytes reach the disk: a power cut may then tear the file.

    Raises:
        OSError: when it cannot be written; the file that was there before is as it was.

    Example::

        write_whole("run.json", lambda file: file.write(b"{}"))
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    with open(part, "x+b") as file:
        try:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            part.unlink()
            raise
    os.replace(part, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """
    :func:`write_whole` of a text in UTF-8.

    Args:
        path: of the file; its folder is made when missing.
        text: all of it.

    Raises:
        OSError: when it cannot be written.

    Example::

        write_text("run.json", "{}")
    """
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """
    :func:`write_whole` of a table.

    Args:
        path: of the file; its folder is made when missing.
        rows: of the table; its columns are the keys of all, in the order in which they first come, and a row's
            missing ones stay empty.

    Raises:
        OSError: when it cannot be written.

    Example::

        write_csv("results.csv", [{"epoch": 1, "val_mean_dice": 0.5}, {"epoch": 2, "val_mean_dice": 0.75}])
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def remove_parts(folder: str | os.PathLike) -> None:
    """
    Delete what a killed process left behind while it wrote, in a folder and the folders in it; nothing else.

    Args:
        folder: where :func:`write_whole` writes to; no other process may write there now.

    Example::

        remove_parts("output")     # before a run goes on
    """
    for path in Path(folder).rglob(f"*{PART}"):
        path.unlink(missing_ok=True)
