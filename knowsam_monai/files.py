"""Files: whole or not there, finite, and read without running code."""

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
                raise KnowSAMValueError(f"row {number} has more or fewer columns than the first line")
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


def save_checkpoint(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """
    ``torch.save`` of weights that are finite, with a checksum, into a file that is there whole or not at all.

    A kill, a full disk or a power cut leaves the file that was there before.

    Args:
        content: tensors and plain values, by name.
        path: of the file.

    Raises:
        RuntimeError: when a tensor is not finite, by its name, or when the file cannot be written.
    """
    path = Path(path)
    broken = [name for name, value in content.items() if not _is_finite(value)]
    if broken:
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if broken[3:] else "")
        raise KnowSAMRuntimeError(
            f"Weights must be finite in a checkpoint but {names} {'are' if broken[1:] else 'is'} not, so {path} was "
            "not written; lower the learning rate or set amp to False. The checkpoint before this is whole."
        )
    try:
        write_whole(path, lambda file: write_tensor_file(content, file))
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
        reason = str(error.__context__ if isinstance(error.__context__, OSError) else error).splitlines()[0]
        raise KnowSAMRuntimeError(
            f"`output_dir` must have room for {path.name} but it could not be written to {path.parent} ({reason}); "
            "free some space and give the same command: it goes on from the checkpoint before, which is whole."
        ) from error


def copy_whole(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a file; a kill or a full disk leaves the target that was there before."""
    source, target = Path(source), Path(target)
    if target.exists() and target.samefile(source):
        return
    with open(source, "rb") as original:
        write_whole(target, lambda file: shutil.copyfileobj(original, file))


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return all(_is_finite(part) for part in parts)


SEAL, DIGEST_LENGTH = b"knowsam sha256 ", 64


def write_tensor_file(content: Any, file: IO[bytes]) -> None:
    """
    ``torch.save`` with a checksum of all bytes as the comment of torch's zip; what reads such files reads this one too.

    The zip's own checksums leave its directory out: a flipped byte there gives a tensor the weights of another.

    Args:
        content: tensors and plain values.
        file: an empty one, open for reading and writing.

    Example::

        with open("model.pt", "x+b") as file:
            write_tensor_file(network.state_dict(), file)
    """
    torch.save(content, file)
    file.seek(-2, os.SEEK_END)
    file.write((len(SEAL) + DIGEST_LENGTH).to_bytes(2, "little"))
    file.seek(0)
    digest = sha256(file)
    file.seek(0, os.SEEK_END)
    file.write(SEAL + digest.encode())


def sha256(file: IO[bytes], length: int | None = None) -> str:
    """
    Hash of a file from where it stands, in hexadecimal digits, without holding it in memory.

    Args:
        file: open for reading.
        length: bytes; None: to the end.
    """
    digest, left = hashlib.sha256(), length
    while block := file.read(2**20 if left is None else min(2**20, left)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


class NotATensorFile(KnowSAMValueError):
    """
    A file that is no checkpoint of tensors and plain values; the text says what it is instead, after "but <file> ".

    Args:
        found: that text.
        runs_code: whether it is a pickle that would run code, and not only damaged.
    """

    def __init__(self, found: str, runs_code: bool = False) -> None:
        super().__init__(found)
        self.runs_code = runs_code


def read_tensor_file(path: str | os.PathLike) -> Any:
    """
    What ``torch.save`` wrote into a file, on the CPU, without running any code that the file may hold.

    torch's own refusal advises to load the file in the unsafe way; this one says what the file is. The checksum of
    :func:`write_tensor_file` is compared, or of other files those in their zip, which ``torch.load`` does not do.

    Args:
        path: of the file.

    Raises:
        NotATensorFile: when it is a pickle of Python objects, truncated, damaged, or no checkpoint at all.
        OSError: when it cannot be opened.

    Example::

        >>> torch.save({"weight": torch.zeros(2)}, "/tmp/model.pt")
        >>> read_tensor_file("/tmp/model.pt")
        {'weight': tensor([0., 0.])}
    """
    path = Path(path)
    try:
        if not _is_undamaged(path):
            raise NotATensorFile(f"({path.stat().st_size} bytes) is damaged: its checksum is not that of its content")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError, NotATensorFile):
        raise
    except Exception as error:  # torch, pickle and zipfile each have their own for a damaged file
        if _would_run_code(path, error):
            raise NotATensorFile(
                "is a pickle of Python objects, which would run code when it is loaded, so it was not", runs_code=True
            ) from error
        size = path.stat().st_size if path.is_file() else 0
        raise NotATensorFile(f"({size} bytes) is truncated or no checkpoint at all") from error


def _is_undamaged(path: Path) -> bool:
    """Whether the checksums are right that a file has; one of before torch 1.6 has none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = max(0, size - len(SEAL) - DIGEST_LENGTH)
        file.seek(length)
        if file.read(len(SEAL)) == SEAL:
            digest = file.read().decode(errors="replace")
            file.seek(0)
            return sha256(file, length) == digest
    try:
        with zipfile.ZipFile(path) as records:
            return records.testzip() is None
    except (OSError, zipfile.BadZipFile):  # torch says whether it is of the older form
        return True


def _would_run_code(path: Path, error: Exception) -> bool:
    """Whether a file that torch refused is a whole pickle that calls something; nothing is loaded to find out."""
    if "GLOBAL" in str(error):
        return True
    try:
        with path.open("rb") as file:  # a protocol that torch does not read: it stops before it sees what is called
            opcodes = {opcode.name for opcode, _, _ in pickletools.genops(file)}
    except Exception:
        return False
    return not opcodes.isdisjoint({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE"})
