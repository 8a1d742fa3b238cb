"""SAM's image encoder without computations on padded tokens, using the submodules of `segment_anything`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.teachers.adapter import AdaptedAttention


def encode_image(encoder: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Run `segment_anything`'s ImageEncoderViT on real tokens only.

    Upstream pads the token grid to whole windows (16 x 16 tokens to 28 x 28), and queries attend to the padding. The
    padding is zero and is added after the norm, so all padded tokens of a window share one key and one value, the
    biases of the projection, and differ only in their relative positions. They are equivalent to one key with the logit

        ``q.k_pad / sqrt(d) + logsumexp over padded positions of (rel_h + rel_w)``

    The decomposed relative positions are appended to the queries, and one-hot rows and columns to the keys. This avoids
    a (tokens x tokens) bias, so `scaled_dot_product_attention` uses its fused kernels, also with gradients. Tokens are
    ordered by window, so windows are slices.

    Args:
        encoder: ImageEncoderViT, with or without adapters, with position tables of the token grid's size.
        image: normalized image (B, 3, H, W) of the encoder's input size, which need not be square.

    Returns:
        The image embedding (B, D, H / patch size, W / patch size), equal to ``encoder(image)`` up to rounding.

    Example::

        >>> from knowsam_monai.teachers.sam import build_sam
        >>> encode_image(build_sam("stand_in", image_size=64).image_encoder, torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 128, 8, 8])
    """
    tokens = encoder.patch_embed(image) + encoder.pos_embed  # (B, h, w, channels)
    grid = (tokens.shape[1], tokens.shape[2])
    window_size = max(block.window_size for block in encoder.blocks)
    order, back, layouts = _token_order(grid, window_size, tokens.device, tokens.dtype)

    tokens = tokens.flatten(1, 2).index_select(1, order)  # (B, h * w, channels), ordered by window
    for block in encoder.blocks:
        tokens = tokens + _attend(block.attn, block.norm1(tokens), layouts[block.window_size])
        tokens = tokens + block.mlp(block.norm2(tokens))
    return encoder.neck(tokens.index_select(1, back).unflatten(1, grid).permute(0, 3, 1, 2))


class _Windows(NamedTuple):
    """Windows of equal size, and the number of real tokens in each."""

    count: int
    height: int
    width: int


class _Layout(NamedTuple):
    """Positions of the tokens within their windows."""

    windows: list[_Windows]  # in the order of the tokens
    padded: tuple[int, int]  # height and width of a window, including padding
    distances: torch.Tensor  # (h * w, rows + columns) index into (rel_pos_h, rel_pos_w) for each row and column
    one_hot: torch.Tensor  # (h * w, rows + columns) encodes the token's row and column


def spans(size: int, window_size: int) -> list[tuple[int, int, int]]:
    """
    (start, stop, window size without padding) of an axis's whole windows and of its partial window.

    Args:
        size: number of tokens along the axis.
        window_size: of a padded window; 0 means one window of all tokens.

    Example::

        >>> spans(size=16, window_size=14), spans(size=16, window_size=0)
        ([(0, 14, 14), (14, 16, 2)], [(0, 16, 16)])
    """
    whole = size - size % (window_size or size)
    both = [(0, whole, window_size or size), (whole, size, size - whole)]
    return [span for span in both if span[0] < span[1]]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a tensor made in inference mode cannot take part in a later backward pass
def _token_order(
    grid: tuple[int, int], window_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, dict[int, _Layout]]:
    """
    The order of the tokens by window, the way back, and the layout of global attention (0) and of windows.

    Cached, since building and copying them would make every step wait for a GPU.
    """
    order = _window_order(grid, window_size)
    layouts = {size: _layout(order, grid, size) for size in (0, window_size)}
    layouts = {
        size: layout._replace(distances=layout.distances.to(device), one_hot=layout.one_hot.to(device, dtype))
        for size, layout in layouts.items()
    }
    return order.to(device), order.argsort().to(device), layouts


