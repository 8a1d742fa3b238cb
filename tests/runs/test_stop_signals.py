from __future__ import annotations

import logging
import os
import signal

import pytest

from knowsam_monai.runs.stop_signals import NUMBERS, StopSignals, end_on_signals, give_back


@pytest.fixture(autouse=True)
def signals_stay_as_they_are():
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGCHLD)}
    yield
    give_back()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_first_signal_is_noted_and_a_second_ends_the_process(number, capfd):
    signals = StopSignals()
    signals.listen()
    os.kill(os.getpid(), number)
    assert signals.received == number and capfd.readouterr().err.count("a second signal stops it at once") == 1
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number and not capfd.readouterr().err


def test_loader_worker_that_gets_the_signal_too_says_nothing(capfd):
    signals = StopSignals()
    signals.listen()
    worker = os.fork()
    if worker == 0:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(signals.received != signal.SIGINT)
    assert os.waitpid(worker, 0)[1] == 0
    assert signals.received is None and not capfd.readouterr().err


def test_torchrun_may_send_sigterm_after_slurm_has(monkeypatch):
    """srun signals every process of a step, and torchrun forwards what it got to its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    signals = StopSignals()
    signals.listen()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGINT)


def test_worker_that_ends_afterwards_raises_nothing_in_the_main_process():
    signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("torch's handler raises here"))
    signals = StopSignals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGCHLD)


def handlers():
    return {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGCHLD)}


@pytest.mark.parametrize("number", [None, *NUMBERS])
def test_signals_are_given_back_with_the_one_about_workers(number):
    signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for its loader
    before = handlers()
    signals = StopSignals()
    for _ in range(2):
        signals.listen()
    assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    if number is not None:
        os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    for _ in range(2):
        signals.give_back()
    assert handlers() == before


def test_what_a_run_sets_at_its_start_is_undone_at_its_end():
    before = handlers()
    for _ in range(2):  # the run before ended without its end
        end_on_signals()
    signals = StopSignals()
    signals.listen()
    signals.give_back()
    assert handlers() != before
    for _ in range(2):
        give_back()
    assert handlers() == before


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_before_the_first_step_ends_with_its_code_and_one_line(number, code, caplog):
    caplog.set_level(logging.WARNING)
    end_on_signals()
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.code == code and len(caplog.messages) == 1
