"""Paths in full, files that are written completely or not at all, and checkpoints read without running code."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pickletools
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.texts import some

PART = ".knowsam-part"  # suffix of files that are still being written
PART_NAME = re.compile(rf".+\.[0-9a-f]{{8}}{re.escape(PART)}", re.DOTALL)
LOCK = ".lock"  # marks the folder of a run
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet computes cells that begin with one of these
CHECKSUM_MARK, CHECKSUM_LENGTH = b"knowsam sha256 ", 64
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")  # of the environment


def expand_path(path: str | os.PathLike, argument: str, folder: str | os.PathLike = "") -> str:
    """
    Expand ``~``, ``~user`` and environment variables in a path.

    Args:
        path: the path to expand. A path that exists as written keeps its dollar signs.
        argument: name of the argument, for the error.
        folder: the folder that a relative path starts from, as it is.

    Raises:
        ValueError: if there is no such user, or a variable is not set.

    Example:
        >>> expand_path("/data/run", "output_dir"), expand_path("a.nii.gz", "image", folder="/data")
        ('/data/run', '/data/a.nii.gz')
    """
    path = os.path.expanduser(os.fspath(path))
    if path.startswith("~"):
        user = path.split("/")[0]
        raise KnowSAMValueError(
            f"`{argument}` must be a path on this machine but {path} begins with {user!r}, and there is no such user; "
            f"write the path in full, or ./{user} for a folder of that name."
        )
    if not os.path.lexists(os.path.join(folder, path)):
        path = os.path.expandvars(path)
        if unknown := VARIABLE.search(path):
            raise KnowSAMValueError(
                f"`{argument}` must use environment variables that are set but {unknown.group()} in {path} is not; set "
                "it, or write the path in full."
            )
    return os.path.join(folder, path)


def write_whole(path: str | os.PathLike, write: Callable[[IO[bytes]], Any], sync: bool = True) -> None:
    """
    Write a file under a temporary name in the same folder, flush it to disk, and rename it.

    Args:
        path: the file. Its folder is created if it is missing.
        write: ``write(file)`` fills a binary file that is open for reading and writing.
        sync: False skips the flush to disk, so a power failure may truncate the file.

    Raises:
        OSError: if the file cannot be written. An earlier file of that name is kept.

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
    Write a text file in UTF-8 with :func:`write_whole`.

    Args:
        path: the file. Its folder is created if it is missing.
        text: its content.

    Raises:
        OSError: if the file cannot be written.

    Example::

        write_text("run.json", "{}")
    """
    write_whole(path, lambda file: file.write(text.encode()))


def copy_whole(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a file with :func:`write_whole`. Copying a file onto itself does nothing."""
    source, target = Path(source), Path(target)
    if target.exists() and target.samefile(source):
        return
    with open(source, "rb") as original:
        write_whole(target, lambda file: shutil.copyfileobj(original, file))


def remove_parts(folder: str | os.PathLike) -> None:
    """
    Delete the temporary files that a killed :func:`write_whole` left in a folder and its subfolders.

    Subfolders that belong to another run, which has its own lock, are skipped.

    Args:
        folder: the folder. No other process may be writing to it.

    Example::

        remove_parts("output")     # before a run resumes
    """
    folder = Path(folder)
    for path in folder.rglob(f"*{PART}"):
        subfolders = path.parents[: path.parents.index(folder)] if path.parent != folder else ()
        if PART_NAME.fullmatch(path.name) and not any((subfolder / LOCK).exists() for subfolder in subfolders):
            path.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """
    Write a table with :func:`write_whole`.

    Args:
        path: the file. Its folder is created if it is missing.
        rows: the table's rows. Its columns are the keys of all rows, in the order of their first appearance; cells of
            missing keys are empty. A text that a spreadsheet would take for a formula is prefixed with an apostrophe.

    Raises:
        OSError: if the file cannot be written.

    Example::

        write_csv("results.csv", [{"epoch": 1, "val_mean_dice": 0.5}, {"epoch": 2, "val_mean_dice": 0.75}])
    """
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text)
    writer.writerows(
        [_escaped(value) for value in line] for line in (columns, *([row.get(c) for c in columns] for row in rows))
    )
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8", "replace")))


def iter_csv(path: str | os.PathLike) -> Iterator[dict[str, str]]:
    """
    Iterate over the rows of a table that :func:`write_csv` wrote, with its original texts.

    A truncated file yields its complete rows before it raises.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a row has more or fewer columns than the first line.

    Example::

        for row in iter_csv("results.csv"):
            print(row["epoch"])
    """
    columns: list[str] | None = None
    with open(path, newline="", encoding="utf-8") as file:
        for number, line in enumerate(filter(None, csv.reader(file))):
            cells = [_unescaped(cell) for cell in line]
            columns = cells if columns is None else columns
            if len(cells) != len(columns):
                raise KnowSAMValueError(f"row {number} has more or fewer columns than the first line")
            if number:
                yield dict(zip(columns, cells))


