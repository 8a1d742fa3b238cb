"""What handlers do when a run fails, whatever else is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events


def add_exception_handler(engine: Engine, handler: Callable[[Engine, BaseException], Any]) -> None:
    """
    Let a handler act on an exception that ends a run, before all that are attached and will be.

    Ignite calls the handlers of ``EXCEPTION_RAISED`` in turn and stops at the first that raises, as MONAI's
    ``StatsHandler`` does; where none raises, it takes the exception for handled. So this one stands first and does not
    raise the exception again; one that does stands behind.

    Args:
        engine: a trainer or evaluator.
        handler: called with the engine and the exception; it may raise something else, such as SystemExit.

    Example::

        add_exception_handler(trainer, lambda engine, error: bar.close())
    """
    handlers = engine._event_handlers[Events.EXCEPTION_RAISED]  # Ignite has no way to add in front
    engine.add_event_handler(Events.EXCEPTION_RAISED, handler)
    handlers.insert(0, handlers.pop())
    engine.add_event_handler(Events.EXCEPTION_RAISED, _raise)


def _raise(engine: Engine, error: BaseException) -> None:
    raise error
