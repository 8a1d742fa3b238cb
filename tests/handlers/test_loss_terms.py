from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointSaver

from knowsam_monai.handlers.loss_terms import LossTerms
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from tests.toys import ToyStudent, toy_batches, toy_trainer


def trainer_with(term, log_interval, num=6, extra=(), max_epochs=1):
    """A trainer whose step t also writes `toy_loss` = term(t)."""
    trainer = toy_trainer(
        ToyStudent().double(),
        toy_batches(num),
        PartiallyLabeledLoss(dice_ce_loss(3)),
        [LossTerms(log_interval), *extra],
        max_epochs=max_epochs,
    )
    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED, lambda e: e.state.output.update(toy_loss=torch.tensor(term(e.state.iteration)))
    )
    return trainer


def test_terms_are_means_since_the_last_reading():
    trainer = trainer_with(float, log_interval=4)
    readings = []
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda e: readings.append(e.state.terms.get("toy_loss")))
    trainer.run()
    assert readings == [None, None, None, None, 2.5, 2.5]
    assert trainer.state.terms["toy_loss"] == 5.5  # the end of the epoch reads too


def test_term_of_some_steps_is_the_mean_over_those_steps():
    trainer = trainer_with(float, log_interval=6)
    rare = {3: 1.0, 4: 2.0}
    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED,
        lambda e: e.state.output.update(
            {"toy_dice": torch.tensor(rare[t])} if (t := e.state.iteration) in rare else {}
        ),
    )
    trainer.run()
    assert trainer.state.terms["toy_dice"] == 1.5 and trainer.state.terms["toy_loss"] == 3.5


def test_term_that_is_not_finite_stops_the_run_and_is_named():
    trainer = trainer_with(lambda t: float("nan") if t == 3 else 1.0, log_interval=2)
    with pytest.raises(RuntimeError, match="toy_loss is not, between iterations 3 and 4"):
        trainer.run()
    assert trainer.state.iteration == 4


def test_no_checkpoint_is_written_with_a_term_unread(tmp_path):
    network = ToyStudent()
    saver = CheckpointSaver(str(tmp_path), {"model": network}, save_interval=1)
    trainer = trainer_with(
        lambda t: float("inf") if t == 8 else 1.0, log_interval=50, num=3, extra=[saver], max_epochs=4
    )
    with pytest.raises(RuntimeError, match="between iterations 7 and 9"):
        trainer.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_epoch=1.pt", "model_epoch=2.pt"]


def test_decollated_output_is_one_clear_error():
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=toy_batches(1, num_unlabeled=0),
        network=(student := ToyStudent().double()),
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        loss_function=PartiallyLabeledLoss(dice_ce_loss(3)),
        train_handlers=[LossTerms()],
    )
    with pytest.raises(TypeError, match="must be a dictionary but is a list; build the trainer with `decollate=False`"):
        trainer.run()


def test_dice_that_is_undefined_does_not_stop_the_run():
    trainer = toy_trainer(ToyStudent().double(), toy_batches(2), PartiallyLabeledLoss(dice_ce_loss(3)), [LossTerms(1)])
    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED, lambda e: e.state.output.update(toy_dice=torch.tensor(float("nan")))
    )
    trainer.run()
    assert trainer.state.iteration == 2
