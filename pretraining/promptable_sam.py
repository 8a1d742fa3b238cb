"""Batched prompting of SAM as by its authors: points, boxes and masks of many objects in many images.

`segment_anything` processes one image per call. These functions run its modules on batches, with equal results.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from knowsam_monai.teachers.sam_decoder import dense_positions
from knowsam_monai.teachers.sam_encoder import encode_image


def encode(sam: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Encode gray images (B, 1, H, W) in 0..1, normalized as by SAM, to embeddings (B, D, h, w)."""
    rgb = image.expand(-1, 3, -1, -1) * 255
    return encode_image(sam.image_encoder, (rgb - sam.pixel_mean) / sam.pixel_std)


def decode(
    sam: nn.Module,
    embedding: torch.Tensor,
    points: torch.Tensor,
    codes: torch.Tensor,
    mask_logits: torch.Tensor,
    has_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict masks and IoUs of P prompts, P / B consecutive ones for each image.

    Args:
        sam: a Sam of :func:`knowsam_monai.teachers.build_sam`.
        embedding: (B, D, h, w).
        points: (P, T, 2), x and y in pixels.
        codes: (P, T), see :mod:`pretraining.prompts`; a box is two points, as in `segment_anything`'s ONNX model.
        mask_logits: (P, 4 h, 4 w), used if ``has_mask`` (P,).

    Returns:
        Mask logits (P, 4, 4 h, 4 w) and IoUs (P, 4): 0 is the single mask, 1 to 3 are the masks of an ambiguous prompt.
    """
    decoder, prompt_encoder = sam.mask_decoder, sam.prompt_encoder
    output_tokens = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight)).expand(len(points), -1, -1)
    tokens = torch.cat((output_tokens, embed_points(prompt_encoder, points, codes)), dim=1)
    dense = prompt_encoder.mask_downscaling(mask_logits[:, None])
    dense = torch.where(has_mask[:, None, None, None], dense, prompt_encoder.no_mask_embed.weight[:, :, None, None])
    image = embedding.repeat_interleave(len(points) // len(embedding), dim=0) + dense
    positions = dense_positions(prompt_encoder).T.unflatten(1, image.shape[2:]).expand_as(image)

    tokens, pixels = decoder.transformer(image, positions, tokens)
    upscaled = decoder.output_upscaling(pixels.transpose(1, 2).unflatten(2, image.shape[2:]))
    networks = decoder.output_hypernetworks_mlps
    weights = torch.stack([network(tokens[:, 1 + i]) for i, network in enumerate(networks)], dim=1)
    masks = torch.einsum("pmc,pchw->pmhw", weights, upscaled)
    return masks, decoder.iou_prediction_head(tokens[:, 0])


def embed_points(prompt_encoder: nn.Module, points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Embed points (P, T, 2) with codes (P, T) as prompt tokens (P, T, D)."""
    with torch.autocast(points.device.type, enabled=False):
        positions = prompt_encoder.pe_layer.forward_with_coords(points + 0.5, prompt_encoder.input_image_size)
    kinds = [prompt_encoder.not_a_point_embed, *prompt_encoder.point_embeddings]
    table = torch.cat([kind.weight for kind in kinds])
    return positions * (codes >= 0)[..., None] + table[codes + 1]
