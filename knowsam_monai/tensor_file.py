"""Checkpoints of tensors and plain values, never code: written with a checksum, and read from whoever wrote them."""

from __future__ import annotations

import hashlib
import os
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

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


class NotATensorFile(ValueError):
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
