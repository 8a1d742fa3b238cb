"""The convolution with batch normalization of U-Net and aggregation."""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution

from knowsam_monai.errors import KnowSAMValueError


def channels_last(spatial_dims: int) -> torch.memory_format:
    """The memory format in which convolutions on the CPU run 1.2 to 1.5 times faster.

    Raises:
        ValueError: if ``spatial_dims`` is neither 2 nor 3.
    """
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if spatial_dims not in formats:
        raise KnowSAMValueError(f"`spatial_dims` must be 2 (slices) or 3 (volumes) but is {spatial_dims}.")
    return formats[spatial_dims]


class ConvNormAct(Convolution):
    """Conv-BatchNorm-LeakyReLU whose normalization costs nothing at inference.

    In eval mode the normalization scales and shifts each channel by constants. They are folded into the convolution's
    weights and bias, which gives the same result up to rounding. Dropout follows its own mode, so it can be in train
    mode alone (Monte Carlo dropout). The convolution has no bias, since the normalization would remove it. The
    activation works in place, since the normalization does not need its output for its gradient.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd; the padding keeps the spatial size.
        negative_slope: negative slope of LeakyReLU.
        dropout: probability of zeroing an element; 0 for none. Being elementwise, it commutes with LeakyReLU.

    Example::

        >>> ConvNormAct(2, 1, 8)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        negative_slope: float = 0.01,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            norm="batch",
            act=("leakyrelu", {"negative_slope": negative_slope, "inplace": True}),
            dropout=dropout,
            dropout_dim=1,
            bias=False,
        )
        self.scale_shape = (out_channels,) + (1,) * (spatial_dims + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.adn.N
        if norm.training:
            return self.adn(self.conv(x))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = self.conv.weight * scale.view(self.scale_shape)
        x = self.conv._conv_forward(x, weight, norm.bias - norm.running_mean * scale)
        return self.adn.A(self.adn.D(x))
