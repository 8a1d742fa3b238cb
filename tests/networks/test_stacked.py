from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.networks import StackedNetworks, UNet


def pair(spatial_dims=2):
    small = {"spatial_dims": spatial_dims, "channels": (4, 8), "dropout": (0, 0)}
    return StackedNetworks([UNet(**small), UNet(**small)])


def test_two_networks_built_one_after_another_differ():
    first, second = pair().networks
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in weights if a.ndim > 1)


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_train_mode_stacks_the_logits_in_order(size):
    network, image = pair(spatial_dims=len(size)).train(), torch.rand(2, 1, *size)
    pred = network(image)
    assert pred.shape == (2, 2, 4, *size)
    for view, one in zip(pred.unbind(1), network.networks):
        assert torch.equal(view, one(image))


@pytest.mark.parametrize("scripted", [False, True])
def test_eval_mode_gives_the_logits_of_the_first_network_alone(scripted):
    network, image = pair().eval(), torch.rand(2, 1, 8, 8)
    expected = network.networks[0](image)
    deployed_network = torch.jit.script(network) if scripted else network
    torch.testing.assert_close(deployed_network(image), expected)
    assert deployed_network.train()(image).shape == (2, 2, 4, 8, 8)


def test_bad_arguments_are_one_clear_error():
    conv = nn.Conv2d(1, 2, 1)
    with pytest.raises(ValueError, match="must not share parameters"):
        StackedNetworks([conv, conv])
    with pytest.raises(ValueError, match="one network or more"):
        StackedNetworks([])
