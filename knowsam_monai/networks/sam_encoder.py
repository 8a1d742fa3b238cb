"""SAM's image encoder without work on padded tokens: a forward that drives the submodules of `segment_anything`."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.networks.adapter import AdaptedAttention


def encode_image(encoder: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Run `segment_anything`'s ImageEncoderViT on its real tokens only.

    Upstream pads the token grid to whole windows (16 x 16 tokens to 28 x 28) and lets queries attend to the padding.
    The padding comes after the norm and is zero, so all padded tokens of a window have one key and one value, the biases
    of the projection, and differ in their relative positions alone. They fold exactly into one key whose logit is

        ``q.k_pad / sqrt(d) + logsumexp over padded positions of (rel_h + rel_w)``

    The decomposed relative positions are appended to the queries, against one-hot rows and columns in the keys, so that
    no (tokens x tokens) bias is written and `scaled_dot_product_attention` takes its fused path with gradients too.

    Args:
        encoder: ImageEncoderViT, with or without adapters, whose relative positions fit the token grid.
        image: normalised image (B, 3, H, W) of the encoder's input size, square or not.

    Returns:
        The image embedding (B, D, H / patch size, W / patch size), equal to ``encoder(image)`` up to rounding.

    Example::

        >>> from knowsam_monai.networks.sam import build_sam
        >>> encode_image(build_sam("vit_t", image_size=64).image_encoder, torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 128, 8, 8])
    """
    tokens = encoder.patch_embed(image)  # (B, h, w, channels)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    for block in encoder.blocks:
        tokens = tokens + _attend(block.attn, block.norm1(tokens), block.window_size)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return _neck(encoder.neck, tokens)


def _attend(attention: nn.Module, tokens: torch.Tensor, window_size: int) -> torch.Tensor:
    """Attention inside windows, (B, h, w, channels) to the same; a window size of 0 is global attention."""
    if isinstance(attention, AdaptedAttention):
        return attention.adapter(_attend(attention.attention, tokens, window_size))
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))  # (B, h, w, 3, heads, d)
    height, width = tokens.shape[1:3]
    window = (window_size or height, window_size or width)
    rows = []
    for top, bottom, window_height in _spans(height, window[0]):
        pieces = [
            _attend_in_windows(attention, qkv[:, top:bottom, left:right], (window_height, window_width), window)
            for left, right, window_width in _spans(width, window[1])
        ]
        rows.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2))
    return attention.proj(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))


def _spans(size: int, window: int) -> list[tuple[int, int, int]]:
    """(start, stop, real extent of a window) of the whole windows along an axis, then of the cut one."""
    whole = size - size % window
    spans = [(0, whole, window), (whole, size, size - whole)]
    return [span for span in spans if span[0] < span[1]]


def _attend_in_windows(
    attention: nn.Module, qkv: torch.Tensor, real: tuple[int, int], padded: tuple[int, int]
) -> torch.Tensor:
    """Attention inside equal windows of ``real`` tokens that upstream pads to ``padded`` ones.

    qkv is (B, rows, columns, 3, heads, d), the result (B, rows, columns, heads * d).
    """
    (height, width), num_rows, num_columns = real, qkv.shape[1] // real[0], qkv.shape[2] // real[1]
    windows = qkv.unflatten(2, (num_columns, width)).unflatten(1, (num_rows, height))
    windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, window rows, window columns, heads, height, width, d)
    batch, channels = windows.shape[1:4], windows.shape[-1]
    query, key, value = windows.flatten(1, 3)  # (windows, heads, height, width, d)
    key, value = key.flatten(2, 3), value.flatten(2, 3)  # (windows, heads, tokens, d)

    rel_h = torch.einsum("nayxd,ykd->nayxk", query, _relative_table(attention.rel_pos_h, padded[0])[:height])
    rel_w = torch.einsum("nayxd,xkd->nayxk", query, _relative_table(attention.rel_pos_w, padded[1])[:width])
    query_parts = [query * attention.scale, rel_h[..., :height], rel_w[..., :width]]
    if real != padded:
        query_parts.append(_padding_logit(rel_h, rel_w, height, width).to(query.dtype))
        _, pad_key, pad_value = attention.qkv.bias.to(key.dtype).view(3, 1, attention.num_heads, 1, channels)
        key = torch.cat((key, pad_key.expand(len(key), -1, -1, -1)), dim=2)
        value = torch.cat((value, pad_value.expand(len(value), -1, -1, -1)), dim=2)
    query = torch.cat(query_parts, dim=-1).flatten(2, 3)
    positions = _key_positions(height, width, with_padding=real != padded, like=key)
    key = torch.cat((key, positions.expand(*key.shape[:2], -1, -1)), dim=-1)
    value = F.pad(value, (0, positions.shape[-1]))  # the fused kernel wants one width for keys and values

    out = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]
    out = out.unflatten(2, real).unflatten(0, batch)  # (B, window rows, window columns, heads, height, width, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _relative_table(rel_pos: torch.Tensor, size: int) -> torch.Tensor:
    """Row q, column k: the entry for the distance q - k. (2 * size - 1, d) to (size, size, d)."""
    return rel_pos.flip(0).unfold(0, size, 1).flip(0).transpose(1, 2)


def _padding_logit(rel_h: torch.Tensor, rel_w: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Logsumexp of ``rel_h + rel_w`` over the positions outside the real ``height`` x ``width``, (..., 1).

    Outside are the rows below (all columns) and, beside the real rows, the columns to the right.
    """
    terms = []
    if height < rel_h.shape[-1]:
        terms.append(_logsumexp(rel_h[..., height:]) + _logsumexp(rel_w))
    if width < rel_w.shape[-1]:
        terms.append(_logsumexp(rel_h[..., :height]) + _logsumexp(rel_w[..., width:]))
    return terms[0] if len(terms) == 1 else torch.logaddexp(*terms)


def _logsumexp(x: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, keepdim=True)


def _key_positions(height: int, width: int, with_padding: bool, like: torch.Tensor) -> torch.Tensor:
    """What the appended query channels meet in each key: its row, its column, and whether it is the padding's key."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    positions = torch.cat((rows, columns), dim=1)
    return torch.block_diag(positions, positions.new_ones(1, 1)) if with_padding else positions


def _neck(neck: nn.Sequential, tokens: torch.Tensor) -> torch.Tensor:
    """Conv 1x1, norm, conv 3x3, norm, channels last throughout: the norms are layer norms of the tokens."""
    project, first_norm, mix, second_norm = neck
    tokens = F.linear(tokens, project.weight.flatten(1))
    tokens = layer_norm_of_channels(first_norm, tokens)
    tokens = mix(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer_norm_of_channels(second_norm, tokens).permute(0, 3, 1, 2)


def layer_norm_of_channels(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`segment_anything`'s LayerNorm2d on channels-last tokens (..., C)."""
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
