"""SAM for any input size, built from the classes of `segment_anything`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.prompted_teacher import check_image_size
from knowsam_monai.teachers.sam_checkpoint import load_checkpoint, read_checkpoint
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS, VIT_T, SAMVariant
from knowsam_monai.teachers.segment_anything_import import import_segment_anything
from knowsam_monai.teachers.tiny_vit import TinyViTEncoder

logger = logging.getLogger(__name__)

STAND_IN = "procedural"  # name of the weights in this package, pretrained on procedural images
WEIGHTS = Path(__file__).parent / "weights" / "stand_in.pt"
SIZE_DIVISOR = 16  # a token stands for 16 x 16 pixels, or for 8 x 8 in `stand_in`


@kept_random_state()
def build_sam(
    variant: str = "vit_b", image_size: int | Sequence[int] = 1024, checkpoint: str | os.PathLike[str] | None = None
) -> nn.Module:
    """Build SAM for one input size and load a published checkpoint strictly.

    The checkpoint's position table (bilinear) and its relative positions of global attention (linear) are resized to
    the token grid once; upstream resizes the latter in every forward. Relative positions of windows are not resized.

    Args:
        variant: "vit_b", "vit_l" or "vit_h" as published; "mobile_sam", whose image encoder is TinyViT; or "stand_in",
            a small SAM of the same classes without published weights (2 M parameters, patch size 8: 128 x 128 pixels
            have 16 x 16 tokens).
        image_size: height and width of the encoder's input, or one number for both; multiples of 16.
        checkpoint: file with SAM's weights: Meta's, MobileSAM's, or one in MedSAM's format (``vit_b``). "procedural" is
            the package's own file for ``stand_in``, pretrained on procedural images: a stand-in, not SAM. None: random
            weights, drawn from torch's global generator, whose state is restored.

    Returns:
        `segment_anything`'s Sam in eval mode.

    Raises:
        ValueError: if variant or size is invalid, or if the checkpoint is damaged or belongs to another model.
        FileNotFoundError: if the checkpoint is missing; the message contains the download command.
        ImportError: if `segment_anything`, or `timm` for MobileSAM, is not installed.

    Example::

        >>> sam = build_sam("stand_in", image_size=(128, 96))
        >>> sam.image_encoder(torch.zeros(1, 3, 128, 96)).shape
        torch.Size([1, 128, 16, 12])

    Reference:
        Kirillov et al., Segment Anything, arXiv:2304.02643.
    """
    if variant not in SAM_VARIANTS:
        remedy = f"; {VIT_T}" if variant == "vit_t" else ""
        raise KnowSAMValueError(f"`variant` must be one of {', '.join(SAM_VARIANTS)} but is {variant!r}{remedy}.")
    numbers = SAM_VARIANTS[variant]
    size = check_image_size(image_size, SIZE_DIVISOR)
    grid = (size[0] // numbers.patch_size, size[1] // numbers.patch_size)
    if checkpoint == STAND_IN:
        checkpoint = stand_in_checkpoint(variant)
    state = None if checkpoint is None else read_checkpoint(checkpoint, variant)

    modeling = import_segment_anything().modeling
    sam = modeling.Sam(
        image_encoder=TinyViTEncoder(max(size)) if variant == "mobile_sam" else _image_encoder(numbers, size, grid),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=numbers.prompt_dim,
            image_embedding_size=grid,
            input_image_size=size,
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=numbers.prompt_dim,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=numbers.prompt_dim, num_heads=8, mlp_dim=numbers.decoder_mlp_dim
            ),
            iou_head_hidden_dim=numbers.prompt_dim,
        ),
    )
    if state is not None:
        load_checkpoint(sam, state, checkpoint, variant)
    return sam.eval()


def stand_in_checkpoint(variant: str) -> Path:
    """Return the file behind ``checkpoint="procedural"``, with a warning that it is not SAM.

    Raises:
        ValueError: if the variant is not ``stand_in``.
        FileNotFoundError: if the weights do not exist; the message contains the command that trains them.

    Example::

        sam = build_sam("stand_in", image_size=128, checkpoint="procedural")
    """
    if variant != "stand_in":
        raise KnowSAMValueError(
            f"`checkpoint` must be a file with SAM's weights for {variant} but is {STAND_IN!r}, which exists for "
            "stand_in only; set `variant` to 'stand_in' or `checkpoint` to a file."
        )
    if not WEIGHTS.is_file():
        raise KnowSAMFileNotFoundError(
            f"`checkpoint` {STAND_IN!r} needs {WEIGHTS}, which does not exist; create it in the project's root with "
            f"`python -m pretraining.pretrain_stand_in --output {WEIGHTS}`."
        )
    logger.warning("The teacher is a stand-in pretrained on procedural images, NOT SAM.")
    return WEIGHTS


def _image_encoder(numbers: SAMVariant, size: tuple[int, int], grid: tuple[int, int]) -> nn.Module:
    encoder = import_segment_anything().modeling.ImageEncoderViT(
        img_size=max(size),
        patch_size=numbers.patch_size,
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        num_heads=numbers.num_heads,
        out_chans=numbers.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=numbers.window_size,
        global_attn_indexes=numbers.global_attention_blocks,
    )
    _size_positions(encoder, grid)
    return encoder


def _size_positions(encoder: nn.Module, grid: tuple[int, int]) -> None:
    """Give the position tables the token grid's shape; upstream's are square.

    Upstream initializes them with zeros, so a SAM trained from scratch could not tell equal patches apart.
    """
    channels = encoder.pos_embed.shape[-1]
    encoder.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *grid, channels), std=0.02))
    for block in encoder.blocks:
        if block.window_size == 0:
            head_dim = block.attn.rel_pos_h.shape[-1]
            block.attn.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
            block.attn.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))