def _window_order(grid: tuple[int, int], window_size: int) -> torch.Tensor:
    """Indices into the flat token grid: whole windows, then partial ones at the right, at the bottom, and at both."""
    index = torch.arange(grid[0] * grid[1], device="cpu").view(grid)
    return torch.cat(
        [
            index[top:bottom, left:right].unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten()
            for top, bottom, height in spans(grid[0], window_size)
            for left, right, width in spans(grid[1], window_size)
        ]
    )


def _layout(order: torch.Tensor, grid: tuple[int, int], window_size: int) -> _Layout:
    windows = [
        _Windows((bottom - top) // height * ((right - left) // width), height, width)
        for top, bottom, height in spans(grid[0], window_size)
        for left, right, width in spans(grid[1], window_size)
    ]
    padded = (window_size, window_size) if window_size else grid
    offset, distances, one_hot = 0, [], []
    for position, length in zip((order // grid[1], order % grid[1]), padded):
        position = position[:, None] % length
        others = torch.arange(length, device="cpu")
        distances.append(position - others + length - 1 + offset)
        one_hot.append((position == others))
        offset += 2 * length - 1
    return _Layout(windows, padded, torch.cat(distances, dim=1), torch.cat(one_hot, dim=1))


def _attend(attention: nn.Module, tokens: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Attention within windows; keeps the shape (B, h * w, channels)."""
    if isinstance(attention, AdaptedAttention):
        return attention.adapter(_attend(attention.attention, tokens, layout))
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, h * w, d)
    relative = query @ torch.cat((attention.rel_pos_h, attention.rel_pos_w)).T
    relative = relative.gather(-1, layout.distances.expand(*query.shape[:2], -1, -1))
    query = torch.cat((query * attention.scale, relative), dim=-1)
    key = torch.cat((key, layout.one_hot.to(key.dtype).expand(*key.shape[:2], -1, -1)), dim=-1)

    sizes = [windows.count * windows.height * windows.width for windows in layout.windows]
    attended = []
    for windows, *qkv in zip(layout.windows, *(x.split(sizes, dim=2) for x in (query, key, value))):
        qkv = [x.flatten(0, 1).unflatten(1, (windows.count, -1)) for x in qkv]  # (B * heads, windows, tokens, d)
        if (windows.height, windows.width) != layout.padded:
            qkv = _with_padding_key(*qkv, attention.qkv.bias, windows, layout.padded)
        attended.append(_softmax_attention(*qkv).flatten(1, 2).unflatten(0, key.shape[:2]).transpose(1, 2))
    return attention.proj(torch.cat(attended, dim=1).flatten(2))


def _with_padding_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    windows: _Windows,
    padded: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append the key and value that represent all padded tokens of a window.

    The padding consists of the rows below the real ones and of the columns to their right.
    """
    rel_h, rel_w = query[..., -sum(padded) :].to(torch.promote_types(query.dtype, torch.float32)).split(padded, dim=-1)
    terms = []
    if windows.height < padded[0]:
        terms.append(rel_h[..., windows.height :].logsumexp(-1, True) + rel_w.logsumexp(-1, True))
    if windows.width < padded[1]:
        terms.append(rel_h[..., : windows.height].logsumexp(-1, True) + rel_w[..., windows.width :].logsumexp(-1, True))
    logit = terms[0] if len(terms) == 1 else torch.logaddexp(*terms)

    num_heads = len(bias) // (3 * value.shape[-1])
    images = len(query) // num_heads
    _, pad_key, pad_value = (
        part.repeat(images, windows.count, 1, 1) for part in bias.to(key.dtype).view(3, num_heads, 1, 1, -1)
    )
    query = torch.cat((query, logit.to(query.dtype)), dim=-1)
    key = torch.cat((F.pad(key, (0, 1)), F.pad(F.pad(pad_key, (0, sum(padded))), (0, 1), value=1.0)), dim=2)
    return query, key, torch.cat((value, pad_value), dim=2)


def _softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    channels = value.shape[-1]
    value = F.pad(value, (0, key.shape[-1] - channels))  # the fused kernels need keys and values of equal width
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]
