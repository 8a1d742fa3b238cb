"""The hybrid aggregation on arbitrary logits: equal to loops in float64, or one clear error; never NaN."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowsam_monai.networks.aggregation import SLOPE, HybridAggregation
from tests.properties import cases, few, log_softmax, pixels


def maps(logits):
    """1 - H, (B, 1, *spatial), and [Y > 0.5], (B, C, *spatial), pixel by pixel."""
    rows = [[1 + sum(math.exp(p) * p for p in log_softmax(values)), *_halves(values)] for values in pixels(logits)]
    stacked = np.array(rows).reshape(len(logits), *logits.shape[2:], -1)
    return np.moveaxis(stacked, -1, 1)[:, :1], np.moveaxis(stacked, -1, 1)[:, 1:]


def _halves(values):
    return [float(math.exp(log_prob) > 0.5) for log_prob in log_softmax(values)]


def convolved(x, weight):
    """A convolution of the same size, position by position of its kernel."""
    weight = np.asarray(weight.detach().double())
    reach = weight.shape[2] // 2
    padded = np.pad(x, [(0, 0), (0, 0)] + [(reach, reach)] * (x.ndim - 2))
    result = np.zeros((len(x), len(weight), *x.shape[2:]))
    for place in product(*(range(n) for n in weight.shape[2:])):
        window = padded[(slice(None), slice(None), *(slice(p, p + n) for p, n in zip(place, x.shape[2:])))]
        result += np.einsum("oc,bc...->bo...", weight[(slice(None), slice(None), *place)], window)
    return result


def activated(x, block, is_training):
    """Convolution, batch normalization by the batch's or the kept statistics, LeakyReLU."""
    x = convolved(x, block.conv.weight)
    norm = block.adn.N
    axes = (0, *range(2, x.ndim))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    kept = (norm.running_mean, norm.running_var)
    mean, var = (x.mean(axes), x.var(axes)) if is_training else (np.asarray(one.double()) for one in kept)
    scale, shift = (np.asarray(one.detach().double()).reshape(shape) for one in (norm.weight, norm.bias))
    x = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + norm.eps) * scale + shift
    return np.where(x > 0, x, SLOPE * x)


def expected_fusion(fuse, a, b):
    (certainty_a, halves_a), (certainty_b, halves_b) = maps(a), maps(b)
    raw = np.concatenate([np.asarray(one.double()) for one in (a, b)], axis=1)
    features = []
    for branch, x in (
        (fuse.entropy_branch, np.concatenate([certainty_a, certainty_b], axis=1)),
        (fuse.dissimilarity_branch, (halves_a == halves_b).astype(float)),
        (fuse.logits_branch, raw),
    ):
        for block in branch:
            x = activated(x, block, fuse.training)
        features.append(x)
    return convolved(activated(np.concatenate(features, axis=1), fuse.mix, fuse.training), fuse.head.weight)


def build(case, dtype):
    torch.manual_seed(case.seed)
    widths = {"dissimilarity_channels": 2, "entropy_channels": 3, "logits_channels": 2}
    fuse = HybridAggregation(len(case.spatial), case.classes, **widths)
    for name, value in fuse.state_dict().items():
        if name.endswith(("running_mean", "running_var", "N.weight", "N.bias")):
            value.uniform_(0.5, 1.5)
    return fuse.to(dtype)


@few
@given(cases(dtypes=(torch.float32, torch.float64)), st.booleans())
def test_fused_logits(case, is_training):
    fuse = build(case, case.dtype).train(is_training)
    a, b = case.logits(), case.logits()
    if is_training and case.rows * math.prod(case.spatial) == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fuse(a, b)
        return
    expected = expected_fusion(fuse, a, b)
    fused = fuse(a, b)
    assert fused.dtype == case.dtype and fused.shape == a.shape
    size = 1 + case.scale * (not is_training) + abs(expected).max()
    tolerance = 1e-4 if case.dtype == torch.float32 else 1e-9
    # a batch of nearly equal features is divided by almost nothing
    tolerance *= 300 if is_training else 1
    assert np.allclose(np.asarray(fused.detach()), expected, rtol=0, atol=tolerance * size)


@few
@given(cases(dtypes=(torch.float16, torch.bfloat16)))
def test_half_precision_is_near_and_finite(case):
    """A student in half precision: its maps stay exact, its convolutions are as accurate as their format."""
    fuse, exact = build(case, case.dtype).eval(), build(case, torch.float64).eval()
    a, b = case.logits(), case.logits()
    with torch.no_grad():
        fused, expected = fuse(a, b), exact(a.double(), b.double())
    assert fused.dtype == case.dtype and bool(fused.isfinite().all())
    precision = 2e-2 if case.dtype == torch.float16 else 2e-1
    assert torch.allclose(fused.double(), expected.as_subclass(torch.Tensor), atol=precision * (1 + case.scale))


@few
@given(cases(), st.booleans())
def test_gradient_reaches_both_and_is_finite(case, is_training):
    if case.rows * math.prod(case.spatial) == 1 or case.dtype in (torch.float16, torch.bfloat16):
        return
    fuse = build(case, case.dtype).train(is_training)
    leaves = [case.logits().detach().clone().requires_grad_() for _ in range(2)]
    fuse(*leaves).square().mean().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@few
@given(cases(dtypes=(torch.float32,)), st.data())
def test_logits_that_do_not_belong_together_are_one_error(case, data):
    fuse = build(case, case.dtype).eval()
    a, b = case.logits(), case.logits()
    axis = data.draw(st.integers(0, a.ndim - 1))
    other = torch.cat([b, b.narrow(axis, 0, 1)], dim=axis)
    with pytest.raises(ValueError, match="`logits_b` must have the shape of `logits_a`"):
        fuse(a, other)
