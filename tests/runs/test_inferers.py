from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from knowsam_monai.runs.inferers import AutocastInferer


def test_logits_are_computed_in_bfloat16_and_come_back_in_float32():
    seen = []
    network = nn.Conv2d(1, 2, 3)
    network.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    assert AutocastInferer()(torch.rand(1, 1, 8, 8), network).dtype == torch.float32
    assert AutocastInferer(dtype=None)(torch.rand(1, 1, 8, 8), network).dtype == torch.float32
    assert AutocastInferer(torch.float16)(torch.rand(1, 1, 8, 8), network).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32, torch.float16]


def test_other_inferer_runs_under_autocast():
    network = nn.Conv2d(1, 2, 3, padding=1)
    image = torch.rand(1, 1, 16, 16)
    windows = AutocastInferer(inferer=SlidingWindowInferer(roi_size=8, overlap=0))(image, network)
    assert windows.shape == (1, 2, 16, 16)


@pytest.mark.parametrize(
    ("kernel", "size", "is_right"),
    [
        (3, (1, 4, 4), True),
        (3, (2, 4, 4), False),
        (3, (3, 4, 4), True),
        (5, (4, 6, 6), False),
        (5, (5, 6, 6), True),
        (5, (6, 1, 6), False),
        (5, (6, 6, 1), True),
    ],
)
def test_volume_too_shallow_for_a_right_gradient_is_an_error(kernel, size, is_right):
    network = nn.Sequential(nn.Conv3d(2, 4, kernel, padding="same"))
    image = torch.rand(1, 2, *size)
    inferer = AutocastInferer()
    if not is_right:
        with pytest.raises(ValueError, match=r"`image_size` must give `0`, a convolution with .* but gives \("):
            inferer(image, network)
        with torch.no_grad():
            assert inferer(image, network).shape[2:] == size
    else:
        logits = inferer(image, network)
        logits.sum().backward()
        gradient = network[0].weight.grad.clone()
        network.zero_grad()
        network(image).sum().backward()
        torch.testing.assert_close(gradient, network[0].weight.grad, rtol=0.05, atol=0.05 * gradient.abs().max().item())
    assert not network[0]._forward_pre_hooks


def test_each_size_of_a_volume_is_checked():
    inferer, network = AutocastInferer(), nn.Conv3d(1, 1, 3, padding="same")
    inferer(torch.rand(1, 1, 4, 4, 4), network)
    with pytest.raises(ValueError, match="an input at least as deep as its kernel but gives"):
        inferer(torch.rand(1, 1, 2, 4, 4), network)
