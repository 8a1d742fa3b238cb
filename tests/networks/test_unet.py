from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional as F

from knowsam_monai.networks import UNet
from tests.networks.test_convolution import trained
from tests.toys import with_gradient

TINY = {"channels": (4, 6, 8, 10, 12)}


def reference(network: UNet, image: torch.Tensor) -> torch.Tensor:
    """The forward pass in eval mode, layer by layer: two convolutions per level, concatenated skips."""
    convs = iter([m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)])
    norms = iter([m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    conv, pool = (F.conv2d, F.max_pool2d) if image.ndim == 4 else (F.conv3d, F.max_pool3d)
    transposed = [m for m in network.modules() if isinstance(m, (nn.ConvTranspose2d, nn.ConvTranspose3d))]
    plain = iter([m for m in convs if m not in transposed])

    def pair(x):
        for _ in range(2):
            norm = next(norms)
            x = conv(x, next(plain).weight, padding=1)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)
            x = F.leaky_relu(x, 0.01)
        return x

    levels = [pair(image)]
    for _ in range(4):
        levels.append(pair(pool(levels[-1], 2)))
    x = levels.pop()
    for up in transposed:
        x = pair(torch.cat((levels.pop(), up(x)), dim=1))
    head = next(plain)
    assert next(plain, None) is None
    return conv(x, head.weight, head.bias, padding=1)


def test_published_number_of_parameters():
    assert sum(p.numel() for p in UNet(in_channels=1, out_channels=4).parameters()) == 1_942_852  # 1.94 M


@pytest.mark.parametrize("size", [(16, 48), (16, 16, 32)])
def test_eval_form_equals_a_straight_forward(size):
    network = trained(UNet(len(size), in_channels=2, out_channels=3, **TINY)).eval()
    image = torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(image), reference(network, image), rtol=0, atol=1e-12)


def test_dropout_of_each_encoder_level_and_nowhere_else():
    network = UNet(dropout=(0.05, 0.1, 0.2, 0.3, 0.5), **TINY)
    found = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    assert found == {f"encoder.{i}.0.adn.D": p for i, p in enumerate((0.05, 0.1, 0.2, 0.3, 0.5))}


def test_training_is_random_and_inference_is_not():
    network, image = UNet(**TINY), torch.rand(2, 1, 32, 32)
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(network.eval()(image), network(image))


def test_every_parameter_gets_a_gradient():
    network = UNet(**TINY)
    network.train()(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert with_gradient(network) == {name for name, _ in network.named_parameters()}


def test_training_drops_metadata_and_inference_keeps_it():
    network = UNet(**TINY)
    image = MetaTensor(torch.rand(2, 1, 32, 32), meta={"filename_or_obj": "scan.nii.gz"})
    assert type(network.train()(image)) is torch.Tensor
    with torch.no_grad():
        logits = network.eval()(image)
    assert logits.meta["filename_or_obj"] == "scan.nii.gz"


def test_size_that_does_not_halve_evenly_is_an_error_in_script_too():
    network = UNet(channels=(4, 6, 8), dropout=(0, 0, 0))
    assert network(torch.rand(2, 1, 20, 12)).shape == (2, 4, 20, 12)
    with pytest.raises(ValueError, match=r"multiples of 4 but has \[20, 14\]"):
        network(torch.rand(2, 1, 20, 14))
    with pytest.raises(torch.jit.Error, match=r"multiples of 4 but has \[20, 14\]"):
        torch.jit.script(network)(torch.rand(2, 1, 20, 14))


def test_dropout_for_another_number_of_levels_is_an_error():
    with pytest.raises(ValueError, match=r"`dropout` must be one probability for each of the 5 levels .* \(0.1, 0.2\)"):
        UNet(dropout=(0.1, 0.2))


def test_other_than_two_or_three_dimensions_is_an_error():
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 \\(slices\\) or 3 \\(volumes\\) but is 4"):
        UNet(spatial_dims=4)
