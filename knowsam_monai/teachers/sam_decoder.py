"""SAM's mask decoder for all classes of all images in one call, using the submodules of `segment_anything`."""

from __future__ import annotations

import torch
import torch.nn as nn


def dense_positions(prompt_encoder: nn.Module) -> torch.Tensor:
    """Encode the positions of SAM's token grid, (h * w, D), in the precision of its frequencies.

    Args:
        prompt_encoder: `segment_anything`'s PromptEncoder. Its own ``get_dense_pe`` only supports float32.

    Example::

        >>> from knowsam_monai.teachers.sam import build_sam
        >>> dense_positions(build_sam("stand_in", image_size=64).prompt_encoder).shape
        torch.Size([64, 128])
    """
    layer = prompt_encoder.pe_layer
    centers = token_centers(*prompt_encoder.image_embedding_size, layer.positional_encoding_gaussian_matrix)
    with torch.autocast(centers.device.type, enabled=False):  # large angles need full precision
        return layer._pe_encoding(centers).flatten(0, 1)


def token_centers(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The centers (x, y) of the tokens of a grid, 0..1 in each direction, (h, w, 2), in the precision of `like`.

    Example::

        >>> token_centers(1, 2, torch.zeros(())).tolist()
        [[[0.25, 0.5], [0.75, 0.5]]]
    """
    y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
    x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def decode_masks(
    decoder: nn.Module,
    embedding: torch.Tensor,
    positions: torch.Tensor,
    prompt_tokens: torch.Tensor,
    mask_embedding: torch.Tensor,
) -> torch.Tensor:
    """Run `segment_anything`'s MaskDecoder on several prompts of several images at once, with single-mask output.

    Upstream's forward takes one image per call, and predicts four masks and their quality to return one mask. This
    function calls its parts for all images, and only computes the first mask: no quality head and no hypernetworks of
    the other masks.

    Args:
        decoder: MaskDecoder, with or without adapters.
        embedding: image embeddings (B, D, h, w).
        positions: :func:`dense_positions`, (h * w, D).
        prompt_tokens: sparse embeddings of C prompts per image, (B, C, T, D).
        mask_embedding: dense embeddings of ``prompt_encoder.mask_downscaling``, (B, C, D, h, w).

    Returns:
        Mask logits (B, C, 4 h, 4 w), equal up to rounding to ``decoder(..., multimask_output=False)`` for each image.

    Example::

        >>> from knowsam_monai.teachers.sam import build_sam
        >>> sam = build_sam("stand_in", image_size=64)
        >>> masks = decode_masks(
        ...     decoder=sam.mask_decoder,
        ...     embedding=torch.zeros(2, 128, 8, 8),
        ...     positions=dense_positions(sam.prompt_encoder),
        ...     prompt_tokens=torch.zeros(2, 3, 2, 128),
        ...     mask_embedding=torch.zeros(2, 3, 128, 8, 8),
        ... )
        >>> masks.shape
        torch.Size([2, 3, 32, 32])
    """
    output_tokens = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    output_tokens = output_tokens.expand(*prompt_tokens.shape[:2], -1, -1)
    tokens = torch.cat((output_tokens, prompt_tokens.to(output_tokens.dtype)), dim=2).flatten(0, 1)  # (B * C, T + 5, D)
    image = (embedding[:, None] + mask_embedding).flatten(0, 1)  # (B * C, D, h, w)
    grid = embedding.shape[2:]
    tokens, image = decoder.transformer(image, positions.T.unflatten(1, grid)[None], tokens)
    image = decoder.output_upscaling(image.transpose(1, 2).unflatten(2, grid))  # from (B * C, h * w, D)
    masks = decoder.output_hypernetworks_mlps[0](tokens[:, 1])[:, None] @ image.flatten(2)
    return masks.view(*prompt_tokens.shape[:2], *image.shape[2:])
