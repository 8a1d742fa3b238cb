"""SAM 2's image encoder (Hiera) without computations on padded tokens, using the submodules of `transformers`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam_monai.teachers.adapter import AdaptedAttention
from knowsam_monai.teachers.sam_encoder import spans


def encode_sam2_image(encoder: nn.Module, image: Tensor) -> list[Tensor]:
    """
    Run `transformers`' Sam2VisionModel on real tokens only.

    Upstream pads the token grid to whole windows (16 x 16 tokens to 28 x 28), and queries attend to the padding. The
    padding is zero and is added after the norm, so all n padded tokens of a window share one key and one value, the
    biases of the projection. They are equivalent to one key with the logit ``q.k_pad / sqrt(d) + log(n)``. Upstream's
    positions of the feature maps, which single images do not use, are not computed.

    Args:
        encoder: Sam2VisionModel, with or without adapters.
        image: normalized image (B, 3, H, W), H and W multiples of 32.

    Returns:
        The feature maps of strides 4, 8 and 16, (B, D, H / stride, W / stride), equal to
        ``encoder(image).fpn_hidden_states`` up to rounding.

    Example::

        finest, finer, coarse = encode_sam2_image(build_sam2("tiny").vision_encoder, torch.zeros(1, 3, 256, 256))
    """
    backbone, neck = encoder.backbone, encoder.neck
    tokens = backbone.patch_embed(image)  # (B, h, w, channels)
    tokens = tokens + backbone._get_pos_embed(tokens.shape[1:3])
    stages = []
    for index, block in enumerate(backbone.blocks):
        tokens = _run_block(block, tokens)
        if index in backbone.stage_ends:
            stages.append(tokens.permute(0, 3, 1, 2))
    features: list[Tensor] = []  # from coarse to fine
    for level, convolution in zip(reversed(range(len(stages))), neck.convs):
        lateral = convolution(stages[level])
        if features and level in neck.fpn_top_down_levels:
            lateral = lateral + F.interpolate(features[-1], scale_factor=2.0, mode="nearest")
        features.append(lateral)
    return features[-encoder.num_feature_levels :][::-1]


def _run_block(block: nn.Module, tokens: Tensor) -> Tensor:
    normed = block.layer_norm1(tokens)
    if block.dim != block.dim_out:
        tokens = _pool(block.proj(normed), block.query_stride)
    tokens = tokens + _attend(block.attn, normed, block.window_size)
    return tokens + block.mlp(block.layer_norm2(tokens))


def _attend(attention: nn.Module, tokens: Tensor, window_size: int) -> Tensor:
    """Attention within windows (0: global) of tokens (B, h, w, channels), with upstream's pooling of the queries."""
    if isinstance(attention, AdaptedAttention):
        return attention.adapter(_attend(attention.attention, tokens, window_size))
    qkv = attention.qkv(tokens)
    rows = [
        torch.cat(
            [
                _attend_in_windows(attention, qkv[:, top:bottom, left:right], (height, width), window_size)
                for left, right, width in spans(tokens.shape[2], window_size)
            ],
            dim=2,
        )
        for top, bottom, height in spans(tokens.shape[1], window_size)
    ]
    return attention.proj(torch.cat(rows, dim=1))


def _attend_in_windows(attention: nn.Module, qkv: Tensor, window: tuple[int, int], window_size: int) -> Tensor:
    """Attention within equal windows that `qkv` (B, h, w, 3 * channels) consists of, without their padding."""
    num_heads, grid = attention.num_attention_heads, (qkv.shape[1] // window[0], qkv.shape[2] // window[1])
    windows = qkv.unflatten(2, (grid[1], window[1])).unflatten(1, (grid[0], window[0]))
    query, key, value = windows.transpose(2, 3).flatten(0, 2).chunk(3, dim=-1)  # each (windows, height, width, C)
    query = _pool(query, attention.query_stride)
    pooled = query.shape[1:3]
    query, key, value = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask, num_padded = None, window_size**2 - window[0] * window[1]
    if num_padded > 0:
        bias = attention.qkv.bias.to(key.dtype).view(3, 1, num_heads, 1, -1).expand(-1, len(key), -1, -1, -1)
        key, value = torch.cat((key, bias[1]), dim=2), torch.cat((value, bias[2]), dim=2)
        mask = F.pad(key.new_zeros(1, 1, 1, key.shape[2] - 1), (0, 1), value=math.log(num_padded))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scale)
    attended = attended.transpose(1, 2).flatten(2).unflatten(1, pooled).unflatten(0, (len(qkv), *grid))
    return attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _pool(tokens: Tensor, stride: Sequence[int] | None) -> Tensor:
    """Maximum over squares of tokens (B, h, w, channels), as between Hiera's stages."""
    if stride is None:
        return tokens
    return F.max_pool2d(tokens.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)
