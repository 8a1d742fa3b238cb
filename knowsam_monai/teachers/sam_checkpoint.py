"""Strict loading of SAM's published checkpoints, with errors that name the file, the problem and the remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS
from knowsam_monai.teachers.tiny_vit import from_mobile_sam, is_of_mobile_sam
from knowsam_monai.teachers.weights import (
    PREFIXES,
    TRAINERS_PREFIXES,
    checkpoint_path,
    load_strictly,
    read_state_dict,
    refuse_changes,
)
from knowsam_monai.texts import some

logger = logging.getLogger(__name__)

POSITION_TABLE = "image_encoder.pos_embed"
SAM1_TEACHER = "SAMTeacher (in the bundles: without the overlay teacher_sam2.json)"
SAM2_TEACHER = "Sam2Teacher (in the bundles: the overlay teacher_sam2.json)"
PATCH_PROJECTION = "image_encoder.patch_embed.proj.weight"  # its number of channels identifies the variant


def read_checkpoint(checkpoint: str | os.PathLike[str], variant: str) -> dict[str, torch.Tensor]:
    """Read SAM's tensors without running code that a file may contain.

    Supported are Meta's state dict, MedSAM's (the same for ``vit_b``), and MedSAM's training file, which has the state
    dict under "model".

    Args:
        checkpoint: the file.
        variant: the expected variant.

    Raises:
        FileNotFoundError: if the file does not exist; the message contains the download command.
        ValueError: if it is damaged or not a state dict.

    Example::

        state = read_checkpoint("models/sam_vit_b_01ec64.pth", variant="vit_b")
    """
    path = Path(checkpoint_path(checkpoint))
    expectation = _expectation(path, variant)
    url, md5 = SAM_VARIANTS[variant].url, SAM_VARIANTS[variant].md5
    remedy = "set `checkpoint` to 'procedural', the weights in this package: none are published for this variant"
    if url is not None:
        target = path.with_name(Path(url).name) if path.exists() else path  # a user's file is not overwritten
        remedy = f"get it with `curl --fail --location --create-dirs --output {target} {url}`" + (
            f" (md5 {md5})" if md5 else ""
        )
    if path.is_dir():
        refuse_changes(path, expectation)
        raise KnowSAMFileNotFoundError(
            f"{expectation} is a folder; name the file in it, or use {SAM2_TEACHER} if it is a folder of SAM 2."
        )
    if not path.is_file():
        raise KnowSAMFileNotFoundError(f"{expectation} does not exist; {remedy}.")
    return read_state_dict(path, expectation, remedy, PREFIXES | TRAINERS_PREFIXES)


def load_checkpoint(
    sam: nn.Module, state: dict[str, torch.Tensor], checkpoint: str | os.PathLike[str], variant: str
) -> None:
    """Load all tensors of a checkpoint into a SAM of any input size.

    Args:
        sam: a Sam of :func:`knowsam_monai.teachers.build_sam`, without adapters.
        state: the result of :func:`read_checkpoint`.
        checkpoint: its file, for messages.
        variant: the expected variant.

    Raises:
        ValueError: if the tensors belong to another variant or model.

    Example::

        load_checkpoint(sam, read_checkpoint(path, "vit_b"), path, "vit_b")
    """
    expected, expectation = sam.state_dict(), _expectation(checkpoint, variant)
    is_of_sam = PATCH_PROJECTION in state or is_of_mobile_sam(state)
    if not is_of_sam or any(name.startswith("mask_decoder.hf_") for name in state):
        raise KnowSAMValueError(f"{expectation} holds {which_model(state)}; use a file of {variant}.")
    found = _variant_of(state)
    if found is not None and found != variant:
        raise KnowSAMValueError(
            f"{expectation} holds a {found}; set `variant` to {found!r} or use a file of {variant}."
        )
    state, resized = from_mobile_sam(state) if variant == "mobile_sam" else dict(state), []
    for name in [] if variant == "mobile_sam" else _position_names(sam):
        if name in state and _same_channels(state[name], expected[name]) and state[name].shape != expected[name].shape:
            state[name] = resize_positions(state[name], expected[name].shape)
            resized.append(name)
    load_strictly(sam, state, expectation, f"use a file of {variant} as its authors or MedSAM write it")
    logger.info(
        "SAM %s: all %d tensors loaded from %s. Resized to the token grid of %s: %s.",
        variant,
        len(expected),
        checkpoint,
        "x".join(map(str, sam.prompt_encoder.image_embedding_size)),
        ", ".join(resized) or "none",
    )


def resize_positions(table: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """Resize a position table (1, h, w, channels) or relative positions (length, channels) to another token grid.

    Example::

        >>> resize_positions(torch.zeros(127, 64), (31, 64)).shape
        torch.Size([31, 64])
    """
    size, table = tuple(shape), table.float()
    if table.ndim == 2:  # linear, as in upstream's `get_rel_pos`
        return F.interpolate(table.T[None], size=size[0], mode="linear")[0].T
    return F.interpolate(table.permute(0, 3, 1, 2), size=size[1:3], mode="bilinear").permute(0, 2, 3, 1)


def which_model(state: dict[str, torch.Tensor]) -> str:
    """Describe the model that a state dict belongs to, and the teacher that supports it.

    Example::

        >>> which_model({"image_encoder.trunk.pos_embed": torch.zeros(1)})
        'SAM 2, for Sam2Teacher (in the bundles: the overlay teacher_sam2.json)'
    """
    is_sam2 = any(name.startswith(("image_encoder.trunk.", "vision_encoder.backbone.")) for name in state)
    if any("decoder.hf_" in name for name in state):
        return f"HQ-SAM{' 2' if is_sam2 else ''}, which has additional decoder layers and is not supported"
    if is_sam2:
        return f"SAM 2, for {SAM2_TEACHER}"
    if PATCH_PROJECTION in state or is_of_mobile_sam(state):
        found = _variant_of(state)
        if found is None:
            return f"a SAM of another width, {state[PATCH_PROJECTION].shape[0]} channels, which is not supported"
        return f"SAM 1, for {SAM1_TEACHER} with `variant` {found!r}"
    if "vision_encoder.patch_embed.projection.weight" in state:
        return "SAM 1 in the format of `transformers`; SAMTeacher reads Meta's .pth"
    return f"another model (its tensors are {some(state)})"


def _variant_of(state: dict[str, torch.Tensor]) -> str | None:
    if is_of_mobile_sam(state):
        return "mobile_sam"
    dims = {numbers.embed_dim: name for name, numbers in SAM_VARIANTS.items()}
    return dims.get(state[PATCH_PROJECTION].shape[0])


def _position_names(sam: nn.Module) -> list[str]:
    """Names of the tables whose length depends on the token grid; relative positions of windows do not."""
    global_blocks = [i for i, block in enumerate(sam.image_encoder.blocks) if block.window_size == 0]
    relative = [f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"]
    return [POSITION_TABLE, *relative]


def _same_channels(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.ndim == b.ndim and a.shape[-1] == b.shape[-1]


def _expectation(checkpoint: str | os.PathLike[str], variant: str) -> str:
    return f"`checkpoint` must be a file with the weights of SAM's {variant} but {os.fspath(checkpoint)}"
