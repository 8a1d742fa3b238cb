from __future__ import annotations

import sys
from typing import Any

from ignite.engine import Engine, Events
from tqdm import tqdm

from knowsam_monai.runs.at_exception import add_exception_handler
from knowsam_monai.runs.last_iteration import last_iteration


class TrainingProgress:
    """
    One progress bar for the whole run with the mean loss of the last reading and the last validation Dice.

    Both are read from what other handlers (:class:`~knowsam_monai.handlers.LossTerms`, the evaluator) already copied to
    the CPU, so the bar makes no step wait for the device. Log lines appear above the bar. If the output is a file and
    not a terminal, the bar is written at most once a minute.

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
        self.bar: tqdm | None = None
        self._redirection: Any = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`~knowsam_monai.handlers.LossTerms`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)
        add_exception_handler(engine, self.failed)

    def started(self, engine: Engine) -> None:
        """Draw the bar at the first epoch, when what is resumed and reported before it is done."""
        if self.bar is not None:
            return
        state = engine.state
        self.bar = tqdm(
            desc="Training",
            total=last_iteration(engine),
            initial=state.iteration,
            mininterval=0.2 if sys.stderr.isatty() else 60,
            dynamic_ncols=True,
        )
        # imported here: tqdm.contrib loads the notebook's bar, which warns where ipywidgets is missing
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._redirection = logging_redirect_tqdm()
        self._redirection.__enter__()

    def __call__(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.set_postfix(self.shown(engine), refresh=False)
            self.bar.update(engine.state.iteration - self.bar.n)

    def completed(self, engine: Engine) -> None:
        """Leave the bar as it stands, and the log as it was."""
        if self.bar is not None:
            self(engine)  # with the last validation's
            self.bar.close()
            self._redirection.__exit__(None, None, None)
            self.bar = None

    def failed(self, engine: Engine, error: BaseException) -> None:
        """The same when the run ends with an error."""
        self.completed(engine)

    def shown(self, engine: Engine) -> dict[str, float]:
        """What stands behind the bar."""
        terms = getattr(engine.state, "terms", {})
        shown = {"loss": terms["loss"]} if "loss" in terms else {}
        metrics = {} if self.evaluator is None else self.evaluator.state.metrics
        if self.metric_name in metrics:
            shown["dice"] = float(metrics[self.metric_name])
        return shown
