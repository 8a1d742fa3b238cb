"""Checkpoints that are whole and finite, or are not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from knowsam_monai.tensor_file import write_tensor_file
from knowsam_monai.whole_file import write_whole


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
        raise RuntimeError(
            f"Weights must be finite in a checkpoint but {names} {'are' if broken[1:] else 'is'} not, so {path} was "
            "not written; lower the learning rate or set amp to False. The checkpoint before this is whole."
        )
    try:
        write_whole(path, lambda file: write_tensor_file(content, file))
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
        reason = str(error.__context__ if isinstance(error.__context__, OSError) else error).splitlines()[0]
        raise RuntimeError(
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
