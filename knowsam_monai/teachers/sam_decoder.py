"""SAM's mask decoder for all classes of all images in one call, using the submodules of `segment_anything`."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


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


def embed_masks(prompt_encoder: nn.Module, masks: torch.Tensor) -> torch.Tensor:
    """Embed mask prompts on channels-last tokens.

    Args:
        prompt_encoder: `segment_anything`'s PromptEncoder.
        masks: (P, 4 h, 4 w) for P prompts and a token grid of h x w.

    Returns:
        Dense embeddings (P, h * w, D), equal to ``prompt_encoder.mask_downscaling``.

    Example::

        >>> from knowsam_monai.teachers.sam import build_sam
        >>> embed_masks(build_sam("stand_in", image_size=64).prompt_encoder, torch.zeros(3, 32, 32)).shape
        torch.Size([3, 64, 128])
    """
    first, first_norm, activation, second, second_norm, last_activation, project = prompt_encoder.mask_downscaling
    height, width = prompt_encoder.image_embedding_size
    # both convolutions have stride 2 and kernel 2, so each token covers 2 x 2 patches of 2 x 2 pixels
    patches = masks.view(-1, height, 2, 2, width, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height * width, 4, 4)
    x = F.linear(patches, first.weight.flatten(1), first.bias)  # (P, tokens, 4, channels)
    x = activation(layer_norm_of_channels(first_norm, x)).flatten(2)
    x = F.linear(x, second.weight.permute(0, 2, 3, 1).flatten(1), second.bias)
    x = last_activation(layer_norm_of_channels(second_norm, x))
    return F.linear(x, project.weight.flatten(1), project.bias)


def decode_masks(
    decoder: nn.Module,
    embedding: torch.Tensor,
    positions: torch.Tensor,
    prompt_tokens: torch.Tensor,
    mask_tokens: torch.Tensor,
) -> torch.Tensor:
    """Run `segment_anything`'s MaskDecoder on several prompts of several images at once, with single-mask output.

    Upstream processes one image per call, and predicts four masks and their quality to return one mask. This function
    gives upstream's transformer all images, and only computes the first mask: no quality head and no hypernetworks of
    the other masks.

    Args:
        decoder: MaskDecoder, with or without adapters.
        embedding: image embeddings (B, D, h, w).
        positions: :func:`dense_positions`, (h * w, D).
        prompt_tokens: sparse embeddings of C prompts per image, (B, C, T, D).
        mask_tokens: dense embeddings of :func:`embed_masks`, (B, C, h * w, D).

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
        ...     mask_tokens=torch.zeros(2, 3, 64, 128),
        ... )
        >>> masks.shape
        torch.Size([2, 3, 32, 32])
    """
    grid = embedding.shape[2:]
    output_tokens = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    output_tokens = output_tokens.expand(*prompt_tokens.shape[:2], -1, -1)
    tokens = torch.cat((output_tokens, prompt_tokens.to(output_tokens.dtype)), dim=2).flatten(0, 1)  # (B * C, T + 5, D)
    image = embedding.flatten(2).transpose(1, 2)[:, None] + mask_tokens  # (B, C, h * w, D)
    image = image.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B * C, D, h, w), as upstream takes it
    tokens, image = decoder.transformer(image, positions.T.unflatten(1, grid)[None], tokens)
    masks = _upscaled_masks(decoder, image, tokens[:, 1], grid)  # the image as tokens (B * C, h * w, D)
    return masks.unflatten(0, prompt_tokens.shape[:2])


def _upscaled_masks(
    decoder: nn.Module, image: torch.Tensor, mask_token: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Mask logits (P, 4 h, 4 w) of image tokens (P, h * w, D) and the mask token (P, D).

    Both transposed convolutions have stride 2 and kernel 2, so each token computes its own 4 x 4 pixels. Data stays
    channels-last, and only the final mask is rearranged.
    """
    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = F.linear(image, first.weight.permute(2, 3, 1, 0).flatten(0, 2), first.bias.repeat(4))
    x = activation(layer_norm_of_channels(norm, x.unflatten(-1, (4, -1))))  # (P, h * w, 2 * 2, channels)
    x = F.linear(x, second.weight.permute(2, 3, 1, 0).flatten(0, 2), second.bias.repeat(4))
    x = last_activation(x.unflatten(-1, (4, -1))).flatten(1, 3)  # (P, h * w * 4 * 4, channels)
    hypernetwork = decoder.output_hypernetworks_mlps[0]
    masks = x @ hypernetwork(mask_token)[..., None]
    height, width = grid
    masks = masks.view(-1, height, width, 2, 2, 2, 2)  # (..., outer row, outer column, inner row, inner column)
    return masks.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 4 * height, 4 * width)


def layer_norm_of_channels(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply `segment_anything`'s LayerNorm2d to channels-last tokens (..., C)."""
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
