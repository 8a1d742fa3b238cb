from __future__ import annotations

import pytest
from ignite.engine import Engine, Events
from monai.handlers import StatsHandler

from knowsam_monai.runs.at_exception import add_exception_handler


@pytest.mark.parametrize("stats_first", [True, False])
def test_all_duties_are_done_and_the_error_goes_on_whatever_the_order(stats_first):
    def fail(engine, batch):
        raise KeyError("of the step")

    engine, done = Engine(fail), []
    if stats_first:
        StatsHandler().attach(engine)
    for name in ("first", "second"):
        add_exception_handler(engine, lambda engine, error, name=name: done.append(name))
    if not stats_first:
        StatsHandler().attach(engine)
    with pytest.raises(KeyError, match="of the step"):
        engine.run([0])
    assert {"first", "second"} <= set(done)


def test_error_is_not_swallowed_without_another_handler():
    engine = Engine(lambda engine, batch: 1 / 0)
    add_exception_handler(engine, lambda engine, error: None)
    assert engine.has_event_handler(add_exception_handler, Events.EXCEPTION_RAISED) is False
    with pytest.raises(ZeroDivisionError):
        engine.run([0])
