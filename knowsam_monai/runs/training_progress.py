from __future__ import annotations

import sys
from contextlib import ExitStack

from ignite.engine import Engine, Events
from tqdm import tqdm

from knowsam_monai.runs.at_exception import add_exception_handler
from knowsam_monai.runs.last_iteration import last_iteration


class TrainingProgress:
    """
    Show one progress bar for the whole run, with the last mean loss and the last validation Dice.

    Both come from values that other handlers (:class:`~knowsam_monai.handlers.LossTerms`, the evaluator) have already
    copied to the CPU, so the bar never makes a step wait for the device. Log lines appear above the bar. If the output
    is a file instead of a terminal, the bar is written at most once a minute.

    Args:
        evaluator: the validation engine, whose metric `val_mean_dice` is shown; None shows only the loss.
        interval: iterations between two updates.

    Example::

        SupervisedTrainer(..., train_handlers=[*methods, LossTerms(), TrainingProgress(evaluator)])
    """

    def __init__(self, evaluator: Engine | None = None, interval: int = 10) -> None:
        self.evaluator = evaluator
        self.interval = interval
        self.bar: tqdm | None = None
        self._redirection = ExitStack()

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`~knowsam_monai.handlers.LossTerms`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)
        add_exception_handler(engine, self.completed)

    def started(self, engine: Engine) -> None:
        """Draw the bar at the first epoch, after everything that is logged at the start of the run."""
        if self.bar is not None:
            return
        self.bar = tqdm(
            desc="Training",
            total=last_iteration(engine),
            initial=engine.state.iteration,
            mininterval=0.2 if sys.stderr.isatty() else 60,
            dynamic_ncols=True,
        )
        # imported here: tqdm.contrib loads the notebook's bar, which warns if ipywidgets is missing
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._redirection.enter_context(logging_redirect_tqdm())

    def __call__(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.set_postfix(self.shown(engine), refresh=False)
            self.bar.update(engine.state.iteration - self.bar.n)

    def completed(self, engine: Engine, error: BaseException | None = None) -> None:
        """Close the bar and restore logging, also if the run ends with an error."""
        if self.bar is not None:
            self(engine)  # with the last validation
            self.bar.close()
            self._redirection.close()
            self.bar = None

    def shown(self, engine: Engine) -> dict[str, float]:
        """The values behind the bar."""
        terms = getattr(engine.state, "terms", {})
        shown = {"loss": terms["loss"]} if "loss" in terms else {}
        metrics = {} if self.evaluator is None else self.evaluator.state.metrics
        if "val_mean_dice" in metrics:
            shown["dice"] = float(metrics["val_mean_dice"])
        return shown
