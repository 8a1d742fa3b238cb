from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.gate import TeacherGate


@pytest.mark.parametrize(
    ("student", "teacher", "weight"),
    [(0.6, 0.7, 1.0), (0.6, 0.6, 1.0), (0.6, 0.55, 0.5), (0.6, 0.5, 0.0), (0.6, 0.1, 0.0), (0.0, 0.0, 0.0)],
)
def test_weight_falls_linearly_to_zero_over_the_tolerance(student, teacher, weight):
    gate = TeacherGate("validation", tolerance=0.1)
    gate.update(student, teacher)
    assert gate.weight.item() == pytest.approx(weight, abs=1e-6)


def test_gate_is_shut_until_the_first_measurement_and_open_without_a_gate():
    assert TeacherGate("validation").weight == 0 and TeacherGate("agreement").weight == 0
    assert TeacherGate("none").weight == 1


def test_no_gate_stays_open_whatever_is_measured():
    gate = TeacherGate("none")
    gate.update(0.9, 0.1)
    assert gate.weight == 1 and gate.scores.tolist() == pytest.approx([0.9, 0.1])


def test_measurement_that_is_not_finite_changes_nothing():
    gate = TeacherGate("validation")
    gate.update(float("nan"), 0.5)
    assert gate.weight == 0 and gate.num_measured == 0


def test_unknown_mode_and_tolerance_are_errors():
    with pytest.raises(ValueError, match="`gate` must be one of none, validation, agreement"):
        TeacherGate("open")
    with pytest.raises(ValueError, match="`gate_tolerance` must be a positive"):
        TeacherGate("none", tolerance=0)


def images():
    """Bright discs on a dark ground, which an equivariant threshold finds."""
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    centers = torch.tensor([[5.0, 6.0], [9.0, 7.0], [10.0, 11.0]])
    return torch.stack([((grid - c[:, None, None]).norm(dim=0) < 3.5).float()[None] for c in centers])


def threshold_student(x):
    return torch.cat([torch.full_like(x, 0.5), x], 1)


def test_equivariant_teacher_opens_the_agreement_gate():
    gate = TeacherGate("agreement")
    for turn in range(5):
        gate.measure_agreement(threshold_student, lambda x, prompt: prompt, images(), turn)
    assert gate.weight == 1 and gate.scores.tolist() == pytest.approx([1.0, 1.0])


def test_teacher_that_finds_nothing_shuts_the_agreement_gate():
    gate = TeacherGate("agreement")
    gate.measure_agreement(threshold_student, lambda x, prompt: torch.cat([x + 1, x * 0], 1), images(), 0)
    assert gate.weight == 0 and gate.scores[1] == 0


def test_teacher_that_memorised_its_labelled_rows_shuts_the_agreement_gate():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * 256))
    shapes, labeled = images(), images()[:1]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(60):  # a network without any idea of space learns its one labelled row by heart
        loss = nn.functional.cross_entropy(teacher(labeled).reshape(1, 2, 16, 16), labeled[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (teacher(labeled).reshape(1, 2, 16, 16).argmax(1) == labeled[:, 0]).all()  # perfect on what it learned from
    gate = TeacherGate("agreement", tolerance=0.1)
    for turn in range(5):
        gate.measure_agreement(threshold_student, lambda x, prompt: teacher(x).reshape(-1, 2, 16, 16), shapes[1:], turn)
    assert gate.weight == 0 and gate.scores[0] == 1


def test_agreement_of_not_square_images_uses_flips_only():
    gate = TeacherGate("agreement")
    for turn in range(6):
        gate.measure_agreement(threshold_student, lambda x, prompt: prompt, images()[..., :12], turn)
    assert gate.num_measured == 6
