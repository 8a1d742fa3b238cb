"""SIGTERM and Ctrl-C: acted on at a safe point, with the exit code that shells and schedulers expect."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from knowsam_monai import ranks

logger = logging.getLogger(__name__)

NOTE = b"\nStopping as soon as the run can be saved; a second signal stops it at once, without saving.\n"
NUMBERS = (signal.SIGTERM, signal.SIGINT)

_before_run: dict[int, Any] = {}  # the handlers that `end_on_signals` replaced


class StopSignals:
    """
    Store a first SIGTERM or Ctrl-C as `received`, with a line on stderr, and end the process on a second one.

    A scheduler sends its signal to every process of a job, loader workers included. After the first signal, workers
    that end no longer interrupt the main process in the middle of a step.

    Raises:
        SystemExit: in the main thread on the second signal, with 143 for SIGTERM or 130 for Ctrl-C.

    Example:
        >>> signals = StopSignals()
        >>> signals.listen()
        >>> for step in range(3):
        ...     if signals.received:
        ...         break     # and save
        >>> signals.give_back()
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = 0
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Handle the signals from now on. In other threads than the main one this does nothing."""
        if not self._previous:
            self._process = os.getpid()
            self._previous = _take_over(self._note)

    def give_back(self) -> None:
        """Restore the previous handlers of all signals, including SIGCHLD."""
        _restore(self._previous)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
                return  # SLURM and torchrun each send it; torchrun kills the process after a while
            raise SystemExit(128 + number)
        self.received = number
        if ranks.rank() == 0 and os.getpid() == self._process:  # loader workers inherit the handler
            with suppress(OSError):
                os.write(2, NOTE)  # the signal may have come while a stream or the log is locked
        if hasattr(signal, "SIGCHLD"):  # torch's handler raises when a worker ends
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_on_signals() -> None:
    """
    Make SIGTERM and Ctrl-C end the process at once, with exit code 143 or 130 and one line instead of a traceback.

    This is for the time before and after training, and lasts until :func:`give_back`.

    Example::

        end_on_signals()     # once, before data is read: in a bundle, in `run`
    """

    def end(number: int, frame: Any) -> None:
        logger.warning("Stopped by a signal outside of training; run the same command to start again or resume.")
        raise SystemExit(128 + number)

    give_back()
    _before_run.update(_take_over(end))


def give_back() -> None:
    """
    Undo :func:`end_on_signals`, if it was called.

    Example::

        give_back()     # when the run is over: in a bundle, in `finalize`
    """
    _restore(_before_run)


def _take_over(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Set the handler of both signals and return the previous ones; outside the main thread, do nothing."""
    try:
        return {number: signal.signal(number, handler) for number in NUMBERS}
    except ValueError:  # not the main thread
        return {}


def _restore(handlers: dict[int, Any]) -> None:
    while handlers:
        number, handler = handlers.popitem()
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
