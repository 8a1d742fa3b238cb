from __future__ import annotations

import copy

import pytest
import torch

from knowsam_monai.handlers import GradientClipping
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from tests.toys import ToyStudent, toy_batches, toy_trainer


class Host:
    """As much of an engine as the handler reads."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def stepped(gradient, max_norm, scale=None, fused=False):
    """Two parameters at 0 after one step of SGD with learning rate 1."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in gradient]
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=fused)
    handler = GradientClipping(max_norm)
    handler.started(Host(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(sum(g * p.sum() for g, p in zip(gradient, parameters))).backward()
    scaler.step(optimizer)
    return [p.item() for p in parameters]


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "gradient,max_norm,step",
    [((3, 4), 1, (-0.6, -0.8)), ((30, 40), 10, (-6, -8)), ((3, 4), 6, (-3, -4)), ((0, 0), 1, (0, 0))],
)
def test_norm_of_all_gradients_together_is_limited(gradient, max_norm, step, scale, fused):
    assert stepped(gradient, max_norm, scale, fused) == pytest.approx(step, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_a_scaler_skips_is_skipped(fused):
    assert stepped((float("inf"), 1), 1, 1024.0, fused) == [0, 0]


def test_trainer_is_clipped_during_its_run_only():
    students = [ToyStudent().double()]
    students.append(copy.deepcopy(students[0]))
    batches, loss = toy_batches(2), PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(students[0], batches, loss, [GradientClipping(1e-3)])
    trainer.run()
    assert not trainer.optimizer._optimizer_step_pre_hooks

    optimizer = torch.optim.SGD(students[1].parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        loss(students[1](batch["image"]), batch["label"]).backward()
        assert torch.nn.utils.clip_grad_norm_(students[1].parameters(), 1e-3) > 1e-3
        optimizer.step()
    for ours, expected in zip(*(student.parameters() for student in students)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("max_norm", [0, -1])
def test_limit_must_be_positive(max_norm):
    with pytest.raises(ValueError, match="`max_norm` must be positive"):
        GradientClipping(max_norm)
