"""Adapters: small trainable bottlenecks that wrap SAM's frozen modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

ADAPTER_RATIO = 0.25  # hidden width of an adapter, as a fraction of its input
MLP_ADAPTER_SCALE = 0.5  # weight of the adapter beside an MLP


class Adapter(nn.Module):
    """A bottleneck that starts as the identity (with skip) or as zero (without).

    ``A(x) = W_2 GELU(W_1 x + b_1) + b_2 (+ x)`` with ``W_2 = 0, b_2 = 0`` at the start, so adapters do not change a
    network's output before training. The authors' code initializes both layers at random.

    Args:
        dim: C, the number of channels of input and output.
        skip: whether to add the input to the output.

    Shape:
        - x: (..., C)
        - output: (..., C)

    Example::

        >>> tokens = torch.randn(2, 16, 64)
        >>> torch.equal(Adapter(dim=64, skip=True)(tokens), tokens)
        True

    Reference:
        Wu et al., Medical SAM Adapter, arXiv:2304.12620, figure 2.
    """

    def __init__(self, dim: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.down = nn.Linear(dim, int(dim * ADAPTER_RATIO))
        self.up = nn.Linear(int(dim * ADAPTER_RATIO), dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.up(F.gelu(self.down(x)))
        return x + change if self.skip else change


class AdaptedAttention(nn.Module):
    """SAM's attention (after its output projection, before the residual sum) followed by an adapter with skip.

    ``y = A(attention(...))``

    Args:
        attention: the module to wrap; it receives the arguments of the call. If it returns its weights too, as those
            of `transformers` do, they are passed on.
        dim: number of output channels.

    Shape:
        - input: as ``attention`` takes it
        - output: (..., dim)

    Example::

        >>> attention = AdaptedAttention(nn.Linear(8, 8), dim=8)
        >>> attention(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.attention = attention
        self.adapter = Adapter(dim, skip=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.attention(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.adapter(output[0]), *output[1:])
        return self.adapter(output)


class AdaptedMLP(nn.Module):
    """SAM's MLP with an adapter in parallel.

    ``y = mlp(x) + 0.5 A(x)``, or ``mlp(x) + 0.5 A(norm(x))`` for an MLP that normalizes its input itself.

    Args:
        mlp: the module to wrap; its layer norm, if it begins with one, is ``mlp.norm``, as in timm's TinyViT.
        dim: number of input and output channels.

    Shape:
        - x: (..., dim)
        - output: (..., dim)

    Example::

        >>> mlp = AdaptedMLP(nn.Linear(8, 8), dim=8)
        >>> mlp(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, mlp: nn.Module, dim: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.adapter = Adapter(dim, skip=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = getattr(self.mlp, "norm", None)
        normalized = norm(x) if isinstance(norm, nn.LayerNorm) else x
        return torch.add(self.mlp(x), self.adapter(normalized), alpha=MLP_ADAPTER_SCALE)


def add_adapters(blocks: Iterable[nn.Module], transformer: nn.Module, dim: int) -> None:
    """Wrap the attentions and MLPs of a SAM or SAM 2 in place.

    Each encoder block (in MobileSAM, each with attention) gets an adapter after its attention and one parallel to its
    MLP. Each decoder layer gets one after each of its three attentions and one parallel to its MLP. The decoder's final
    attention gets one too. The forwards of this package and upstream's all run them.

    Args:
        blocks: of the image encoder, with their weights loaded; wrapping renames their parameters. Empty for an encoder
            without adapters.
        transformer: of the mask decoder.
        dim: number of the transformer's channels.

    Example::

        >>> from knowsam_monai.teachers.sam import build_sam
        >>> sam = build_sam("stand_in", image_size=64)
        >>> add_adapters(sam.image_encoder.blocks, sam.mask_decoder.transformer, dim=128)
        >>> type(sam.image_encoder.blocks[0].mlp).__name__
        'AdaptedMLP'
    """
    for block in blocks:
        width = block.attn.proj.out_features
        block.attn = AdaptedAttention(block.attn, width)
        block.mlp = AdaptedMLP(block.mlp, width)
    for layer in transformer.layers:
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            setattr(layer, name, AdaptedAttention(getattr(layer, name), dim))
        layer.mlp = AdaptedMLP(layer.mlp, dim)
    transformer.final_attn_token_to_image = AdaptedAttention(transformer.final_attn_token_to_image, dim)
