from __future__ import annotations

import logging

import pytest
import torch

from knowsam_monai.runs import cpu
from knowsam_monai.runs.cpu import fast_cpu_matmul


@pytest.fixture
def usual_precision():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def test_fast_route_is_taken_only_where_the_probe_is_exact(usual_precision):
    taken = fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")
    assert not taken or cpu._linear_error() <= 1e-5


@pytest.mark.parametrize("rounded", range(3))
def test_route_that_rounds_a_linear_layer_or_either_gradient_is_refused(usual_precision, monkeypatch, caplog, rounded):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return rounds(x @ weight.T, 0)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return rounds(grad @ weight, 1), rounds(grad.T @ x, 2)

    def rounds(result, which):
        return result.bfloat16().float() if which == rounded and result.dtype == torch.float32 else result

    monkeypatch.setattr(cpu.F, "linear", Rounded.apply)
    with caplog.at_level(logging.WARNING):
        assert not fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == "highest" and "off by" in caplog.text