def _escaped(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _is_formula(value.lstrip("'")) else value


def _unescaped(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_formula(cell.lstrip("'")) else cell


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet would compute the text: it begins like a formula and is not a number."""
    if not text.startswith(FORMULA_STARTS):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def save_checkpoint(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """
    Save finite weights with a checksum, using :func:`write_tensor_file` and :func:`write_whole`.

    Args:
        content: tensors and plain values, by name.
        path: the file.

    Raises:
        RuntimeError: if a tensor is not finite, with its name, or if the file cannot be written. An earlier file of
            that name is kept.
    """
    path = Path(path)
    broken = [name for name, value in content.items() if not _is_finite(value)]
    if broken:
        raise KnowSAMRuntimeError(
            f"Weights must be finite in a checkpoint but {some(broken)} {'are' if broken[1:] else 'is'} not, so {path} "
            "was not written; lower the learning rate or set amp to False. Earlier checkpoints are intact."
        )
    try:
        write_whole(path, lambda file: write_tensor_file(content, file))
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError if the disk is full
        reason = str(error.__context__ if isinstance(error.__context__, OSError) else error).splitlines()[0]
        raise KnowSAMRuntimeError(
            f"`output_dir` must have room for {path.name} but it could not be written to {path.parent} ({reason}); "
            "free some space and repeat the command: it goes on from the last checkpoint, if there is one."
        ) from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return all(_is_finite(part) for part in parts)


def write_tensor_file(content: Any, file: IO[bytes]) -> None:
    """
    ``torch.save`` with a checksum of all bytes in the comment of torch's zip file, which ``torch.load`` ignores.

    The zip's own checksums do not cover its directory: a flipped byte there can give a tensor another one's weights.

    Args:
        content: tensors and plain values.
        file: an empty file, open for reading and writing.

    Example::

        with open("model.pt", "x+b") as file:
            write_tensor_file(network.state_dict(), file)
    """
    torch.save(content, file)
    file.seek(-2, os.SEEK_END)
    file.write((len(CHECKSUM_MARK) + CHECKSUM_LENGTH).to_bytes(2, "little"))
    file.seek(0)
    checksum = sha256(file)
    file.seek(0, os.SEEK_END)
    file.write(CHECKSUM_MARK + checksum.encode())


class InvalidCheckpointError(KnowSAMValueError):
    """
    A file that is not a checkpoint of tensors and plain values.

    Args:
        found: what the file is instead; completes a message that ends with "but <file> ".
        runs_code: whether it is a pickle that would run code, rather than a damaged file.
    """

    def __init__(self, found: str, runs_code: bool = False) -> None:
        super().__init__(found)
        self.runs_code = runs_code


def read_tensor_file(path: str | os.PathLike) -> Any:
    """
    Load a file of ``torch.save`` onto the CPU without running any code that it may contain.

    Unlike ``torch.load``, it compares the checksum of :func:`write_tensor_file`, or those of the zip in other files.
    Where torch's error recommends an unsafe way to load the file, this one says what the file is.

    Args:
        path: the file.

    Raises:
        InvalidCheckpointError: if it is a pickle of Python objects, truncated, damaged, or not a checkpoint.
        OSError: if it cannot be opened.

    Example::

        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"weight": torch.zeros(2)}, file.name)
        ...     read_tensor_file(file.name)
        {'weight': tensor([0., 0.])}
    """
    path = Path(path)
    try:
        if not _is_undamaged(path):
            raise InvalidCheckpointError(
                f"({path.stat().st_size} bytes) is damaged: its checksum does not match its content"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError, InvalidCheckpointError):
        raise
    except Exception as error:  # torch, pickle and zipfile raise errors of their own for a damaged file
        if _would_run_code(path, error):
            raise InvalidCheckpointError(
                "is a pickle of Python objects, which would run code, so it was not loaded", runs_code=True
            ) from error
        size = path.stat().st_size if path.is_file() else 0
        raise InvalidCheckpointError(f"({size} bytes) is truncated or not a checkpoint") from error


def sha256(file: IO[bytes], length: int | None = None) -> str:
    """
    Hash a file from its current position, without holding it in memory.

    Args:
        file: open for reading.
        length: number of bytes; None reads to the end.

    Returns:
        The hash in hexadecimal digits.
    """
    digest, left = hashlib.sha256(), length
    while block := file.read(2**20 if left is None else min(2**20, left)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def _is_undamaged(path: Path) -> bool:
    """Whether the file's checksums match; a file from before torch 1.6 has none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = max(0, size - len(CHECKSUM_MARK) - CHECKSUM_LENGTH)
        file.seek(length)
        if file.read(len(CHECKSUM_MARK)) == CHECKSUM_MARK:
            checksum = file.read().decode(errors="replace")
            file.seek(0)
            return sha256(file, length) == checksum
    try:
        with zipfile.ZipFile(path) as records:
            return records.testzip() is None
    except (OSError, zipfile.BadZipFile):  # torch decides whether it is in the older format
        return True


def _would_run_code(path: Path, error: Exception) -> bool:
    """Whether a file that torch refused is a complete pickle that calls something; nothing is loaded to find out."""
    if "GLOBAL" in str(error):
        return True
    try:
        with path.open("rb") as file:  # torch stops at a protocol it cannot read, before it sees what is called
            opcodes = {opcode.name for opcode, _, _ in pickletools.genops(file)}
    except Exception:
        return False
    return not opcodes.isdisjoint({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE"})
