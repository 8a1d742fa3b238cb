from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knowsam_monai.losses import PseudoLabelLoss
from tests.toys import with_gradient


def test_pixels_checked_by_hand():
    target = torch.tensor([[9.0, 3.0], [1.0, 2.0]]).log()[None]  # (1, C, pixels): 0.9 for class 0, and 0.6, unsure
    student = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log()[None]  # 1/4 for class 0, and 1/2
    assert PseudoLabelLoss(0.8)(student, target).item() == pytest.approx(math.log(4) / 2)
    assert PseudoLabelLoss(0.5)(student, target).item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert PseudoLabelLoss()(student, target).item() == 0


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_it_is_the_cross_entropy_of_the_sure_pixels_times_their_fraction(num_classes, spatial):
    student, target = (2 * torch.randn(2, num_classes, *spatial, dtype=torch.float64) for _ in range(2))
    confidence, label = target.softmax(1).max(1)
    threshold = confidence.median().item()
    label[confidence < threshold] = -1
    expected = F.cross_entropy(student, label, ignore_index=-1)
    fraction = (confidence >= threshold).double().mean()
    torch.testing.assert_close(PseudoLabelLoss(threshold)(student, target), fraction * expected, rtol=1e-12, atol=0)


def test_unsure_pixels_give_no_gradient_and_are_not_background():
    target = torch.zeros(1, 3, 2)
    target[0, 2, 0] = 9.0
    student = torch.randn(1, 3, 2, requires_grad=True)
    PseudoLabelLoss()(student, target).backward()
    assert student.grad[0, :, 0].abs().min() > 0 and torch.equal(student.grad[0, :, 1], torch.zeros(3))


def test_target_gets_no_gradient():
    student, target = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3)
    image = torch.rand(2, 1, 8, 8)
    PseudoLabelLoss(0.3)(student(image), target(image)).backward()
    assert with_gradient(target) == set() and with_gradient(student) == {"weight", "bias"}


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="`threshold` must be a probability, 0..1, but is 95"):
        PseudoLabelLoss(95)
    with pytest.raises(ValueError, match=r"`target_logits` .* \(2, 3, 4, 4\) but have \(2, 3, 4, 8\)"):
        PseudoLabelLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 8))
