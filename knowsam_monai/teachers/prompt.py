"""The learnable prompt: sparse prompt tokens for each class, predicted from SAM's image embedding."""

from __future__ import annotations

import torch
import torch.nn as nn

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import check_counts


class LearnablePrompt(nn.Module):
    """Predict prompt tokens of each class from the image embedding, independently for each image.

    ``tokens = W GELU(V LN(mean(trunk(E))) + v) + b``. The trunk, two 3x3 Conv-GroupNorm-GELU blocks of stride 2, is
    shared by all classes; only ``W`` and ``b`` are per class. With 4 classes and 2 tokens of 256 channels it has 1.0 M
    parameters. The authors' code has a head of 5.6 M for each class (22 M). Its batch norms couple labeled and
    unlabeled rows, and its pooling requires 4 x 4 tokens; this module accepts any token grid from 1 x 1.

    Args:
        num_classes: C, background included.
        embed_dim: D, channels of the image embedding and of a prompt token.
        num_tokens: prompt tokens of each class (2 in the paper).

    Shape:
        - embedding: (B, D, h, w)
        - output: (B, C, num_tokens, D)

    Raises:
        ValueError: if a count is not a whole number or is below 1.

    Example::

        >>> prompt = LearnablePrompt(num_classes=4, embed_dim=256)
        >>> prompt(torch.zeros(2, 256, 16, 16)).shape
        torch.Size([2, 4, 2, 256])

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 6 and 7.
    """

    @check_types
    def __init__(self, num_classes: int, embed_dim: int = 256, num_tokens: int = 2) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, num_tokens=num_tokens)
        self.shape = (num_classes, num_tokens, embed_dim)
        width = embed_dim // 2
        self.trunk = nn.Sequential(*_halve(embed_dim, width), *_halve(width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, embed_dim), nn.GELU())
        self.tokens = nn.Linear(embed_dim, num_classes * num_tokens * embed_dim)
        nn.init.normal_(self.tokens.bias)  # classes start different, on the scale of SAM's own prompt embeddings

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        features = self.trunk(embedding).mean(dim=(2, 3))
        return self.tokens(self.head(self.norm(features))).unflatten(-1, self.shape)


def _halve(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return convolution, nn.GroupNorm(num_groups=1, num_channels=out_channels), nn.GELU()
