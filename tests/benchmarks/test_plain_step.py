"""The plain reference step of the speed benchmark computes what the bundles' trainers compute."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from knowsam_monai.teachers.sam_decoder import dense_positions

ROOT = Path(__file__).parents[2]
SMALL = {"sam_variant": "stand_in", "network_def#dropout": [0.0] * 5}  # masks of dropout depend on the memory layout


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("speed")
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


def gradients(modules: list[nn.Module]) -> list[torch.Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        for module in modules
        for p in module.parameters()
        if p.requires_grad
    ]


def plain_positions(plain, dtype) -> torch.Tensor:
    """Upstream's own positions are float32 only."""
    encoder = plain.sam.prompt_encoder
    height, width = encoder.image_embedding_size
    return dense_positions(encoder).to(dtype).T.unflatten(1, (height, width))[None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_losses_and_gradients_are_those_of_the_bundles_step(
    speed, monkeypatch, tmp_path, dims, mixing, dtype, tolerance
):
    plain_step = speed.plain_step
    torch.manual_seed(0)
    options = speed.Options(device="cpu", patch=(32, 32, 32), phantom_size=48)
    if dims == 2:
        parser, num_classes, size, window, sam_size = (
            speed.acdc(options, image_size=64, **SMALL),
            4,
            (64, 64),
            (0, 1),
            64,
        )
    else:
        monkeypatch.setattr(speed, "OUTPUT", tmp_path)
        parser, num_classes, size, window = speed.left_atrium(options, **SMALL), 2, options.patch, speed.WINDOW
        sam_size = 112
    network, teacher = (parser.get_parsed_content(name) for name in ("network", "teacher"))
    randomized(network.to(dtype)), randomized(teacher.to(dtype))
    sam = teacher if dims == 2 else teacher.sam_teacher
    image, label = torch.rand(4, 1, *size, dtype=dtype), torch.randint(num_classes, (2, 1, *size)).to(dtype)
    iteration, slices = 999 if mixing else 1, None
    if dims == 3:
        slices = teacher.draw_slices(torch.zeros(4, num_classes, *size), iteration).index

    student = plain_step.Student(dims, num_classes, dropout=[0.0] * 5).to(dtype)
    plain = plain_step.SAM(num_classes, sam_size, variant="stand_in", window=window).to(dtype).eval()
    with torch.no_grad():
        copy_weights([network, sam.sam, sam.prompt], [student, plain.sam, plain.prompt])
    monkeypatch.setattr(plain.sam.prompt_encoder, "get_dense_pe", lambda: plain_positions(plain, dtype), raising=False)
    loss = plain_step.knowsam_loss(student, plain, image, label, iteration, mixing, slices)
    loss.backward()

    speed.step_of(parser, late=mixing, batch={"image": image, "label": label})()
    output = parser.get_parsed_content("train#trainer").state.output
    expected = output["loss"].detach() + output.get("mixing_loss", 0)
    assert torch.is_tensor(output.get("mixing_loss")) == mixing
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    pairs = list(zip(gradients([student, plain]), gradients([network, sam]), strict=True))
    assert len(pairs) > 100
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1e-3)


def test_plain_student_drops_out_as_the_shipped_one(speed):
    student, network = speed.plain_step.Student(), speed.acdc(speed.Options(device="cpu")).get_parsed_content("network")
    rates = [[m.p for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0] for module in (student, network)]
    assert rates[0] == rates[1] and len(rates[0]) == 5


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
