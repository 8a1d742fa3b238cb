"""Runs of exactly the given number of iterations, interrupted and resumed or not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ignite.engine import Events

from tests.bundles.conftest import Training


class SignalBefore:
    """A handler that sends SIGTERM before a step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.GET_BATCH_COMPLETED(once=self.iteration - 1), self)  # not in the preflight

    def __call__(self, engine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def run(small_phantom, tmp_path):
    def build(name, **override):
        options = {"dataset_dir": str(small_phantom), "use_sam": False, "mixing_weight": 0, "max_iterations": 7}
        return Training(tmp_path / name, whole=True, **{**options, "epoch_length": 3, **override})

    return build


def epochs(folder):
    return [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()[1:]]


def resumable(folder, iteration):
    state = torch.load(folder / f"resume_{iteration}.pt", weights_only=True)
    return state["network"], state["trainer"]["iteration"]


def test_run_trains_and_validates_exactly_what_was_asked(run):
    done = run("whole", lr=0.01).run()
    assert len(done.history) == 7 and len(epochs(done.output_dir)) == 3
    assert done.rates[-1] == [pytest.approx(0.01 / 7)] and done.learning_rates() == [0]
    assert {"resume_6.pt", "resume_7.pt", "last_model_epoch=3.pt"} <= set(os.listdir(done.output_dir))


def test_finished_run_is_not_trained_further(run):
    run("again").run()
    again = run("again").run()
    assert again.history == [] and len(epochs(again.output_dir)) == 3


@pytest.mark.parametrize("at", [2, 7])
def test_run_that_is_broken_off_goes_on_to_the_same_end(run, at):
    whole = run("whole").run()
    stopped = run("stopped")
    stopped.workflow.parser["train#handlers"].append(SignalBefore(at))
    with pytest.raises(SystemExit):
        stopped.run()
    on = run("stopped").run()
    assert len(on.history) == 7 - at and epochs(on.output_dir) == epochs(whole.output_dir)
    (one, number), (other, _) = resumable(on.output_dir, 7), resumable(whole.output_dir, 7)
    assert number == 7 and all(torch.equal(one[name], other[name]) for name in other)
