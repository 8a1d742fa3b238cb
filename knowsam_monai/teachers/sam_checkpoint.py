"""Strict loading of SAM's published checkpoints: every tensor is used, and each bad file is named with its remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.files import NotATensorFile, read_tensor_file
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS

logger = logging.getLogger(__name__)

POSITION_TABLE = "image_encoder.pos_embed"
PATCH_PROJECTION = "image_encoder.patch_embed.proj.weight"  # its channels tell the variants apart


def read_checkpoint(checkpoint: str | os.PathLike[str], variant: str) -> dict[str, torch.Tensor]:
    """Read SAM's tensors by their own names, without running any code that a file may hold.

    Known forms: Meta's state dict; MedSAM's, the same for ``vit_b``; and MedSAM's training file, which holds that state
    dict under "model", with "module." before each name when it was trained on several GPUs.

    Args:
        checkpoint: the file.
        variant: what it must hold.

    Raises:
        FileNotFoundError: when there is no such file; the message holds the command that gets it.
        ValueError: when it is damaged or no state dict.

    Example::

        state = read_checkpoint("models/sam_vit_b_01ec64.pth", variant="vit_b")
    """
    content = _read(Path(checkpoint), variant)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        kind = f"a dict of {_some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise KnowSAMValueError(
            f"{_expectation(checkpoint, variant)} holds {kind}; save the model's plain `state_dict()`."
        )
    wrapped = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in content.items()}


def load_checkpoint(
    sam: nn.Module, state: dict[str, torch.Tensor], checkpoint: str | os.PathLike[str], variant: str
) -> None:
    """Load the tensors of a checkpoint into a SAM of any input size: all of them, into all of it.

    Args:
        sam: a Sam of :func:`knowsam_monai.teachers.build_sam`, without adapters.
        state: what :func:`read_checkpoint` read.
        checkpoint: its file, for messages.
        variant: what the file must hold.

    Raises:
        ValueError: when the tensors are those of another variant or model.

    Example::

        load_checkpoint(sam, read_checkpoint(path, "vit_b"), path, "vit_b")
    """
    expected = sam.state_dict()
    state, resized = dict(state), []
    for name in _position_names(sam):
        if name in state and _same_channels(state[name], expected[name]) and state[name].shape != expected[name].shape:
            state[name] = resize_positions(state[name], expected[name].shape)
            resized.append(name)
    _check_tensors(state, expected, _expectation(checkpoint, variant), variant)
    sam.load_state_dict(state)
    logger.info(
        "SAM %s: all %d tensors loaded from %s, none left out, none new. Resized to the token grid of %s: %s.",
        variant,
        len(expected),
        checkpoint,
        "x".join(map(str, expected[POSITION_TABLE].shape[1:3])),
        ", ".join(resized) or "none",
    )


def resize_positions(table: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """Resize a position table (1, h, w, channels) or relative positions (length, channels) to another token grid.

    Example::

        >>> resize_positions(torch.zeros(127, 64), (31, 64)).shape
        torch.Size([31, 64])
    """
    size, table = tuple(shape), table.float()
    if table.ndim == 2:  # linear, as upstream's `get_rel_pos` does it in each forward
        return F.interpolate(table.T[None], size=size[0], mode="linear")[0].T
    return F.interpolate(table.permute(0, 3, 1, 2), size=size[1:3], mode="bilinear").permute(0, 2, 3, 1)


def which_model(state: dict[str, torch.Tensor]) -> str | None:
    """Which model of SAM's family the tensors are of, and what takes it; None where that is not known.

    Example::

        >>> which_model({"image_encoder.trunk.pos_embed": torch.zeros(1)})
        'SAM 2, which Sam2Teacher takes'
    """
    if any(name.startswith(("image_encoder.trunk.", "vision_encoder.backbone.")) for name in state):
        return "SAM 2, which Sam2Teacher takes"
    if any("decoder.hf_" in name for name in state):
        return "HQ-SAM, whose decoder has layers of its own and which no teacher here takes"
    if any(name.startswith("image_encoder.patch_embed.seq.") for name in state):
        return "MobileSAM, whose image encoder (TinyViT) no teacher here has"
    if PATCH_PROJECTION in state:
        dims = {numbers.embed_dim: name for name, numbers in SAM_VARIANTS.items()}
        found = dims.get(state[PATCH_PROJECTION].shape[0])
        return f"SAM 1, which SAMTeacher takes with `variant` {found!r}"
    if "vision_encoder.patch_embed.projection.weight" in state:
        return "SAM 1 as `transformers` stores it; SAMTeacher takes Meta's .pth"
    return None


def _read(path: Path, variant: str) -> Any:
    expectation = _expectation(path, variant)
    url, md5 = SAM_VARIANTS[variant].url, SAM_VARIANTS[variant].md5
    remedy = "leave `checkpoint` out to start from random weights: none are published for this variant"
    if url is not None:
        remedy = f"get it with `curl --fail --location --create-dirs --output {path} {url}` (md5 {md5})"
    if not path.is_file():
        raise KnowSAMFileNotFoundError(
            f"{expectation} {'is a folder' if path.is_dir() else 'does not exist'}; {remedy}."
        )
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if head.startswith(b"<"):
        raise KnowSAMValueError(f"{expectation} is a web page (HTML or XML), saved in place of the download; {remedy}.")
    try:
        return read_tensor_file(path)
    except NotATensorFile as error:
        if error.runs_code:
            remedy = f"save the model's plain `state_dict()` where you trust the file, or {remedy}"
        raise KnowSAMValueError(f"{expectation} {error}; {remedy}.") from error


def _position_names(sam: nn.Module) -> list[str]:
    """The tables whose length follows the token grid: windows keep their own relative positions."""
    global_blocks = [i for i, block in enumerate(sam.image_encoder.blocks) if block.window_size == 0]
    relative = [f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"]
    return [POSITION_TABLE, *relative]


def _same_channels(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.ndim == b.ndim and a.shape[-1] == b.shape[-1]


def _check_tensors(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], expectation: str, variant: str
) -> None:
    if PATCH_PROJECTION not in state or any(name.startswith("mask_decoder.hf_") for name in state):
        other = which_model(state)
        kind = f"another model (its tensors are {_some(state)})" if other is None else other
        raise KnowSAMValueError(f"{expectation} holds {kind}; give the file of a {variant}.")
    dims = {numbers.embed_dim: name for name, numbers in SAM_VARIANTS.items()}
    found = dims.get(state[PATCH_PROJECTION].shape[0])
    if found is not None and found != variant:
        raise KnowSAMValueError(
            f"{expectation} holds a {found}; set `variant` to {found!r} or give the file of a {variant}."
        )
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [("lacks", missing), ("has no place for", unknown), ("has other shapes in", misshapen)]
    found_problems = [f"{verb} {_some(names)}" for verb, names in problems if names]
    if found_problems:
        raise KnowSAMValueError(
            f"{expectation} holds another model ({'; '.join(found_problems)}); give the file of a {variant}, as "
            "`segment_anything` or MedSAM writes it."
        )


def _expectation(checkpoint: str | os.PathLike[str], variant: str) -> str:
    return f"`checkpoint` must be a file with the weights of SAM's {variant} but {os.fspath(checkpoint)}"


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + rest
