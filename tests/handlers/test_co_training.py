from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from knowsam_monai.handlers.co_training import MultiViewCoTraining
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss

from ..toys import ToyStudent, toy_batches, toy_trainer


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("size", [(8, 8), (4, 5, 6)])
def test_steps_equal_hand_written_ones(target, size):
    torch.manual_seed(0)
    student = ToyStudent(spatial_dims=len(size)).double()
    other = copy.deepcopy(student)
    batches, loss = toy_batches(3, size=size), PartiallyLabeledLoss(dice_ce_loss(3))
    handler = MultiViewCoTraining(mutual_weight=SigmoidRampUp(3), entropy_weight=0.9, target=target)
    trainer = toy_trainer(student, batches, loss, [handler])
    trainer.run()

    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        pred = other(batch["image"])
        a, b = pred[:, 1], pred[:, 2]
        if target == "hard":
            mutual = F.cross_entropy(a, b.argmax(1)) + F.cross_entropy(b, a.argmax(1))
        else:
            mutual = F.cross_entropy(a, b.detach().softmax(1)) + F.cross_entropy(b, a.detach().softmax(1))
        entropy = (
            sum(-(p.softmax(1) * p.log_softmax(1)).sum(1).mean() for p in (a, b)) / torch.tensor(3.0).double().log()
        )
        total = loss(pred, batch["label"]) + SigmoidRampUp(3)(t) * mutual + 0.9 * entropy
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for ours, expected in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.state.output["entropy_loss"], (0.9 * entropy).detach(), rtol=1e-4, atol=1e-5)


def test_weights_of_zero_switch_the_terms_off():
    student = ToyStudent().double()
    trainer = toy_trainer(
        student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [MultiViewCoTraining(0.0, 0.0)]
    )
    trainer.run()
    assert not {"mutual_loss", "entropy_loss"} & set(trainer.state.output)


def test_plain_network_is_one_clear_error():
    network = torch.nn.Conv2d(1, 3, 1).double()
    trainer = toy_trainer(network, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [MultiViewCoTraining()])
    with pytest.raises(ValueError, match="needs a multi-view student"):
        trainer.run()
