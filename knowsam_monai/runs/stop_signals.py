"""SIGTERM and Ctrl-C, heard when it suits and answered with the exit code that shells and schedulers expect."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)

_before_run: dict[int, Any] = {}  # the handlers that `end_on_signals` replaced


class StopSignals:
    """
    While it listens, a first SIGTERM or Ctrl-C is only noted as `received`; a second ends the process.

    Once one has come, loader workers that the same signal has ended (a scheduler's goes to every process of a job) no
    longer interrupt the main process in the middle of a step.

    Raises:
        SystemExit: in the main thread when a second one comes, with 143 of SIGTERM or 130 of Ctrl-C.

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
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over; only the main thread can."""
        if not self._previous:
            self._previous = _take_over(self._note)

    def give_back(self) -> None:
        """Leave the signals, SIGCHLD among them, to whoever had them before."""
        _restore(self._previous)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
        if hasattr(signal, "SIGCHLD"):  # torch raises from its handler when a worker has ended
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_on_signals() -> None:
    """
    Let SIGTERM and Ctrl-C end the process at once with 143 and 130 and one line instead of a traceback.

    For the time before and after training, until :func:`give_back`: what has been read so far is read again.

    Example::

        end_on_signals()     # once, before data is read: of a bundle, in `run`
    """

    def end(number: int, frame: Any) -> None:
        logger.warning("Stopped by a signal outside of training; the same command starts again or goes on.")
        raise SystemExit(128 + number)

    give_back()
    _before_run.update(_take_over(end))


def give_back() -> None:
    """
    Undo :func:`end_on_signals`; without one before it, do nothing.

    Example::

        give_back()     # when the run is over: of a bundle, in `finalize`
    """
    _restore(_before_run)


def _take_over(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Give both signals to a handler; the ones they had before, none outside of the main thread."""
    try:
        return {number: signal.signal(number, handler) for number in NUMBERS}
    except ValueError:  # not the main thread: then somebody else listens
        return {}


def _restore(handlers: dict[int, Any]) -> None:
    while handlers:
        number, handler = handlers.popitem()
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
