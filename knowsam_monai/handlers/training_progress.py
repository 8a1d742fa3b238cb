from __future__ import annotations

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar


class TrainingProgress:
    """
    One progress bar an epoch with the mean loss of the last reading and the last validation Dice.

    Both are read from what other handlers already brought to the host (:class:`LossTerms` and the evaluator), so that
    the bar makes no step wait for the device.

    Args:
        evaluator: the validation engine, whose ``state.metrics[metric_name]`` is shown; None shows the loss alone.
        metric_name: which metric.
        interval: iterations between two updates.

    Example::

        SupervisedTrainer(..., train_handlers=[*methods, LossTerms(), TrainingProgress(evaluator)])
    """

    def __init__(self, evaluator: Engine | None = None, metric_name: str = "val_mean_dice", interval: int = 10) -> None:
        self.evaluator = evaluator
        self.metric_name = metric_name
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`LossTerms`."""
        bar = ProgressBar(desc="Training", persist=False)
        bar.attach(
            engine,
            event_name=Events.ITERATION_COMPLETED(every=self.interval),
            output_transform=lambda _: self.shown(engine),
        )

    def shown(self, engine: Engine) -> dict[str, float]:
        """What stands behind the bar."""
        terms = getattr(engine.state, "terms", {})
        shown = {"loss": terms["loss"]} if "loss" in terms else {}
        metrics = {} if self.evaluator is None else self.evaluator.state.metrics
        if self.metric_name in metrics:
            shown["dice"] = float(metrics[self.metric_name])
        return shown
