"""Which handlers a run has, in which order and on which process, and how MONAI's handlers log the terms of the loss."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.handlers import MLFlowHandler

from knowsam_monai.handlers import LossTerms
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.runs import (
    Resume,
    ValidationReport,
    WholeCheckpointSaver,
    track_terms,
    training_handlers,
    validation_handlers,
)
from knowsam_monai.runs.run_handlers import StudentCurves
from tests.runs.test_validation_report import NAMES
from tests.toys import ToyStudent, toy_batches, toy_trainer


@pytest.fixture
def built(tmp_path, monkeypatch):
    """`built(rank, preflight)`: the handlers of a trainer and of its evaluator."""

    def build(rank=0, preflight=False):
        monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: rank)
        network = ToyStudent()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer)
        best = WholeCheckpointSaver(save_dir=str(tmp_path), save_dict={"model": network}, save_key_metric=True)
        evaluator, method, own = Engine(lambda engine, batch: None), torch.nn.Identity(), torch.nn.Softmax()
        state = {"network": network, "optimizer": optimizer, "lr_scheduler": scheduler, "distiller": None}
        options = {"output_dir": tmp_path, "preflight": preflight}
        training = training_handlers(
            [method, None], [own], state, evaluator, best, max_iterations=4, num_rows=(1, 2), **options
        )
        report = ValidationReport(tmp_path, NAMES)
        return training, validation_handlers(report, best, [own], class_names=NAMES, **options)

    return build


def names(handlers):
    return [type(handler).__name__ for handler in handlers]


FIRST = ["StudentCurves", "Identity", "LrScheduleHandler", "LossTerms"]
LAST = ["Softmax", "Resume", "RunRecord", "Preflight"]


@pytest.mark.parametrize(
    "options, of_training, of_validation",
    [
        (
            {},
            ["TrainingProgress", "TensorBoardStatsHandler", "WholeCheckpointSaver"],
            ["WholeCheckpointSaver", "TensorBoardStatsHandler"],
        ),
        ({"preflight": True}, ["TrainingProgress"], ["WholeCheckpointSaver"]),
        ({"rank": 1}, [], []),
    ],
    ids=["first process", "preflight", "second process"],
)
def test_only_the_first_process_shows_logs_and_saves_weights(built, options, of_training, of_validation):
    training, validation = built(**options)
    last = [name for name in LAST if not (options.get("preflight") and name == "RunRecord")]  # it writes nothing
    assert names(training) == [*FIRST, *of_training, *last, "LastIteration"]
    assert names(validation) == ["ValidationReport", "Softmax", "ValidationHistory", *of_validation]
    (resume,) = [handler for handler in training if isinstance(handler, Resume)]
    assert (resume.best_saver is None) == (options.get("rank", 0) > 0)
    assert resume.saves != options.get("preflight", False)


def logging_handler(monkeypatch):
    """MONAI's handler, with a list in place of a database."""
    logged = []
    handler = object.__new__(MLFlowHandler)
    handler.iteration_log, handler.epoch_log, handler.close_on_complete = True, False, False
    handler.iteration_logger, handler.optimizer_param_names = None, ()
    monkeypatch.setattr(handler, "start", lambda engine: None, raising=False)
    monkeypatch.setattr(handler, "complete", lambda: None, raising=False)
    monkeypatch.setattr(handler, "_log_metrics", lambda metrics, step: logged.append((step, metrics)), raising=False)
    return handler, logged


def test_every_term_is_logged_by_name_each_log_interval(monkeypatch):
    handler, logged = logging_handler(monkeypatch)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    handlers = track_terms([LossTerms(), handler], log_interval=2)
    trainer = toy_trainer(ToyStudent().double(), toy_batches(5), loss, handlers)
    trainer.run()
    assert [step for step, _ in logged] == [2, 4]
    assert all(set(metrics) == {"loss"} and metrics["loss"].ndim == 0 for _, metrics in logged)


def test_other_handlers_pass_as_they_are():
    handlers = (LossTerms(7), torch.nn.Identity())
    assert track_terms(handlers) == list(handlers) and handlers[0].log_interval == 7


def test_mlflow_has_the_terms_in_its_database(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install 'knowsam-monai[mlflow]')")
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    handlers = track_terms([MLFlowHandler(tracking_uri=uri, run_name="toy")], log_interval=1)
    toy_trainer(ToyStudent().double(), toy_batches(3), PartiallyLabeledLoss(dice_ce_loss(3)), handlers).run()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]


class Doubling:
    """A method that adds the loss once more."""

    def attach(self, engine):
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine):
        engine.state.output["loss"] = 2 * engine.state.output["loss"]


def test_supervised_loss_is_that_before_the_methods_and_the_rate_is_the_optimizer_s():
    student, loss = ToyStudent().double(), PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, toy_batches(1), loss, [StudentCurves(), Doubling()], lr=0.25)
    trainer.run()
    output = trainer.state.output
    assert output["supervised_loss"] == pytest.approx(output["loss"].item() / 2)
    assert torch.equal(output["learning_rate"], output["loss"].new_tensor(0.25))
    assert not output["supervised_loss"].requires_grad
