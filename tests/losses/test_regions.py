from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knowsam_monai.losses import DistillationLoss, PartiallyLabeledLoss, dice_ce_loss, region_loss


def logit(*probs):
    return torch.tensor(probs, dtype=torch.float64).logit().view(1, -1, 1, 1)


def test_distillation_checked_by_hand():
    student, teacher = logit(0.5, 0.5, 0.25), logit(0.75, 0.5, 0.5)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    third = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    loss = region_loss(DistillationLoss(temperature=1.0), student, teacher)
    assert loss.item() == pytest.approx((first + 0 + third) / 3, rel=1e-12)


def test_dice_term_of_distillation_checked_by_hand():
    student, teacher = logit(0.5, 0.5), logit(0.75, 0.5)
    # of region and complement, 2 common / (q^2 + p^2) with common = (q^2 + p^2 - (q - p)^2) / 2: 12/13 and 4/5, and 1
    dice = (1 - (12 / 13 + 4 / 5) / 2 + 0) / 2
    without, loss = (region_loss(DistillationLoss(1.0, weight), student, teacher) for weight in (0.0, 0.5))
    assert (loss - without).item() == pytest.approx(0.5 * dice, rel=1e-4)


def test_supervised_loss_checked_by_hand():
    logits, label = logit(0.75, 0.75), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    hit = -math.log(0.75) + 1 - (2 * 0.75 / (0.75**2 + 1) + 0) / 2  # the complement has 0.25 of no pixel: Dice 0
    missed = -math.log(0.25) + 1 - (0 + 2 * 0.25 / (0.25**2 + 1)) / 2  # the region has 0.75 of no pixel
    assert region_loss(dice_ce_loss(), logits, label).item() == pytest.approx((hit + missed) / 2, rel=1e-4)


@pytest.mark.parametrize("num_regions", [2, 3])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("absent", [False, True])
def test_supervised_loss_is_binary_cross_entropy_plus_dice_of_each_region(num_regions, spatial, absent):
    logits = torch.randn(2, num_regions, *spatial, dtype=torch.float64)
    label = torch.randint(2, logits.shape).double()
    label[:, 0] *= not absent
    probs, dims = logits.sigmoid(), (0, *range(2, logits.ndim))
    dice = [
        1 - (2 * (p * y).sum(dims) + 1e-5) / ((p**2).sum(dims) + y.sum(dims) + 1e-5)
        for p, y in ((probs, label), (1 - probs, 1 - label))
    ]
    expected = F.binary_cross_entropy_with_logits(logits, label) + (dice[0] + dice[1]).mean() / 2
    torch.testing.assert_close(PartiallyLabeledLoss(overlapping=True)(logits, label), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_regions", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_the_difference_of_sigmoids_and_reaches_the_student_alone(num_regions, temperature):
    student = torch.randn(2, num_regions, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn_like(student).requires_grad_()
    region_loss(DistillationLoss(temperature), student, teacher).backward()
    expected = temperature * ((student / temperature).sigmoid() - (teacher / temperature).sigmoid()) / student.numel()
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-10, atol=1e-14)
    assert teacher.grad is None


def test_each_region_teaches_its_own_channel():
    torch.manual_seed(0)
    students = nn.ModuleList(nn.Conv2d(1, 1, 3) for _ in range(3)).double()
    image = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    logits = torch.cat([student(image) for student in students], dim=1)
    teacher = logits.detach() + torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    region_loss(DistillationLoss(), logits, teacher).backward()
    gradients = {name for name, p in students.named_parameters() if p.grad.abs().max() > 1e-12}
    assert gradients == {"1.weight", "1.bias"}


def test_ignored_pixels_may_differ_between_regions():
    logits = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    label = torch.randint(2, logits.shape).double()
    known = torch.rand(logits.shape) < 0.6
    loss = PartiallyLabeledLoss(dice_ce_loss(2, ignore_index=255), overlapping=True)
    value = loss(logits, label.where(known, 255))
    value.backward()
    assert logits.grad[~known].abs().sum() == 0 and (logits.grad[known] != 0).all()
    pixels = [(logits[:, c][known[:, c]], label[:, c][known[:, c]]) for c in range(2)]
    expected = [dice_ce_loss()(z.view(1, 1, -1), y.view(1, 1, -1)) for z, y in pixels]
    torch.testing.assert_close(value, sum(expected) / 2, rtol=1e-6, atol=0)


def test_other_number_of_regions_is_one_clear_error():
    for loss, target in ((DistillationLoss(), torch.zeros(1, 2, 4, 4)), (dice_ce_loss(), torch.zeros(1, 4, 4, 4))):
        with pytest.raises(ValueError, match="`target` must have a channel for each of the 3 regions but has [24]"):
            region_loss(loss, torch.zeros(1, 3, 4, 4), target)
