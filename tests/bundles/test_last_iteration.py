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


@pytest.fixture(scope="module")
def run(small_phantom):
    options = {"dataset_dir": str(small_phantom), "use_sam": False, "mixing_weight": 0, "max_iterations": 7}
    return lambda folder: Training(folder, whole=True, epoch_length=3, lr=0.01, **options)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run").run()


def epochs(folder):
    return [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()[1:]]


def resumable(folder, iteration):
    state = torch.load(folder / f"resume_{iteration}.pt", weights_only=True)
    return state["network"], state["trainer"]["iteration"]


def test_run_trains_and_validates_exactly_what_was_asked(whole):
    assert len(whole.history) == 7 and len(epochs(whole.output_dir)) == 3
    assert whole.rates[-1] == [pytest.approx(0.01 / 7)] and whole.learning_rates() == [0]
    assert {"resume_6.pt", "resume_7.pt", "last_model_epoch=3.pt"} <= set(os.listdir(whole.output_dir))


@pytest.mark.parametrize("bundle", ["training", "training_3d"])
@pytest.mark.parametrize("last, expected", [(5, ["2", "3"]), (4, ["2"])])
def test_last_epoch_is_validated_whatever_the_interval(request, bundle, last, expected):
    options = {"use_sam": False, "mixing_weight": 0, "epoch_length": 2, "val_interval": 2, "whole": True}
    run = request.getfixturevalue(bundle)(**options, max_iterations=last).run()
    assert epochs(run.output_dir) == expected


@pytest.mark.parametrize("at", [2, 7])
def test_run_that_is_broken_off_goes_on_to_the_same_end(run, whole, tmp_path, at):
    stopped = run(tmp_path / "stopped")
    stopped.workflow.parser["train#handlers"].append(SignalBefore(at))
    with pytest.raises(SystemExit):
        stopped.run()
    on = run(tmp_path / "stopped").run()
    assert len(on.history) == 7 - at and epochs(on.output_dir) == epochs(whole.output_dir)
    (one, number), (other, _) = resumable(on.output_dir, 7), resumable(whole.output_dir, 7)
    assert number == 7 and all(torch.equal(one[name], other[name]) for name in other)
