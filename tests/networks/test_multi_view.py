from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from knowsam_monai.networks import MultiViewNet
from knowsam_monai.tensors import unstack_views
from tests.networks.test_convolution import trained
from tests.toys import with_gradient

WIDTHS = {"dissimilarity_channels": 4, "entropy_channels": 4, "logits_channels": 8}
TINY = {"channels": (4, 6, 8, 10, 12), **WIDTHS}
SHALLOW = {"channels": (4, 6), "dropout": (0, 0), "num_convs": (1, 2), **WIDTHS}  # quick to compile


def names(network: torch.nn.Module, *parts: str) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith(parts)}


def test_published_numbers_of_parameters():
    network = MultiViewNet(spatial_dims=2, in_channels=1, out_channels=4)
    counts = [sum(p.numel() for p in part.parameters()) for part in (network.unet, network.vnet, network.aggregation)]
    assert counts == [1_942_852, 3_265_732, 44_256]
    assert [round(count / 1e6, 2) for count in counts[:2]] == [1.94, 3.27]


@pytest.mark.parametrize("size", [(16, 32), (32, 16, 16)])
@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_train_form_stacks_three_views_and_eval_form_is_the_fused_one(size, num_classes):
    network = MultiViewNet(len(size), in_channels=2, out_channels=num_classes, **TINY)
    image = torch.rand(2, 2, *size)
    assert network.train()(image).shape == (2, 3, num_classes, *size)
    assert network.eval()(image).shape == (2, num_classes, *size)


def test_arguments_reach_the_parts_they_describe():
    network = MultiViewNet(in_channels=3, num_convs=(1, 1, 1, 1, 2), **{**TINY, "entropy_channels": 6})
    sizes = {name: tuple(p.shape[:2]) for name, p in network.named_parameters() if p.ndim == 4}
    assert sizes["unet.encoder.0.0.conv.weight"] == sizes["vnet.stem.0.conv.weight"] == (4, 3)
    assert [len(stage[1]) for stage in network.vnet.encoder] == [1, 1, 1, 2]
    assert sizes["aggregation.mix.conv.weight"] == (18, 18)
    widths = [sizes[f"aggregation.{name}_branch.1.conv.weight"] for name in ("entropy", "dissimilarity", "logits")]
    assert widths == [(6, 6), (4, 4), (8, 8)]


def test_views_are_stacked_in_the_order_of_their_names():
    network = MultiViewNet(dropout=(0, 0, 0, 0, 0), **TINY).double().train()
    image = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    views = dict(zip(MultiViewNet.VIEWS, unstack_views(network(image), image)))
    assert list(views) == ["fused", "unet", "vnet"]
    torch.testing.assert_close(views["unet"], network.unet(image), rtol=0, atol=1e-12)
    torch.testing.assert_close(views["vnet"], network.vnet(image), rtol=0, atol=1e-12)
    fused = network.aggregation(views["unet"], views["vnet"])
    torch.testing.assert_close(views["fused"], fused, rtol=0, atol=1e-12)


def test_eval_form_is_the_aggregation_of_the_eval_forms():
    network = trained(MultiViewNet(**TINY)).eval()
    image = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        fused = network.aggregation(network.unet(image), network.vnet(image))
        torch.testing.assert_close(network(image), fused, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("view", "parts"), [("fused", ("unet", "vnet", "aggregation")), ("unet", ("unet",)), ("vnet", ("vnet",))]
)
def test_loss_of_a_view_reaches_exactly_its_networks(view, parts):
    torch.manual_seed(0)
    network = MultiViewNet(**TINY).train()
    image = torch.rand(2, 1, 32, 32)
    logits = unstack_views(network(image), image)[MultiViewNet.VIEWS.index(view)]
    DiceCELoss(softmax=True, to_onehot_y=True)(logits, torch.randint(4, (2, 1, 32, 32))).backward()
    assert with_gradient(network) == names(network, *parts)


def test_sub_networks_are_plain_students_by_themselves():
    network = MultiViewNet(**TINY)
    image = torch.rand(2, 1, 32, 32)
    for part in (network.unet, network.vnet):
        for student in (part.train(), part.eval()):
            assert student(image).shape == (2, 4, 32, 32)


def test_eval_form_judges_each_row_alone_and_leaves_the_statistics():
    network = trained(MultiViewNet(**TINY)).eval()
    kept = {name: tensor.clone() for name, tensor in network.named_buffers()}
    image = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        together, alone = network(image), torch.cat([network(row[None]) for row in image])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.named_buffers())


