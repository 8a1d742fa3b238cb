from __future__ import annotations

import math

import pytest
import torch

from knowsam_monai.losses import MutualConsistencyLoss


def reference(logits_a: torch.Tensor, logits_b: torch.Tensor, target: str) -> float:
    """Eq. 5, pixel by pixel."""

    def one_way(student, other):
        total = sum(math.exp(z) for z in student)
        logs = [z - math.log(total) for z in student]
        if target == "hard":
            return -logs[other.index(max(other))]
        total = sum(math.exp(z) for z in other)
        return -sum(math.exp(z) / total * log for z, log in zip(other, logs))

    rows = [x.double().movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (logits_a, logits_b)]
    return sum(one_way(a, b) + one_way(b, a) for a, b in zip(*rows)) / len(rows[0])


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_equals_the_equation(target, num_classes, spatial):
    logits = [3 * torch.randn(2, num_classes, *spatial, dtype=torch.float64) for _ in range(2)]
    assert MutualConsistencyLoss(target)(*logits).item() == pytest.approx(reference(*logits, target), rel=1e-12)


def test_default_target_is_the_papers_hard_one():
    logits = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(MutualConsistencyLoss()(*logits), MutualConsistencyLoss("hard")(*logits))


def test_pixel_checked_by_hand():
    logits_a = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)  # 3/4, 1/4
    logits_b = torch.tensor([1.0, 4.0]).log().view(1, 2, 1, 1)  # 1/5, 4/5
    hard = -math.log(1 / 4) - math.log(1 / 5)  # A against class 1, B against class 0
    soft = -(0.2 * math.log(0.75) + 0.8 * math.log(0.25)) - (0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert MutualConsistencyLoss("hard")(logits_a, logits_b).item() == pytest.approx(hard)
    assert MutualConsistencyLoss("soft")(logits_a, logits_b).item() == pytest.approx(soft)


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_gradient_of_each_network_is_that_of_its_own_cross_entropy(target):
    logits = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    MutualConsistencyLoss(target)(*logits).backward()
    for own, other in (logits, logits[::-1]):
        p = other.detach().softmax(1)
        if target == "hard":
            p = torch.nn.functional.one_hot(p.argmax(1), 3).movedim(-1, 1)
        torch.testing.assert_close(own.grad, (own.detach().softmax(1) - p) / 32, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_class_absent_from_one_network_stays_finite(target):
    logits = [torch.randn(1, 3, 4, 4) for _ in range(2)]
    logits[0][:, 2] = -1e4
    logits = [x.requires_grad_() for x in logits]
    loss = MutualConsistencyLoss(target)(*logits)
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in logits)


def test_views_of_different_shape_are_an_error_with_both_shapes():
    with pytest.raises(ValueError, match=r"`logits_b` .* \(2, 3, 4, 4\), but has \(2, 3, 4, 8\)"):
        MutualConsistencyLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 8))


def test_unknown_target_is_an_error():
    with pytest.raises(ValueError, match="`target` must be 'hard' or 'soft' but is 'probs'"):
        MutualConsistencyLoss("probs")
