"""The second view of the student: a V-Net without normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.networks.convolution import channels_last, check_spatial_size
from knowsam_monai.tensors import without_meta


class VNet(nn.Module):
    """V-Net with conv-ReLU stages, strided convolutions down, transposed convolutions up, and additive skips.

    It has no normalization and no dropout, as in the authors' code, and 3.27 M parameters with the defaults. MONAI's
    ``VNet`` is a different network: residual, normalized, and unusable in 2D with dropout.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes C; 1 for a sigmoid student.
        channels: features of each level, from full resolution down.
        num_convs: number of convolutions at each level, in encoder and decoder; one for each of ``channels``.

    Shape:
        - image: (B, in_channels, *spatial), every size a multiple of 2 ** (len(channels) - 1), 16 by default
        - output: logits (B, C, *spatial)

    Raises:
        ValueError: if ``channels`` and ``num_convs`` differ in length, or a spatial size is not such a multiple.

    Example::

        >>> VNet()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 4, 32, 32])

    Reference:
        Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation", 3DV
        2016, in the configuration of KnowSAM (arXiv:2412.13742).
    """

    @check_types
    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 4,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        num_convs: Sequence[int] = (1, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        memory_format = channels_last(spatial_dims)
        if len(num_convs) != len(channels):
            raise KnowSAMValueError(
                f"`num_convs` must be one count for each of the {len(channels)} levels of `channels` "
                f"but is {tuple(num_convs)}; give both the same length."
            )
        self.divisor = 2 ** (len(channels) - 1)
        upward = tuple(reversed(channels))
        self.stem = conv_stage(spatial_dims, in_channels, channels[0], num_convs[0])
        self.encoder = nn.ModuleList(
            nn.Sequential(
                conv_relu(spatial_dims, num_in, num_out, strides=2, kernel_size=2, padding=0),
                conv_stage(spatial_dims, num_out, num_out, count),
            )
            for num_in, num_out, count in zip(channels, channels[1:], num_convs[1:])
        )
        self.upsample = nn.ModuleList(
            conv_relu(
                spatial_dims, num_in, num_out, strides=2, kernel_size=2, padding=0, output_padding=0, is_transposed=True
            )
            for num_in, num_out in zip(upward, upward[1:])
        )
        self.decoder = nn.ModuleList(
            conv_stage(spatial_dims, num_features, num_features, count)
            for num_features, count in zip(upward[1:], reversed(num_convs[:-1]))
        )
        self.head = Conv["conv", spatial_dims](channels[0], out_channels, kernel_size=1)
        self.apply(he_initialize)
        self.to(memory_format=memory_format)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        check_spatial_size(image, self.divisor)
        x = self.stem(without_meta(image) if self.training else image)
        skips: list[torch.Tensor] = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        for upsample, stage in zip(self.upsample, self.decoder):
            x = stage(upsample(x) + skips.pop())
        return self.head(x)


def he_initialize(module: nn.Module) -> None:
    """He initialization, which keeps the variance of the signal through a ReLU, with zero biases."""
    if isinstance(module, nn.modules.conv._ConvNd):
        # without overlap, each output of a transposed convolution sees each input channel once
        fan_in = module.in_channels if module.transposed else module.weight[0].numel()
        nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
        nn.init.zeros_(module.bias)


def conv_stage(spatial_dims: int, in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    """``count`` 3x3 conv-ReLU blocks; the first one changes the number of channels."""
    return nn.Sequential(
        *(conv_relu(spatial_dims, in_channels if i == 0 else out_channels, out_channels) for i in range(count))
    )


def conv_relu(spatial_dims: int, in_channels: int, out_channels: int, **kwargs) -> Convolution:
    """MONAI's ``Convolution`` with ReLU and without normalization; ``kwargs`` are passed on to it."""
    return Convolution(spatial_dims, in_channels, out_channels, act=("relu", {"inplace": True}), norm=None, **kwargs)
