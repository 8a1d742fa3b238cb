"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import csv
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that a spreadsheet computes
PART = ".knowsam-part"  # how the names of files end that are still being written
OWN_PART = re.compile(rf".+\.[0-9a-f]{{8}}{re.escape(PART)}", re.DOTALL)
LOCK = ".lock"  # of the run that a folder is of


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
    try:
        with open(part, "x+b") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
            missing ones stay empty. A text that a spreadsheet would take for a formula has an apostrophe before it.

    Raises:
        OSError: when it cannot be written.

    Example::

        write_csv("results.csv", [{"epoch": 1, "val_mean_dice": 0.5}, {"epoch": 2, "val_mean_dice": 0.75}])
    """
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text)
    writer.writerows(
        [_cell(value) for value in line] for line in (columns, *([row.get(c) for c in columns] for row in rows))
    )
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8", "replace")))


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """
    The rows of a table of :func:`write_csv`, with the texts as they were.

    Args:
        path: of the file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when a row has more or fewer columns than the first line.

    Example::

        best = max(read_csv("results.csv"), key=lambda row: float(row["val_mean_dice"]))
    """
    return list(iter_csv(path))


def iter_csv(path: str | os.PathLike) -> Iterator[dict[str, str]]:
    """
    The rows of :func:`read_csv` one by one: of a torn file those before the tear come before the error.

    Args:
        path: of the file.

    Raises:
        OSError: when it cannot be read.
        ValueError: at a row that has more or fewer columns than the first line.

    Example::

        for row in iter_csv("results.csv"):
            print(row["epoch"])
    """
    columns: list[str] | None = None
    with open(path, newline="", encoding="utf-8") as file:
        for number, line in enumerate(filter(None, csv.reader(file))):
            cells = [_text(cell) for cell in line]
            columns = cells if columns is None else columns
            if len(cells) != len(columns):
                raise ValueError(f"row {number} has more or fewer columns than the first line")
            if number:
                yield dict(zip(columns, cells))


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _is_formula(value.lstrip("'")) else value


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_formula(cell.lstrip("'")) else cell


def _is_formula(text: str) -> bool:
    """Does it begin like one, and is it no number?"""
    if not text.startswith(FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def remove_parts(folder: str | os.PathLike) -> None:
    """
    Delete what a killed process left behind while it wrote, in a folder and the folders in it; nothing else.

    Folders in it that are of another run, which has a lock of its own, are left as they are.

    Args:
        folder: where :func:`write_whole` writes to; no other process may write there now.

    Example::

        remove_parts("output")     # before a run goes on
    """
    folder = Path(folder)
    for path in folder.rglob(f"*{PART}"):
        inner = path.parents[: path.parents.index(folder)] if path.parent != folder else ()
        if OWN_PART.fullmatch(path.name) and not any((parent / LOCK).exists() for parent in inner):
            path.unlink(missing_ok=True)
