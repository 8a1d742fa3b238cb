from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from knowsam_monai.networks import MultiViewNet
from knowsam_monai.networks.convolution import ConvNormAct, PlainWeightGradient, check_spatial_size


def trained(block: torch.nn.Module) -> torch.nn.Module:
    """With statistics and affine parameters unlike those of a fresh batch normalization."""
    generator = torch.Generator().manual_seed(1)
    for module in block.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return block.double()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_training_is_convolution_batch_norm_and_leaky_relu(spatial_dims, kernel_size):
    block = trained(ConvNormAct(spatial_dims, 2, 3, kernel_size=kernel_size, negative_slope=0.2))
    x = torch.randn(2, 2, *([6] * spatial_dims), dtype=torch.float64)
    conv = F.conv2d if spatial_dims == 2 else F.conv3d
    y = conv(x, block.conv.weight, padding=kernel_size // 2)
    dims = (0, *range(2, y.ndim))
    y = (y - y.mean(dims, keepdim=True)) / (y.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    shape = (1, -1) + (1,) * spatial_dims
    y = y * block.adn.N.weight.view(shape) + block.adn.N.bias.view(shape)
    torch.testing.assert_close(block.train()(x), torch.where(y > 0, y, 0.2 * y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("is_dropout_on", [False, True])
def test_folded_inference_equals_the_unfolded_one_with_dropout_on_and_off(spatial_dims, is_dropout_on):
    block = trained(ConvNormAct(spatial_dims, 2, 3, dropout=0.5)).eval()
    block.adn.D.train(is_dropout_on)
    x = torch.randn(2, 2, *([6] * spatial_dims), dtype=torch.float64)
    results = []
    for forward in (lambda x: block.adn(block.conv(x)), block, torch.jit.script(block)):
        block.zero_grad()
        torch.manual_seed(0)
        y = forward(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
    for folded in results[1:]:
        torch.testing.assert_close(folded, results[0], rtol=1e-12, atol=1e-12)


def test_training_without_autograd_takes_the_batch_statistics_and_dropout():
    block = trained(ConvNormAct(2, 2, 3, dropout=0.5)).train()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    expected = block(x)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(block(x), expected)


def test_normalization_runs_when_it_is_in_train_mode_itself():
    block, calls = ConvNormAct(2, 2, 3), []
    block.adn.N.register_forward_hook(lambda module, *args: calls.append(module.training))
    block.eval()(torch.rand(2, 2, 6, 6))
    block.train()(torch.rand(2, 2, 6, 6))
    block.adn.N.eval()  # frozen, in a network that trains
    block(torch.rand(2, 2, 6, 6))
    assert calls == [True]


def test_inference_leaves_input_weights_and_statistics_alone():
    block = trained(ConvNormAct(2, 2, 3)).eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    kept_x, kept = x.clone(), {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        block(x)
    assert torch.equal(x, kept_x)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in block.state_dict().items())


def test_dropout_zeroes_single_elements_and_not_channels():
    block = ConvNormAct(2, 1, 8, dropout=0.5).train()
    zero = (block(torch.randn(4, 1, 16, 16)) == 0).float().mean(dim=(2, 3))
    assert 0.3 < zero.min() and zero.max() < 0.7


@pytest.fixture
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("fixed", [None, "x", "weight"])
def test_plain_weight_gradient_equals_that_of_torch(fixed, kernel_size):
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 6, kernel_size, kernel_size, dtype=torch.float64).to(memory_format=torch.channels_last)
    tensors = {"x": x, "weight": weight}
    learned = [tensor.requires_grad_() for name, tensor in tensors.items() if name != fixed]
    results = []
    for y in (PlainWeightGradient.apply(x, weight), F.conv2d(x, weight, padding=kernel_size // 2)):
        results.append([y, *torch.autograd.grad(y.square().sum(), learned)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_student_learns_the_same_with_plain_weight_gradients(monkeypatch):
    gradients = []
    image = torch.rand(2, 1, 64, 64)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        torch.manual_seed(0)
        network = MultiViewNet().train()
        network(image).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("change", "pays"),
    [
        ({}, True),
        ({"channels": 16}, False),
        ({"kernel_size": 1}, False),
        ({"spatial_dims": 3}, False),
        ({"dtype": torch.float64}, False),
        ({"device": "meta"}, False),
        ({"grad": False}, False),
        ({"autocast": True}, False),
        ({"capability": "AVX512"}, False),
    ],
)
def test_weight_gradient_is_plain_where_it_is_faster_only(avx2, monkeypatch, change, pays):
    case = {"channels": 32, "kernel_size": 3, "spatial_dims": 2, "dtype": torch.float32, "device": "cpu"} | change
    if "capability" in change:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: change["capability"])
    block = ConvNormAct(case["spatial_dims"], case["channels"], 8, kernel_size=case["kernel_size"])
    block.to(case["device"], case["dtype"]).train()
    x = torch.zeros(2, case["channels"], *[4] * case["spatial_dims"], dtype=case["dtype"], device=case["device"])
    taken = []
    block.adn.register_forward_pre_hook(lambda _, args: taken.append("PlainWeight" in str(args[0].grad_fn)))
    with torch.set_grad_enabled(change.get("grad", True)), torch.autocast("cpu", enabled="autocast" in change):
        block(x)
    assert taken == [pays]


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (16, 64, 32)])
def test_multiples_pass(size):
    check_spatial_size(torch.empty(1, 3, *size), divisor=16)


@pytest.mark.parametrize("size", [(24, 16), (16, 40), (16, 16, 8)])
def test_any_other_size_is_an_error_with_size_and_remedy(size):
    with pytest.raises(ValueError) as error:
        check_spatial_size(torch.empty(1, 3, *size), divisor=16)
    assert str(list(size)) in str(error.value)
    assert "multiples of 16" in str(error.value) and "DivisiblePad(k=16)" in str(error.value)


def test_the_divisor_is_the_networks():
    check_spatial_size(torch.empty(1, 3, 24, 8), divisor=8)
    with pytest.raises(ValueError, match="multiples of 8"):
        check_spatial_size(torch.empty(1, 3, 24, 12), divisor=8)
