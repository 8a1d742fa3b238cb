"""The plain reference step of the speed benchmark computes what the bundles' trainers compute."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from knowsam_monai.data import write_phantom
from knowsam_monai.teachers.sam_decoder import dense_positions

ROOT = Path(__file__).parents[2]
CHANNELS = [4, 8, 8, 16, 16]
SMALL = {"sam_variant": "stand_in", "network_def#dropout": [0.0] * 5}  # masks of dropout depend on the memory layout


@pytest.fixture
def speed(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("speed")
    monkeypatch.setattr(module, "OUTPUT", tmp_path)
    monkeypatch.setattr(module, "start_run", lambda *args, **kwargs: None)  # of a process of its own
    return module


def randomized(module: nn.Module) -> nn.Module:
    """Adapters start at zero, where many gradients vanish."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def copy_weights(sources: list[nn.Module], targets: list[nn.Module]) -> None:
    pairs = zip(*([t for module in modules for t in module.state_dict().values()] for modules in (sources, targets)))
    for source, target in pairs:
        assert source.shape == target.shape
        target.copy_(source)


def gradients(parameters) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters if p.requires_grad]


def plain_positions(plain, dtype) -> torch.Tensor:
    """Upstream's own positions are float32 only."""
    encoder = plain.sam.prompt_encoder
    height, width = encoder.image_embedding_size
    return dense_positions(encoder).to(dtype).T.unflatten(1, (height, width))[None]


@pytest.mark.parametrize(("dims", "mixing"), [(2, False), (2, True), (3, True)])
def test_losses_and_gradients_are_those_of_the_bundles_step(speed, monkeypatch, tmp_path, dims, mixing):
    plain_step, dtype, tolerance = speed.plain_step, torch.float64, 1e-6  # MONAI's Dice has float32 one-hot labels
    torch.manual_seed(0)
    options, size = speed.Options(device="cpu", patch=(16, 16, 16), phantom_size=32), 32
    iteration = 999 if mixing else 1
    if dims == 2:
        counts = {"num_labeled": 1, "num_unlabeled": 1, "num_validation": 1, "num_test": 0}
        data = {
            "dataset_dir": str(write_phantom(tmp_path / "phantom", max_size=32, **counts)),
            "labeled_patients": "$None",
        }
        parser = speed.acdc(options, image_size=size, **data, **{"network_def#channels": CHANNELS}, **SMALL)
        num_classes, shape, window = 4, (size, size), (0, 1)
    else:
        parser = speed.left_atrium(options, sam_image_size=size, channels=CHANNELS, **SMALL)
        num_classes, shape, window = 2, options.patch, speed.WINDOW
    network, teacher = (parser.get_parsed_content(name) for name in ("network", "teacher"))
    randomized(network.to(dtype)), randomized(teacher.to(dtype))
    sam = teacher if dims == 2 else teacher.sam_teacher
    image, label = torch.rand(4, 1, *shape, dtype=dtype), torch.randint(num_classes, (2, 1, *shape)).to(dtype)
    slices = None if dims == 2 else teacher.draw_slices(torch.zeros(4, num_classes, *shape), iteration).index

    student = plain_step.Student(dims, num_classes, CHANNELS, dropout=[0.0] * 5).to(dtype)
    plain = plain_step.SAM(num_classes, size, variant="stand_in", window=window).to(dtype).eval()
    with torch.no_grad():
        copy_weights([network, sam.sam, sam.prompt], [student, plain.sam, plain.prompt])
    monkeypatch.setattr(plain.sam.prompt_encoder, "get_dense_pe", lambda: plain_positions(plain, dtype), raising=False)
    loss = plain_step.knowsam_loss(student, plain, image, label, iteration, mixing, slices)
    loss.backward()

    kept = {}  # the teacher's gradients are cleared after its step
    for name, module in (("optimizer", network), ("sam_optimizer", sam)):
        parser.get_parsed_content(name).register_step_pre_hook(
            lambda *_, module=module: kept.update({module: gradients(module.parameters())})
        )
    speed.step_of(parser, late=mixing, batch={"image": image, "label": label})()
    output = parser.get_parsed_content("train#trainer").state.output
    expected = output["loss"].detach() + output.get("mixing_loss", 0)
    assert ("mixing_loss" in output) == mixing
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for module, plain_module in ((network, student), (sam, plain)):
        largest = max(gradient.abs().max() for gradient in kept[module])
        assert largest > 1e-4
        for ours, theirs in zip(gradients(plain_module.parameters()), kept[module], strict=True):
            assert (ours - theirs).abs().max() <= tolerance * largest


def test_plain_student_drops_out_as_the_shipped_one(speed):
    student, network = speed.plain_step.Student(), speed.acdc(speed.Options(device="cpu")).get_parsed_content("network")
    rates = [[m.p for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0] for module in (student, network)]
    assert rates[0] == rates[1] and len(rates[0]) == 5


@pytest.mark.parametrize(
    ("precision", "expected"), [("default", ("medium", True)), ("fp32", ("highest", False)), ("tf32", ("high", True))]
)
def test_speed_changes_the_precision_of_a_gpu_only_if_told_to(speed, monkeypatch, precision, expected):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with warnings.catch_warnings():
            speed.prepare(speed.Options(device="cuda:0", precision=precision))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_speed_prints_a_ratio_for_rows_in_processes_of_their_own():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/speed.py", "inference", "--rounds", "2", "--precisions", "fp32"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[1:-1]]
    assert line[:2] == ["inference, 9 slices, fp32", "plain"]
    fast, slow = (float(value) for value in line[2].split(" / "))
    assert 0 < fast <= slow and line[4].endswith("times as fast")
    assert 0 < float(line[5]) and 0 < float(line[8]) == pytest.approx(float(line[9]), rel=0.05)
