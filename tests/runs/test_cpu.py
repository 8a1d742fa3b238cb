from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knowsam_monai.runs import cpu
from knowsam_monai.runs.cpu import fast_cpu_matmul, match_matmul, matmul_precision
from knowsam_monai.runs.starting import end_run, start_run


@pytest.fixture
def usual_precision():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cpu._is_better.cache_clear()
    yield
    cpu._is_better.cache_clear()
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("is_faster", [True, False])
def test_fast_route_is_taken_only_if_it_is_faster_and_exact(usual_precision, monkeypatch, is_faster):
    monkeypatch.setattr(cpu, "_is_faster", lambda *_: is_faster)
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    taken = fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")
    assert cpu._largest_error() <= 1e-5 and (is_faster or not taken)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random_state)


def test_measured_once_in_a_process(usual_precision, monkeypatch):
    first, threads = fast_cpu_matmul(), torch.get_num_threads()
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(cpu, "_is_faster", None)
    torch.set_float32_matmul_precision("highest")
    assert fast_cpu_matmul() == first
    assert torch.get_float32_matmul_precision() == ("medium" if first else "highest")


@pytest.mark.parametrize("rounded", range(3))
def test_route_that_rounds_a_linear_layer_or_either_gradient_is_refused(usual_precision, monkeypatch, rounded):
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
    monkeypatch.setattr(cpu, "_is_faster", lambda *_: True)
    assert not fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("error, taken", [(1e-5, "medium"), (2e-5, "highest")])
def test_resumed_run_multiplies_as_before_if_that_is_exact_here(usual_precision, monkeypatch, caplog, error, taken):
    monkeypatch.setattr(cpu, "_largest_error", lambda: error)
    match_matmul("medium")
    assert matmul_precision() == taken
    assert len(caplog.messages) == (taken == "highest")


def test_run_on_another_gpu_than_the_first_selects_it(usual_precision, monkeypatch, tmp_path):
    """A resumed run restores the random state of the current GPU."""
    selected = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    for name in ("cuda:1", "cuda", "cpu"):
        start_run(tmp_path, tmp_path, torch.device(name), preflight=True)
        end_run()
    assert selected == [torch.device("cuda:1")]


@pytest.mark.parametrize("before", ["highest", "medium"])
def test_precision_is_as_before_after_the_run(usual_precision, monkeypatch, tmp_path, before):
    monkeypatch.setattr(cpu, "_is_better", lambda *_: True)
    fast_cpu_matmul()  # of the program
    torch.set_float32_matmul_precision(before)
    start_run(tmp_path, tmp_path, torch.device("cpu"), preflight=True, fast_matmul=True)
    assert matmul_precision() == "medium"
    end_run()
    assert matmul_precision() == before


def test_precision_that_is_set_in_both_of_torch_s_ways_stays():
    code = """
import torch
from knowsam_monai.runs.cpu import fast_cpu_matmul, match_matmul, matmul_precision
torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = "ieee", "tf32"
match_matmul("medium")
print(matmul_precision(), fast_cpu_matmul(), torch.backends.cuda.matmul.fp32_precision)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["None", "False", "tf32"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_reused_without_page_faults_even_above_two_gigabytes():
    code = """
import ctypes, resource
from knowsam_monai.runs.cpu import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes, libc.memset.argtypes = [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def touch(size, above):
    block, reserved = libc.malloc(size), libc.malloc(above)  # the second one is never written to
    libc.memset(block, 1, size)
    libc.free(block)
    libc.free(reserved)
keep_freed_memory()
touch(2**26, 9 * 2**28)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch(2**26, 9 * 2**28)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1000


@pytest.mark.parametrize("name", ["train", "inference", "evaluate"])
@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
def test_every_run_of_a_bundle_keeps_freed_memory_from_its_first_step(bundle, name):
    config = json.loads((Path(__file__).parents[2] / "bundles" / bundle / "configs" / f"{name}.json").read_text())
    first = next(step["_target_"] for step in config["run"] if isinstance(step, dict))
    assert first == f"knowsam_monai.runs.{'start_run' if name == 'train' else 'keep_freed_memory'}"
