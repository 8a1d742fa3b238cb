"""Handlers that run when training fails, whatever else is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events


def add_exception_handler(engine: Engine, handler: Callable[[Engine, BaseException], Any]) -> None:
    """
    Call a handler when an exception ends the run, before all other handlers, and raise the exception afterwards.

    Ignite calls the handlers of ``EXCEPTION_RAISED`` in turn. It stops at the first that raises, as MONAI's
    ``StatsHandler`` does, and considers the exception handled if none raises. So this handler goes first, and another
    one that raises goes last.

    Args:
        engine: a trainer or evaluator.
        handler: called with the engine and the exception; it may raise something else, such as SystemExit.

    Example::

        add_exception_handler(trainer, lambda engine, error: bar.close())
    """
    handlers = engine._event_handlers[Events.EXCEPTION_RAISED]  # Ignite has no public way to insert at the front
    engine.add_event_handler(Events.EXCEPTION_RAISED, handler)
    handlers.insert(0, handlers.pop())
    engine.add_event_handler(Events.EXCEPTION_RAISED, _raise)


def _raise(engine: Engine, error: BaseException) -> None:
    raise error
