"""Reading a checkpoint that somebody else may have written: tensors and plain values, never code."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch


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

    torch's own refusal advises to load the file in the unsafe way; this one says what the file is. The checksums that
    ``torch.save`` writes are compared, which ``torch.load`` does not do.

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
        _check_sums(path)
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


def _check_sums(path: Path) -> None:
    """Of each record in torch's zip; files of before torch 1.6 have none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as records:
        if records.testzip() is not None:
            raise NotATensorFile(f"({path.stat().st_size} bytes) is damaged: its checksums do not match its content")


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
