"""SIGTERM and Ctrl-C, heard when it suits and answered with the exit code that shells and schedulers expect."""

from __future__ import annotations

import logging
import signal
from typing import Any

logger = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)


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
        if self._previous:
            return
        for number in NUMBERS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: then somebody else listens
                return

    def give_back(self) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
        if hasattr(signal, "SIGCHLD"):  # torch raises from its handler when a worker has ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_on_signals() -> None:
    """
    Let SIGTERM and Ctrl-C end the process at once with 143 and 130 and one line instead of a traceback.

    For the time before the first step: what has been read so far is read again.

    Example::

        end_on_signals()     # once, before data is read: of a bundle, in `initialize`
    """

    def end(number: int, frame: Any) -> None:
        logger.warning("Stopped by a signal before there was anything to save; the same command starts again.")
        raise SystemExit(128 + number)

    for number in NUMBERS:
        try:
            signal.signal(number, end)
        except ValueError:  # not the main thread
            return
