from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knowsam_monai.networks import HybridAggregation
from tests.networks.test_convolution import trained
from tests.toys import with_gradient


def branch_inputs(
    network: HybridAggregation, logits_a: torch.Tensor, logits_b: torch.Tensor
) -> dict[str, torch.Tensor]:
    seen = {}
    for name in ("entropy", "dissimilarity", "logits"):
        module = getattr(network, f"{name}_branch")
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0].detach()))
    network(logits_a, logits_b)
    return seen


def reference(network: HybridAggregation, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """Eq. 1 to 3 in training, term by term, with the paper's epsilon."""
    conv = F.conv2d if logits_a.ndim == 4 else F.conv3d

    def cbl(x, block):
        x = conv(x, block.conv.weight, padding=block.conv.kernel_size[0] // 2)
        return F.leaky_relu(F.batch_norm(x, None, None, block.adn.N.weight, block.adn.N.bias, training=True), 0.2)

    probs = [logits.softmax(1) for logits in (logits_a, logits_b)]
    entropies = [-sum(p[:, c] * torch.log(p[:, c] + 1e-6) for c in range(p.shape[1])).unsqueeze(1) for p in probs]
    dissimilarity = torch.logical_xor(probs[0] > 0.5, probs[1] > 0.5).double()
    inputs = (1 - torch.cat(entropies, 1), 1 - dissimilarity, torch.cat((logits_a, logits_b), 1))
    branches = (network.entropy_branch, network.dissimilarity_branch, network.logits_branch)
    features = [cbl(cbl(x, branch[0]), branch[1]) for x, branch in zip(inputs, branches)]
    return conv(cbl(torch.cat(features, 1), network.mix), network.head.weight, padding=1)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("size", [(6, 8), (4, 6, 4)])
def test_equals_the_equations(num_classes, size):
    network = trained(HybridAggregation(len(size), num_classes)).train()
    logits = [3 * torch.randn(2, num_classes, *size, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(network(*logits), reference(network, *logits), rtol=0, atol=1e-4)  # the epsilon's share


def test_published_widths_and_no_biases():
    network = HybridAggregation(num_classes=4)
    shapes = {n: tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert shapes == {
        "entropy_branch.0.conv": (16, 2, 3, 3),
        "entropy_branch.1.conv": (16, 16, 1, 1),
        "dissimilarity_branch.0.conv": (16, 4, 3, 3),
        "dissimilarity_branch.1.conv": (16, 16, 1, 1),
        "logits_branch.0.conv": (32, 8, 3, 3),
        "logits_branch.1.conv": (32, 32, 1, 1),
        "mix.conv": (64, 64, 3, 3),
        "head": (4, 64, 3, 3),
    }
    assert all(m.bias is None for m in network.modules() if isinstance(m, nn.Conv2d))


def test_branches_see_certainty_agreement_and_raw_logits():
    # three pixels: A sure of class 0, B of class 1; both sure of class 0; A undecided, B sure of class 1
    logits_a = torch.tensor([[50.0, 50.0, 0.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    logits_b = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 50.0]]).view(1, 2, 1, 3)
    seen = branch_inputs(HybridAggregation(num_classes=2).eval(), logits_a, logits_b)
    log2 = 0.6931472
    expected = torch.tensor([[1, 1, 1 - log2], [1, 1, 1]]).view(1, 2, 1, 3)
    torch.testing.assert_close(seen["entropy"], expected)
    assert seen["dissimilarity"].flatten(1).tolist() == [[0, 1, 1, 0, 1, 0]]  # undecided is in no class: 0.5 > 0.5
    assert torch.equal(seen["logits"], torch.cat((logits_a, logits_b), dim=1))


def test_gradient_reaches_both_networks_through_logits_and_through_entropies_but_not_through_dissimilarity():
    for name, reaches in (("logits", True), ("entropy", True), ("dissimilarity", False)):
        network = HybridAggregation(num_classes=3).double()
        for other in {"logits", "entropy", "dissimilarity"} - {name}:
            getattr(network, f"{other}_branch")[1].adn.N.weight.data.zero_()  # shuts the branch
        logits = [torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        network(*logits).square().sum().backward()
        assert [x.grad is not None and x.grad.abs().sum().item() > 0 for x in logits] == [reaches, reaches], name


def test_every_parameter_gets_a_gradient():
    network = HybridAggregation(num_classes=3)
    network(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert with_gradient(network) == {name for name, _ in network.named_parameters()}


def test_ends_in_a_plain_convolution():
    network = HybridAggregation(num_classes=2).train()
    scaled = HybridAggregation(num_classes=2).train()
    scaled.load_state_dict(network.state_dict())
    scaled.head.weight.data.mul_(-7)
    logits = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(scaled(*logits), -7 * network(*logits), rtol=1e-4, atol=1e-4)


def test_inference_judges_each_row_alone_and_leaves_the_statistics():
    network = trained(HybridAggregation(num_classes=3)).eval()
    kept = {name: tensor.clone() for name, tensor in network.named_buffers()}
    logits = [torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        together = network(*logits)
        for row in range(3):
            alone = network(*(x[row : row + 1] for x in logits))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.named_buffers())


def test_one_channel_is_taken_as_two_classes():
    torch.manual_seed(0)
    logits_a, logits_b = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    seen = branch_inputs(HybridAggregation(num_classes=1).eval(), logits_a, logits_b)
    p = logits_a.sigmoid()
    torch.testing.assert_close(seen["entropy"][:, :1], 1 + p * p.log() + (1 - p) * (1 - p).log())
    agreement = ((logits_a > 0) == (logits_b > 0)).float()
    assert torch.equal(seen["dissimilarity"], agreement.expand(-1, 2, -1, -1))


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (2, 3, 8, 8), (2, 2, 8, 4)])
def test_logits_that_do_not_belong_together_are_an_error(shape):
    with pytest.raises(ValueError, match="`logits_b` must have the shape of `logits_a`"):
        HybridAggregation(num_classes=2)(torch.zeros(2, 2, 8, 8), torch.zeros(shape))


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32_under_autocast_and_as_a_whole(autocast):
    torch.manual_seed(0)
    network = trained(HybridAggregation(num_classes=2)).float().eval()
    logits = torch.randn(1, 2, 8, 8).bfloat16(), torch.randn(1, 2, 8, 8).bfloat16()
    expected = network(*(x.float() for x in logits))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fused = (network if autocast else network.bfloat16())(*logits)
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.float(), expected, rtol=0.1, atol=0.1)
