"""The first view of the student: a U-Net with batch normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.blocks import UpSample
from monai.networks.layers.factories import Conv, Pool

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.networks.convolution import ConvNormAct, channels_last, check_spatial_size
from knowsam_monai.tensors import without_meta


class UNet(nn.Module):
    """U-Net with two conv-BatchNorm-LeakyReLU blocks at each level, max pooling and transposed convolutions.

    With the defaults it has 1.94 M parameters, as in the authors' code. Theirs also has a bias in each convolution
    before a batch normalization, where it has no effect. Dropout sits between the two convolutions of an encoder
    level.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes C; 1 for a sigmoid student.
        channels: features of each level, from full resolution down.
        dropout: dropout probability of each encoder level, 0..1, as in the authors' code; one for each of ``channels``.

    Shape:
        - image: (B, in_channels, *spatial), every size a multiple of 2 ** (len(channels) - 1), 16 by default
        - output: logits (B, C, *spatial)

    Raises:
        ValueError: if ``channels`` and ``dropout`` differ in length, or a spatial size is not such a multiple.

    Example::

        >>> UNet()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 4, 32, 32])

    Reference:
        Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015, in the
        configuration of KnowSAM (arXiv:2412.13742).
    """

    @check_types
    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 4,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    ) -> None:
        super().__init__()
        memory_format = channels_last(spatial_dims)
        if len(dropout) != len(channels):
            raise KnowSAMValueError(
                f"`dropout` must be one probability for each of the {len(channels)} levels of `channels` "
                f"but is {tuple(dropout)}; give both the same length."
            )
        self.divisor = 2 ** (len(channels) - 1)
        self.pool = Pool["MAX", spatial_dims](kernel_size=2)
        self.encoder = nn.ModuleList(
            ConvPair(spatial_dims, num_in, num_out, probability)
            for num_in, num_out, probability in zip((in_channels, *channels), channels, dropout)
        )
        upward = tuple(reversed(channels))
        self.upsample = nn.ModuleList(
            UpSample(spatial_dims, num_in, num_out, mode="deconv") for num_in, num_out in zip(upward, upward[1:])
        )
        self.decoder = nn.ModuleList(ConvPair(spatial_dims, 2 * num_out, num_out) for num_out in upward[1:])
        self.head = Conv["conv", spatial_dims](channels[0], out_channels, kernel_size=3, padding=1)
        self.to(memory_format=memory_format)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        check_spatial_size(image, self.divisor)
        x = without_meta(image) if self.training else image
        skips: list[torch.Tensor] = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(x)
                x = self.pool(x)
            x = block(x)
        for upsample, block in zip(self.upsample, self.decoder):
            x = block(torch.cat((skips.pop(), upsample(x)), dim=1))
        return self.head(x)


class ConvPair(nn.Sequential):
    """Two conv-BatchNorm-LeakyReLU blocks with dropout between them."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__(
            ConvNormAct(spatial_dims, in_channels, out_channels, dropout=dropout),
            ConvNormAct(spatial_dims, out_channels, out_channels),
        )
