"""Average the loss terms of a run, and stop it if one is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMTypeError, check_counts


def scalar_terms(output: dict) -> dict[str, Tensor]:
    """The 0-dimensional entries of an iteration's output by name: loss terms, weights and Dice values.

    Args:
        output: ``engine.state.output`` of a trainer with ``decollate=False``.

    Example::

        >>> scalar_terms({"pred": torch.zeros(2, 4), "loss": torch.tensor(0.5)})
        {'loss': tensor(0.5000)}
    """
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.ndim == 0}


class LossTerms:
    """
    Average every term of the loss over `log_interval` steps, and stop the run if a loss is not finite.

    Terms are the 0-dimensional entries of ``engine.state.output``; those whose name ends in "loss" must be finite. They
    are summed on the device and read every `log_interval` iterations and at the end of each epoch, so most steps do not
    wait for the device. The averages are in ``engine.state.terms``. Attach this handler before any that writes
    checkpoints at the end of an epoch, so that all terms are checked first. Overflows that GradScaler handles are not
    errors here, since terms are unscaled.

    Args:
        log_interval: number of iterations between reads.

    Raises:
        TypeError: if ``engine.state.output`` is not a dictionary.
        RuntimeError: if a loss is not finite; names the terms and the range of iterations.

    Example::

        SupervisedTrainer(..., decollate=False, train_handlers=[*methods, LossTerms(), CheckpointSaver(...)])
    """

    @check_types
    def __init__(self, log_interval: int = 50) -> None:
        check_counts(log_interval=log_interval)
        self.log_interval = log_interval
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first = 1

    def attach(self, engine: Engine) -> None:
        """Register with a trainer whose ``state.output`` is a dictionary (MONAI: ``decollate=False``)."""
        engine.state.terms = {}
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.log_interval), self.read)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.read)

    def __call__(self, engine: Engine) -> None:
        if not isinstance(engine.state.output, Mapping):
            raise KnowSAMTypeError(
                f"`engine.state.output` must be a dictionary but is a {type(engine.state.output).__name__}; build the "
                "trainer with `decollate=False`."
            )
        for name, term in scalar_terms(engine.state.output).items():
            self._sums[name] = self._sums[name] + term.detach() if name in self._sums else term.detach().clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, engine: Engine) -> None:
        """Read the sums from the device, check them, and reset them."""
        if not self._sums:
            return
        names = list(self._sums)
        values = torch.stack([self._sums[name].float() for name in names]).tolist()
        first, last = self._first, engine.state.iteration
        means = {name: value / self._counts[name] for name, value in zip(names, values)}
        self._sums, self._counts, self._first = {}, {}, last + 1
        bad = [name for name, value in means.items() if name.endswith("loss") and not math.isfinite(value)]
        if bad:
            raise KnowSAMRuntimeError(
                f"Loss terms must be finite but {', '.join(bad)} is not, between iterations {first} and {last}; "
                "lower the learning rate or the weight of the term, clip gradients harder, or set amp to False."
            )
        engine.state.terms = means
