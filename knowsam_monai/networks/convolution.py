"""What the sub-networks share: memory format, sizes, and the convolution with batch normalization."""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch.autograd.function import once_differentiable

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


def check_spatial_size(image: torch.Tensor, divisor: int) -> None:
    """Raise a clear error if an image cannot be halved evenly down to the deepest level.

    TorchScript can compile this function. Tracing skips it, since a trace fixes the sizes anyway.

    Args:
        image: (B, channels, *spatial).
        divisor: every spatial size must be a multiple of it; 2 ** (number of levels - 1).

    Raises:
        ValueError: if a spatial size is not a multiple of ``divisor``.

    Example::

        >>> check_spatial_size(torch.zeros(1, 1, 32, 48), divisor=16)
    """
    if torch.jit.is_tracing():
        return
    for size in image.shape[2:]:
        if size % divisor != 0:
            raise KnowSAMValueError(
                f"`image` must have spatial sizes that are multiples of {divisor} but has {list(image.shape[2:])}; "
                f"resize it (`image_size` of a bundle), or pad it with monai.transforms.DivisiblePad(k={divisor})."
            )


class PlainWeightGradient(torch.autograd.Function):
    """A 2D convolution of stride 1 without bias, whose weight gradient is computed from plain copies of its tensors.

    oneDNN's AVX2 kernel of this gradient reads the image once for each pair of 8 input and 8 output channels. In
    channels-last each read passes over all channels, so beyond the size of the cache it takes up to five times as
    long as in the plain layout. Output and input gradient are faster in channels-last.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        padding = [weight.shape[-1] // 2] * 2

        def gradients(*tensors: torch.Tensor, mask: list[bool]) -> tuple[torch.Tensor | None, ...]:
            return torch.ops.aten.convolution_backward(
                *tensors, None, [1, 1], padding, [1, 1], False, [0, 0], 1, output_mask=mask
            )

        grad_weight = None
        if needs_weight:  # first, so that its copies are gone before there is another gradient
            plain = (tensor.contiguous() for tensor in (grad, x, weight))
            grad_weight = gradients(*plain, mask=[False, True, False])[1]
        return gradients(grad, x, weight, mask=[True, False, False])[0] if needs_x else None, grad_weight

    @staticmethod
    def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether it is faster than torch's convolution, where both give the same result.

        Measured for the shipped networks, 2D and 3D, on a CPU with AVX-512, and there with oneDNN limited to AVX2: only
        with AVX2, in float32, for slices and kernels that see 32 channels or more. Elsewhere the copies cost more than
        they save.
        """
        return (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and x.dtype == torch.float32
            and x.ndim == 4
            and weight.shape[1] >= 32
            and weight.shape[-1] > 1
            and torch.is_grad_enabled()
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
            and not torch.is_autocast_enabled("cpu")
        )


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.adn.N
        if norm.training:
            if not torch.jit.is_scripting():
                if PlainWeightGradient.pays(x, self.conv.weight):
                    return self.adn(PlainWeightGradient.apply(x, self.conv.weight))
            return self.adn(self.conv(x))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = self.conv.weight * scale.view([-1] + [1] * (self.conv.weight.dim() - 1))
        x = self.conv._conv_forward(x, weight, norm.bias - norm.running_mean * scale)
        return self.adn.A(self.adn.D(x))
