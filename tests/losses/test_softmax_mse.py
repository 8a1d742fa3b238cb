from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.losses import SoftmaxMSELoss
from tests.toys import with_gradient


def test_pixels_checked_by_hand():
    student = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()[None]  # (1, C, pixels): 3/4 1/4 and 1/2 1/2
    target = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log()[None]  # 1/4 3/4 and 1/2 1/2
    squares = 2 * 0.5**2  # both classes of the first pixel; the second agrees
    assert SoftmaxMSELoss()(student, target).item() == pytest.approx(squares / 4)
    for mask, expected in (([1, 0], squares / 2), ([0, 1], 0.0), ([1, 1], squares / 4), ([0, 0], 0.0)):
        mask = torch.tensor(mask, dtype=torch.bool).view(1, 1, 2)
        assert SoftmaxMSELoss()(student, target, mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_full_mask_is_the_mean_over_pixels_and_classes(num_classes, spatial):
    student, target = (torch.randn(2, num_classes, *spatial, dtype=torch.float64) for _ in range(2))
    expected = nn.functional.mse_loss(student.softmax(1), target.softmax(1))
    mask = torch.ones(2, 1, *spatial, dtype=torch.bool)
    torch.testing.assert_close(SoftmaxMSELoss()(student, target), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(SoftmaxMSELoss()(student, target, mask), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(SoftmaxMSELoss(2)(student, target, mask), expected * num_classes / 2, rtol=1e-12, atol=0)


def test_empty_mask_gives_zero_loss_and_zero_gradient():
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = SoftmaxMSELoss()(student, torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


def test_target_gets_no_gradient():
    student, target = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3)
    image = torch.rand(2, 1, 8, 8)
    SoftmaxMSELoss()(student(image), target(image)).backward()
    assert with_gradient(target) == set() and with_gradient(student) == {"weight", "bias"}


def test_absent_class_and_huge_logits_stay_finite():
    student = torch.randn(1, 3, 4, 4)
    student[:, 2] = -1e4
    student.requires_grad_()
    loss = SoftmaxMSELoss()(student, 1e4 * torch.randn(1, 3, 4, 4))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_different_shapes_are_an_error_with_both():
    with pytest.raises(ValueError, match=r"`target_logits` .* \(2, 3, 4, 4\) but have \(2, 3, 4, 8\)"):
        SoftmaxMSELoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 8))


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_an_error(num_classes):
    """A mask of UA-MT would be empty: log 1 = 0."""
    with pytest.raises(ValueError, match=f"`num_classes` must be 2 or more but is {num_classes}; a student of one ch"):
        SoftmaxMSELoss(num_classes)
