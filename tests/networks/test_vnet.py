from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional as F

from knowsam_monai.networks import VNet
from tests.toys import with_gradient

TINY = {"channels": (4, 6, 8, 10, 12)}


def reference(network: VNet, image: torch.Tensor) -> torch.Tensor:
    """The forward pass layer by layer: 1 to 3 convolutions per level, strided down, transposed up, added skips."""
    down, up = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[image.ndim - 2]
    convs = [m for m in network.modules() if isinstance(m, down)]
    ups = iter([m for m in network.modules() if isinstance(m, up)])
    same = iter([m for m in convs if m.kernel_size[0] == 3])
    strided = iter([m for m in convs if m.kernel_size[0] == 2])

    def stage(x, count):
        for _ in range(count):
            x = F.relu(next(same)(x))
        return x

    levels = [stage(image, 1)]
    for count in (2, 3, 3, 3):
        levels.append(stage(F.relu(next(strided)(levels[-1])), count))
    x = levels.pop()
    for count in (3, 3, 2, 1):
        x = stage(F.relu(next(ups)(x)) + levels.pop(), count)
    assert next(same, None) is None
    return convs[-1](x)


def test_published_number_of_parameters():
    assert sum(p.numel() for p in VNet(in_channels=1, out_channels=4).parameters()) == 3_265_732  # 3.27 M


@pytest.mark.parametrize("size", [(16, 48), (16, 16, 32)])
def test_both_forms_equal_a_straight_forward(size):
    network = VNet(len(size), in_channels=2, out_channels=3, **TINY).double()
    image = torch.randn(2, 2, *size, dtype=torch.float64)
    expected = reference(network, image)
    for form in (network.train(), network.eval(), torch.jit.script(network)):
        torch.testing.assert_close(form(image), expected, rtol=0, atol=1e-12)


def test_no_normalization_and_no_dropout():
    kinds = {type(m).__name__ for m in VNet(**TINY).modules() if not list(m.children())}
    assert kinds == {"Conv2d", "ConvTranspose2d", "ReLU"}


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = VNet(**TINY)
    network(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert with_gradient(network) == {name for name, _ in network.named_parameters()}


def test_training_drops_metadata_and_inference_keeps_it():
    network = VNet(**TINY)
    image = MetaTensor(torch.rand(2, 1, 32, 32), meta={"filename_or_obj": "scan.nii.gz"})
    assert type(network.train()(image)) is torch.Tensor
    assert network.eval()(image).meta["filename_or_obj"] == "scan.nii.gz"


def test_size_that_does_not_halve_evenly_is_an_error():
    with pytest.raises(ValueError, match=r"multiples of 16 but has \[16, 24\]"):
        VNet(**TINY)(torch.rand(2, 1, 16, 24))


def test_convolution_counts_for_another_number_of_levels_are_an_error():
    with pytest.raises(ValueError, match=r"`num_convs` must be one count for each of the 5 levels .* \(1, 2\)"):
        VNet(num_convs=(1, 2))
