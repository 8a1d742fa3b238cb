from __future__ import annotations

import logging

import pytest
from ignite.engine import Engine, Events

from knowsam_monai.runs import TrainingProgress


def train(progress, epochs=2, step=lambda engine, batch: None, log=None):
    trainer, evaluator = Engine(step), Engine(lambda engine, batch: None)
    progress.evaluator = evaluator
    trainer.state.terms = {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def read(engine):
        engine.state.terms = {"loss": 1 / engine.state.iteration}

    progress.attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        evaluator.state.metrics["val_mean_dice"] = engine.state.epoch / 4
        logging.getLogger("knowsam_monai").warning("validation %d", engine.state.epoch)

    trainer.run([0] * 4, max_epochs=epochs)
    return trainer


def test_one_bar_for_the_whole_run_with_loss_and_dice(capsys):
    progress = TrainingProgress(interval=2)
    train(progress)
    bars = [line for line in capsys.readouterr().err.split("\r") if "Training" in line]
    assert progress.bar is None and bars[-1].count("Training") == 1
    assert "8/8" in bars[-1] and "loss=0.125" in bars[-1] and "dice=0.5" in bars[-1]


def test_log_stands_above_the_bar_and_is_as_it_was_afterwards(capsys):
    root, handler = logging.getLogger(), logging.StreamHandler()
    before = list(root.handlers)
    root.addHandler(handler)
    try:
        train(TrainingProgress(interval=2))
        assert root.handlers == [*before, handler]
    finally:
        root.removeHandler(handler)


def test_bar_is_closed_when_the_run_ends_with_an_error(capsys):
    def fail(engine, batch):
        if engine.state.iteration == 3:
            raise ValueError("the third")

    progress = TrainingProgress(interval=1)
    with pytest.raises(ValueError, match="the third"):
        train(progress, step=fail)
    assert progress.bar is None
