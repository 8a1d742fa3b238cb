from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from knowsam_monai.teachers.adapter import add_adapters
from knowsam_monai.teachers.sam2_encoder import encode_sam2_image
from knowsam_monai.teachers.sam2_model import build_sam2
from tests.networks.sam_toys import randomized
from tests.teachers.sam2_toys import DIM, toy_model

transformers = pytest.importorskip("transformers", reason="SAM 2 needs the extra `sam2`")


def tiny_encoder():
    torch.manual_seed(0)
    return randomized(build_sam2("tiny").vision_encoder, std=0.05)


@pytest.mark.parametrize("size", [(256, 256), (224, 352)])  # stage 3: 16 x 16 and 14 x 22 tokens in windows of 14
def test_it_equals_transformers_with_windows_that_do_not_fit(size):
    encoder = tiny_encoder()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for ours, theirs in zip(encode_sam2_image(encoder, image), encoder(image).fpn_hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def weighted_sum(features):
    """Neither features nor gradients of a plain sum would show a wrong position."""
    weights = (torch.linspace(-1, 1, level.numel(), dtype=level.dtype).view_as(level) for level in features)
    return sum((level * weight).sum() for level, weight in zip(features, weights))


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_equal_those_of_transformers_also_through_the_padding(adapted):
    """With the biases of padded keys and values, and with adapters, which upstream's forward runs on padded tokens."""
    sam2 = toy_model()
    if adapted:
        add_adapters(sam2.vision_encoder.backbone.blocks, sam2.mask_decoder.transformer, DIM)
    encoder = sam2.vision_encoder.double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    parameters = dict(encoder.named_parameters())
    ours, theirs = (
        torch.autograd.grad(weighted_sum(features), list(parameters.values()))
        for features in (encode_sam2_image(encoder, image), encoder(image).fpn_hidden_states)
    )
    for name, one, other in zip(parameters, ours, theirs):  # upstream upsamples in float32
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_padding_costs_nothing():
    """At 256 the encoder of SAM 2.1 tiny costs what its tokens cost; `transformers` computes 28 x 28 for 16 x 16."""
    with torch.device("meta"):
        encoder, image = build_sam2("tiny").vision_encoder, torch.zeros(1, 3, 256, 256)
    gflop = []
    for encode in (encode_sam2_image, lambda encoder, image: encoder(image).fpn_hidden_states):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(encoder, image)
        gflop.append(counter.get_total_flops() / 1e9)
    assert gflop[0] < 0.8 * gflop[1], gflop
