from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from knowsam_monai.distillation import SAMDistiller
from knowsam_monai.losses import DistillationLoss
from tests.toys import ToyTeacher, with_gradient

BUNDLES = Path(__file__).parents[2] / "bundles"


def reference(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """T^2 * KL(teacher || student), pixel by pixel."""
    pixels = []
    for s, t in zip(*(x.double().movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (student, teacher))):
        p, q = ([math.exp(z / temperature) for z in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        pixels.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q)))
    return temperature**2 * sum(pixels) / len(pixels)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_equals_the_equation(num_classes, spatial, temperature):
    student, teacher = (3 * torch.randn(2, num_classes, *spatial, dtype=torch.float64) for _ in range(2))
    loss = DistillationLoss(temperature)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, temperature), rel=1e-12)


def test_row_checked_by_hand():
    teacher = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)  # probabilities 3/4, 1/4
    student = torch.zeros(1, 2, 1, 1)  # 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert DistillationLoss(temperature=1.0)(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_dice_term_checked_by_hand_at_every_temperature(temperature):
    teacher = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)  # probabilities 3/4, 1/4
    student = torch.zeros(1, 2, 1, 1)  # 1/2, 1/2
    # Dice of soft labels, squared: common = (q^2 + p^2 - (q - p)^2) / 2, over (q^2 + p^2) / 2; 12/13 and 4/5
    expected = DistillationLoss(temperature)(student, teacher).item() + 0.5 * (1 - (12 / 13 + 4 / 5) / 2)
    assert DistillationLoss(temperature, 0.5)(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_dice_term_is_that_of_the_whole_batch():
    teacher = torch.tensor([[30.0, 0.0], [0.0, 30.0]]).view(2, 2, 1, 1)  # one row of each class
    student = torch.tensor([[30.0, 0.0], [30.0, 0.0]]).view(2, 2, 1, 1)  # the first class in both rows
    # the first class has 1 pixel in common of 2 + 1, the second none of 0 + 1; row by row it would be 1/2
    loss = DistillationLoss(temperature=1.0, dice_weight=1.0).dice_loss(student, teacher.softmax(1))
    assert loss.item() == pytest.approx(1 - (2 / 3 + 0) / 2, abs=1e-4)


def test_dice_term_weighs_a_small_structure_as_a_large_one():
    teacher = torch.full((1, 3, 10, 10), -30.0)
    teacher[:, 0] = 0.0
    teacher[:, 1, :5], teacher[:, 0, :5] = 0.0, -30.0  # half of the image
    teacher[:, 2, 9, 9], teacher[:, 0, 9, 9] = 0.0, -30.0  # a pixel
    missed = [teacher.clone(), teacher.clone()]
    missed[0][:, 1], missed[0][:, 0, :5] = -30.0, 0.0
    missed[1][:, 2], missed[1][:, 0, 9, 9] = -30.0, 0.0
    loss = DistillationLoss(temperature=1.0, dice_weight=1.0).dice_loss
    large, small = (loss(student, teacher.softmax(1)).item() for student in missed)
    # the class itself has Dice 0; background, which takes its pixels, 49 in common of 99 + 49, or 49 of 50 + 49
    assert large == pytest.approx((1 + 1 - 2 * 49 / 148) / 3, abs=1e-3)
    assert small == pytest.approx((1 + 1 - 2 * 49 / 99) / 3, abs=1e-3)


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
def test_default_temperature_is_that_of_the_bundles_and_results(bundle):
    config = json.loads((BUNDLES / bundle / "configs" / "train.json").read_text())
    assert DistillationLoss().temperature == SAMDistiller(ToyTeacher()).distillation_loss.temperature == 2
    assert config["distillation_temperature"] == 2


def test_mean_is_over_pixels_and_rows_and_not_over_classes():
    student, teacher = torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1)
    one = DistillationLoss(2.0)(student, teacher)
    many = DistillationLoss(2.0)(student.expand(5, 3, 4, 6), teacher.expand(5, 3, 4, 6))
    torch.testing.assert_close(many, one)


def test_large_temperature_is_a_regression_on_centered_logits():
    student, teacher = (torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(2))
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    regression = difference.square().sum(1).mean() / (2 * 4)
    torch.testing.assert_close(DistillationLoss(1e3)(student, teacher), regression, rtol=1e-2, atol=0)


def test_zero_exactly_where_the_student_agrees():
    logits = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    loss = DistillationLoss(10.0)(logits, logits.detach() + 3.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and logits.grad.abs().max() < 1e-12


def test_class_absent_from_the_teacher_stays_finite():
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 3, 4, 4)
    teacher[:, 2] = -1e4
    loss = DistillationLoss(1.0)(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_teacher_that_is_certain_of_a_zero_contributes_nothing_there(channels, dice_weight, temperature):
    loss = DistillationLoss(temperature, dice_weight)
    results = []
    for zero in (-torch.inf, -1e4):  # the second one underflows to a probability of 0
        student = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        teacher = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
        teacher[:, -1, :2] = zero
        loss(student, teacher).backward()
        results.append((loss(student, teacher).detach(), student.grad))
    torch.testing.assert_close(*results)
    assert results[0][0].isfinite() and results[0][1].isfinite().all()


def test_gradient_reaches_the_student_and_never_the_teacher():
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3)
    image = torch.rand(2, 1, 8, 8)
    DistillationLoss()(student(image), teacher(image)).backward()
    assert with_gradient(student) == {"weight", "bias"} and with_gradient(teacher) == set()


def test_gradient_is_the_difference_of_probabilities_times_temperature():
    student = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    DistillationLoss(4.0)(student, teacher).backward()
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-10, atol=1e-12)


def test_float16_logits_that_would_overflow_are_compared_in_float32():
    student = torch.tensor([6e4, -6e4]).half().view(1, 2, 1, 1).requires_grad_()
    loss = DistillationLoss(10.0)(student, -student)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4, 4, 8), (1, 4, 4, 4)])
def test_other_shape_of_the_teacher_is_an_error_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"`teacher_logits` must have the student's shape \(2, 4, 4, 4\) but have"):
        DistillationLoss()(torch.zeros(2, 4, 4, 4), torch.zeros(shape))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="`temperature` must be positive but is"):
        DistillationLoss(temperature)


@pytest.mark.parametrize("dice_weight", [-1.0, float("inf")])
def test_weight_of_the_dice_term_that_is_negative_or_infinite_is_an_error(dice_weight):
    with pytest.raises(ValueError, match="`dice_weight` must be 0 or more but is"):
        DistillationLoss(dice_weight=dice_weight)
