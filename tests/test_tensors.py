"""Class logits, and the views of a student."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import DynUNet
from torch import nn

from knowsam_monai.tensors import all_in_eval_mode, at_least_float32, class_logits, unstack_views, without_meta


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_plain_float32_logits_pass_untouched(num_classes):
    logits = torch.randn(2, num_classes, 4, 4)
    assert class_logits(logits) is logits


@pytest.mark.parametrize("spatial", [(4, 4), (2, 4, 4)])
def test_softmax_of_one_channel_is_its_sigmoid(spatial):
    logits = torch.randn(2, 1, *spatial)
    probs = class_logits(logits).softmax(dim=1)
    torch.testing.assert_close(probs[:, 1:], logits.sigmoid())
    torch.testing.assert_close(probs[:, :1], (-logits).sigmoid())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_float32_at_least(dtype, expected):
    assert class_logits(torch.zeros(1, 1, 2, 2, dtype=dtype)).dtype == expected
    assert at_least_float32(torch.zeros(1, 3, 2, 2, dtype=dtype)).dtype == expected


def test_metadata_goes_and_the_gradient_passes():
    values = torch.randn(1, 1, 2, 2, requires_grad=True)
    logits = class_logits(MetaTensor(values))
    assert type(logits) is torch.Tensor
    logits.sum().backward()
    assert torch.equal(values.grad, torch.ones(1, 1, 2, 2))


def test_plain_tensor_has_no_metadata_to_lose():
    tensor = torch.zeros(2)
    assert without_meta(tensor) is tensor


def test_script_equals_python():
    logits = torch.randn(2, 1, 4, 4).half()
    assert torch.equal(torch.jit.script(class_logits)(logits), class_logits(logits))


def test_logits_of_a_plain_network_are_their_only_view():
    pred = torch.rand(4, 3, 8, 8)
    (view,) = unstack_views(pred, torch.rand(4, 1, 8, 8))
    assert view is pred


@pytest.mark.parametrize("spatial", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("num_reference_rows", [4, 2])  # an image, a label with fewer rows
def test_stacked_views_come_apart_in_order_and_without_a_copy(spatial, num_reference_rows):
    pred = torch.rand(4, 3, 2, *spatial)
    views = unstack_views(pred, torch.rand(num_reference_rows, 1, *spatial))
    assert len(views) == 3
    for i, view in enumerate(views):
        assert torch.equal(view, pred[:, i]) and view.data_ptr() == pred[:, i].data_ptr()


def test_gradient_of_a_view_stays_in_its_part_of_the_stack():
    pred = torch.rand(2, 3, 2, 4, 4, requires_grad=True)
    unstack_views(pred, torch.rand(2, 1, 4, 4))[1].sum().backward()
    assert pred.grad.sum(dim=(0, 2, 3, 4)).tolist() == [0, 64, 0]


def test_deep_supervision_heads_of_dynunet_are_views_with_the_main_one_first():
    network = DynUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(4, 4, 4),
        norm_name="batch",
        deep_supervision=True,
        deep_supr_num=1,
    )
    image = torch.rand(2, 1, 16, 16)
    main_head = []
    network.output_block.register_forward_hook(lambda module, args, output: main_head.append(output))
    views = unstack_views(network.train()(image), image)
    assert len(views) == 2 and torch.equal(views[0], main_head[0])


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 3, 2, 1, 8, 8)])
def test_any_other_number_of_dimensions_is_an_error_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"`pred` must be logits .* but has shape \(2, .*\) with .* \(2, 1, 8, 8\)"):
        unstack_views(torch.rand(shape), torch.rand(2, 1, 8, 8))


def test_eval_mode_ends_with_what_a_network_does_in_train():
    """LoRA merges its weights in eval mode, and takes them apart in `train`."""

    class Switch(nn.Sequential):
        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)

    network = Switch(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    network[1].eval()  # a host may freeze its normalization
    with all_in_eval_mode(network):
        assert network.is_merged and not network.training
    assert not network.is_merged and [module.training for module in network.modules()] == [True, True, False]
