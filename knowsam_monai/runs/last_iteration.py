from __future__ import annotations

from ignite.engine import Engine, Events


class LastIteration:
    """
    End a run after exactly `max_iterations` iterations, even if this cuts its last epoch short.

    The short epoch ends like any other, with its validation and checkpoints.

    Args:
        max_iterations: iterations of the run; the trainer's ``max_epochs`` must cover them.

    Example::

        trainer = SupervisedTrainer(max_epochs=3, epoch_length=4, ..., train_handlers=[*handlers, LastIteration(10)])
    """

    def __init__(self, max_iterations: int) -> None:
        self.max_iterations = max_iterations

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.state.last_iteration = self.max_iterations
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state = engine.state
        if state.iteration == self.max_iterations and state.iteration % state.epoch_length:
            engine.terminate_epoch()


def last_iteration(engine: Engine) -> int:
    """
    The number of the last iteration of a trainer's run.

    Args:
        engine: a MONAI trainer, with or without :class:`LastIteration`.

    Example::

        remaining = last_iteration(trainer) - trainer.state.iteration
    """
    whole_epochs = engine.state.max_epochs * engine.state.epoch_length
    return min(whole_epochs, getattr(engine.state, "last_iteration", whole_epochs))
