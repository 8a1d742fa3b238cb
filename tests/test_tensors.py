from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from knowsam_monai.tensors import at_least_float32, class_logits, without_meta


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
