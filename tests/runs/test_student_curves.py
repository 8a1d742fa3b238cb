from __future__ import annotations

import pytest
import torch
from monai.engines import IterationEvents

from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.runs.student_curves import StudentCurves
from tests.toys import ToyStudent, toy_batches, toy_trainer


class Doubling:
    """A method that adds the loss once more."""

    def attach(self, engine):
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine):
        engine.state.output["loss"] = 2 * engine.state.output["loss"]


def test_supervised_loss_is_that_before_the_methods_and_the_rate_is_the_optimizer_s():
    student, loss = ToyStudent().double(), PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, toy_batches(1), loss, [StudentCurves(), Doubling()], lr=0.25)
    trainer.run()
    output = trainer.state.output
    assert output["supervised_loss"] == pytest.approx(output["loss"].item() / 2)
    assert torch.equal(output["learning_rate"], output["loss"].new_tensor(0.25))
    assert not output["supervised_loss"].requires_grad