def test_every_batch_norm_follows_the_batch_in_training():
    network = MultiViewNet(**TINY)
    kept = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network.train()(torch.rand(2, 1, 32, 32))
    assert not any(torch.equal(tensor, kept[name]) for name, tensor in network.named_buffers())


@pytest.mark.parametrize(("spatial_dims", "arguments"), [(2, {**TINY, "dropout": (0, 0, 0, 0, 0)}), (3, SHALLOW)])
def test_script_equals_python_in_both_modes(spatial_dims, arguments, tmp_path):
    network = trained(MultiViewNet(spatial_dims, **arguments))
    torch.jit.script(network).save(tmp_path / "model.ts")
    script = torch.jit.load(tmp_path / "model.ts")
    image = torch.rand(2, 1, *([16] * spatial_dims), dtype=torch.float64)
    torch.testing.assert_close(script.train()(image), copy.deepcopy(network).train()(image), rtol=0, atol=1e-12)
    script = torch.jit.load(tmp_path / "model.ts").eval()
    torch.testing.assert_close(script(image), network.eval()(image), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_scripted_networks_hold_no_object_that_torchscript_can_take_for_an_operator(spatial_dims):
    """TorchScript knows operators by their `id`, which a later object can have once the operator is freed."""
    for module in MultiViewNet(spatial_dims).modules():
        if type(module).__module__.startswith("knowsam_monai."):
            values = [value for name, value in vars(module).items() if not name.startswith("_")]
            assert {type(value) for value in values} <= {bool, int, str}


def test_student_compiles_as_one_graph_for_training():
    network = MultiViewNet(2, channels=(4, 32), dropout=(0, 0), num_convs=(1, 2), **WIDTHS).train()
    x = torch.rand(2, 1, 16, 16)
    expected = network(x)
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_onnx_export_of_torch_s_newer_exporter_equals_torch(tmp_path):
    """The exporter that the bundles use has its test in tests/zoo. At one size: torch.export's solver takes a while."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = trained(MultiViewNet(**SHALLOW)).float().eval()
    path, image = str(tmp_path / "model.onnx"), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.onnx.export(network, (image,), path, input_names=["image"], dynamo=True)
        expected = network(image).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (16, 112), (32, 32, 16)])
def test_any_multiple_of_sixteen_is_a_size(size):
    assert MultiViewNet(len(size), **TINY).eval()(torch.rand(1, 1, *size)).shape == (1, 4, *size)


def test_other_size_is_an_error_that_names_size_and_remedy_in_script_too():
    network = MultiViewNet(**TINY).eval()
    message = r"multiples of 16 but has \[100, 32\]; resize it .*, or pad it"
    with pytest.raises(ValueError, match=message):
        network(torch.rand(1, 1, 100, 32))
    with pytest.raises(torch.jit.Error, match=message):
        torch.jit.script(network)(torch.rand(1, 1, 100, 32))


@pytest.mark.parametrize(
    ("memory_format", "size"),
    [
        (torch.contiguous_format, (32, 32)),
        (torch.channels_last, (32, 32)),
        (torch.contiguous_format, (16, 16, 16)),
        (torch.channels_last_3d, (16, 16, 16)),
    ],
)
def test_memory_format_of_weights_and_image_is_free(memory_format, size):
    network = trained(MultiViewNet(len(size), in_channels=2, **TINY)).eval()
    image = torch.rand(2, 2, *size, dtype=torch.float64)
    expected = network(image)
    logits = network.to(memory_format=memory_format)(image.to(memory_format=memory_format))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_copy_keeps_weights_channels_last(spatial_dims):
    def convolutions(network):
        return [p for p in network.parameters() if p.ndim == spatial_dims + 2]

    network = MultiViewNet(spatial_dims, **TINY)
    clone = copy.deepcopy(network)
    clone.load_state_dict(network.state_dict())
    assert all(p.stride(1) == 1 for p in convolutions(network) + convolutions(clone)) and convolutions(network)


def test_inference_keeps_metadata_and_training_drops_it():
    network = MultiViewNet(**TINY)
    image = MetaTensor(torch.rand(2, 1, 32, 32), meta={"filename_or_obj": "scan.nii.gz"})
    assert type(network.train()(image)) is torch.Tensor
    with torch.no_grad():
        assert network.eval()(image).meta["filename_or_obj"] == "scan.nii.gz"


def test_the_views_start_from_different_weights_and_the_seed_fixes_them():
    torch.manual_seed(0)
    network = MultiViewNet(**TINY)
    torch.manual_seed(0)
    again = MultiViewNet(**TINY)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters()))
    image = torch.rand(1, 1, 32, 32)
    assert not torch.allclose(network.unet.eval()(image), network.vnet(image))
