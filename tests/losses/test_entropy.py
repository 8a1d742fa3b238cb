from __future__ import annotations

import math

import pytest
import torch

from knowsam_monai.losses import EntropyLoss, entropy_map


def reference_map(logits: torch.Tensor) -> torch.Tensor:
    """Eq. 1 pixel by pixel, without an epsilon."""
    rows = logits.double().movedim(1, -1).reshape(-1, logits.shape[1])
    values = []
    for row in rows.tolist():
        total = sum(math.exp(z) for z in row)
        values.append(-sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in row))
    return torch.tensor(values, dtype=torch.float64).view(len(logits), 1, *logits.shape[2:])


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_map_equals_the_equation(num_classes, spatial):
    logits = 3 * torch.randn(2, num_classes, *spatial, dtype=torch.float64)
    torch.testing.assert_close(entropy_map(logits), reference_map(logits), rtol=0, atol=1e-12)


def test_map_is_within_the_papers_epsilon():
    logits = 5 * torch.randn(2, 4, 16, 16, dtype=torch.float64)
    probs = logits.softmax(1)
    paper = -(probs * (probs + 1e-6).log()).sum(1, keepdim=True)
    assert (entropy_map(logits) - paper).abs().max() <= 4e-6


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_map_is_log_c_where_nothing_is_known_and_0_where_all_is(num_classes):
    logits = torch.zeros(1, num_classes, 1, 2)
    logits[0, 0, 0, 1] = 200.0
    torch.testing.assert_close(entropy_map(logits).flatten(), torch.tensor([math.log(num_classes), 0.0]))


def test_absent_class_adds_nothing():
    logits = torch.randn(1, 2, 3, 3)
    with_absent = torch.cat((logits, torch.full((1, 1, 3, 3), -1e4)), dim=1)
    torch.testing.assert_close(entropy_map(with_absent), entropy_map(logits))


def test_gradient_is_finite_and_exact_where_a_probability_underflows():
    logits = torch.tensor([0.0, 1.0, -2000.0], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
    entropy_map(logits).sum().backward()
    p = 1 / (1 + math.e)
    slope = p * (1 - p)  # dH/dz of two classes, z = 1 apart
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([slope, -slope, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4])
def test_loss_is_1_for_each_network_that_knows_nothing(num_classes):
    nothing = torch.zeros(2, num_classes, 4, 4)
    assert EntropyLoss()(nothing).item() == pytest.approx(1.0)
    assert EntropyLoss()(nothing, nothing).item() == pytest.approx(2.0)


def test_loss_is_the_pixel_mean_of_both_networks():
    certain, nothing = torch.tensor([200.0, 0.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    half = torch.cat((certain, nothing), dim=-1)  # one pixel of each kind
    assert EntropyLoss()(half, nothing).item() == pytest.approx(0.5 + 1.0)


def test_gradient_reaches_each_network_and_sharpens_it():
    logits = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    loss = EntropyLoss()(*logits)
    loss.backward()
    stepped = EntropyLoss()(*(x - 10 * x.grad for x in logits))
    assert all(x.grad.abs().sum() > 0 for x in logits) and stepped < loss


def test_loss_without_logits_is_an_error():
    with pytest.raises(ValueError, match="`logits` must be one tensor or more but is empty"):
        EntropyLoss()()
