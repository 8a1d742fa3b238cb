from __future__ import annotations

import copy
import os
import re
import signal

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.handlers import StatsHandler, ValidationHandler
from torch import nn

from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.runs import TrainingProgress, WholeCheckpointSaver, cpu
from knowsam_monai.runs.resume import Resume
from tests.toys import ToyStudent, toy_batches, toy_trainer


class DropoutStudent(ToyStudent):
    """Draws from torch's generator in each step, so that a run which does not restore it goes another way."""

    def forward(self, image):
        return super().forward(nn.functional.dropout(image, 0.5, training=self.training))


class Batches(list):
    """A loader that knows its place, as SemiSupervisedLoader does: batch k of the run is batch k of the list."""

    next_iteration = 0

    def set_iteration(self, iteration):
        self.next_iteration = iteration

    def __iter__(self):
        while True:
            batch = self[self.next_iteration % len(self)]
            self.next_iteration += 1
            yield batch


def training(
    folder,
    stop_after=None,
    epochs=3,
    epoch_length=2,
    accumulation_steps=1,
    validate=None,
    before=(),
    between=(),
    **resume,
):
    """
    A trainer of 2 steps an epoch, its student and the handler.

    `stop_after` breaks it off there; `validate(epoch, volume)` is called for both volumes of a validation an epoch,
    which draws from torch's generator and whose result spoils the student; `before` are handlers that stand first,
    `between` those between the validation and the handler.
    """
    torch.manual_seed(0)
    student = DropoutStudent().double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    evaluator = None
    if validate is not None:
        evaluator = toy_evaluator(student, validate)
        resume["evaluator"] = evaluator
    handler = Resume({"network": student, "optimizer": optimizer, "nothing": None}, folder, **resume)
    trainer = toy_trainer(
        student,
        Batches(toy_batches(5)),
        PartiallyLabeledLoss(dice_ce_loss(3)),
        [
            *before,
            *([] if evaluator is None else [ValidationHandler(interval=1, validator=evaluator)]),
            *between,
            handler,
        ],
        optimizer=optimizer,
        max_epochs=epochs,
        epoch_length=epoch_length,
        accumulation_steps=accumulation_steps,
    )
    if stop_after is not None:

        def stop(engine):
            if engine.state.iteration == stop_after:
                handler.signals.give_back()
                raise KeyboardInterrupt

        trainer.add_event_handler(Events.ITERATION_STARTED, stop)
    return trainer, student, handler


def toy_evaluator(student, validate):
    """Two volumes, after which the student is moved by a number drawn in their course, as a gate's weight would."""
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), [{"image": torch.rand(1, 1, 4, 4).double()} for _ in range(2)], student, decollate=False
    )
    drawn = []

    def validated(engine):
        validate(engine.state.epoch, engine.state.iteration)
        drawn.append(torch.rand(()).double())

    def completed(engine):
        with torch.no_grad():
            student.first.bias.add_(sum(drawn[-2:]))

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, validated)
    evaluator.add_event_handler(Events.COMPLETED, completed)
    return evaluator


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def run(trainer):
    try:
        trainer.run()
    except KeyboardInterrupt:
        return False
    return True


@pytest.mark.parametrize("stop_after", [3, 4, 5])
def test_resumed_run_ends_with_the_same_bits(tmp_path, stop_after):
    whole, expected, _ = training(tmp_path / "whole")
    assert run(whole)
    broken, _, _ = training(tmp_path / "broken", stop_after=stop_after)
    assert not run(broken)
    torch.manual_seed(7)  # another process
    resumed, student, _ = training(tmp_path / "broken")
    assert run(resumed) and resumed.state.iteration == 6
    for ours, theirs in zip(student.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs)


def test_resumed_run_multiplies_matrices_as_the_interrupted_one(tmp_path, monkeypatch):
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # by a measurement, which may find something else the next time
        run(training(tmp_path, stop_after=3)[0])
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(cpu, "_largest_error", lambda: 0.0)
        run(training(tmp_path)[0])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_signal_saves_after_the_step_and_the_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    whole, expected, _ = training(tmp_path / "whole")
    assert run(whole)

    before = signal.getsignal(signal.SIGTERM)
    stopped, _, handler = training(tmp_path / "stopped")
    stopped.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        stopped.run()
    assert stop.value.code == 143 and handler.files()[0].name == "resume_3.pt"
    assert signal.getsignal(signal.SIGTERM) is before
    resumed, student, _ = training(tmp_path / "stopped")
    assert run(resumed) and resumed.state.iteration == 6
    for ours, theirs in zip(student.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("epoch,volume", [(2, 1), (2, 2), (3, 1)])
def test_validation_in_which_a_signal_comes_is_made_again(tmp_path, epoch, volume):
    seen = []
    whole, expected, _ = training(tmp_path / "whole", validate=lambda *place: seen.append(place))
    assert run(whole)

    def signal_in_validation(*place):
        if place == (epoch, volume):
            os.kill(os.getpid(), signal.SIGINT)

    stopped, _, handler = training(tmp_path / "stopped", validate=signal_in_validation)
    with pytest.raises(SystemExit) as stop:
        stopped.run()
    assert stop.value.code == 130 and handler.files()[0].name == f"resume_{2 * epoch}.pt"
    again = []
    resumed, student, _ = training(tmp_path / "stopped", validate=lambda *place: again.append(place))
    assert run(resumed) and resumed.state.iteration == 6
    assert again == seen[2 * epoch - 2 :] and same_bits(student, expected)


class Halving:
    """After each epoch, halve the learning rate."""

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine):
        engine.optimizer.param_groups[0]["lr"] /= 2


@pytest.mark.parametrize("between, file", [((), "resume_4.pt"), ((Halving(),), "resume_2.pt")])
@pytest.mark.parametrize("volume", [1, 2])
def test_run_that_is_killed_in_a_validation_resumes_with_it(tmp_path, between, file, volume):
    whole, expected, _ = training(tmp_path / "whole", validate=lambda *place: None, between=between)
    assert run(whole)

    def killed(*place):
        if place == (2, volume):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped, _, handler = training(tmp_path / "stopped", validate=killed, between=between)
    with pytest.raises(SystemExit) as stop:
        stopped.run()
    handler.signals.give_back()
    assert stop.value.code == 143 and handler.files()[0].name == file
    again = []
    resumed, student, _ = training(tmp_path / "stopped", validate=lambda *place: again.append(place), between=between)
    assert run(resumed) and again == [(2, 1), (2, 2), (3, 1), (3, 2)] and same_bits(student, expected)


def test_validation_whose_worker_the_same_signal_ended_is_made_again(tmp_path):
    whole, expected, _ = training(tmp_path / "whole", validate=lambda *place: None)
    assert run(whole)

    def die(epoch, volume):
        if (epoch, volume) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    stopped, _, handler = training(tmp_path / "stopped", validate=die, before=[TrainingProgress()])
    with pytest.raises(SystemExit) as stop:
        stopped.run()
    assert stop.value.code == 143 and handler.files()[0].name == "resume_4.pt"
    resumed, student, _ = training(tmp_path / "stopped", validate=lambda *place: None)
    assert run(resumed) and same_bits(student, expected)


def test_signal_in_the_last_step_of_an_epoch_leaves_no_validation_out(tmp_path):
    whole, expected, _ = training(tmp_path / "whole", validate=lambda *place: None)
    assert run(whole)
    stopped, _, handler = training(tmp_path / "stopped", validate=lambda *place: None)
    stopped.add_event_handler(Events.ITERATION_STARTED(once=2), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        stopped.run()
    resumed, student, _ = training(tmp_path / "stopped", validate=lambda *place: None)
    assert run(resumed) and same_bits(student, expected)


def test_run_stops_between_two_steps_of_the_optimizer_when_gradients_are_accumulated(tmp_path):
    settings = {"epoch_length": 5, "accumulation_steps": 2, "epochs": 2}
    whole, expected, _ = training(tmp_path / "whole", **settings)
    assert run(whole)
    stopped, _, handler = training(tmp_path / "stopped", **settings)
    stopped.add_event_handler(Events.ITERATION_STARTED(once=6), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        stopped.run()
    assert handler.files()[0].name == "resume_7.pt"
    resumed, student, _ = training(tmp_path / "stopped", **settings)
    assert run(resumed) and same_bits(student, expected)


@pytest.mark.parametrize(
    "before", [(), (TrainingProgress(),), (StatsHandler(output_transform=lambda _: None), TrainingProgress())]
)
def test_worker_that_the_same_signal_ended_is_no_error_whatever_stands_before(tmp_path, before):
    whole, expected, _ = training(tmp_path / "whole")
    assert run(whole)

    class Dying(Batches):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
                yield batch

    stopped, _, handler = training(tmp_path / "stopped", before=before)
    stopped.data_loader = stopped.state.dataloader = Dying(toy_batches(5))
    with pytest.raises(SystemExit) as stop:
        stopped.run()
    assert stop.value.code == 143 and handler.files()[0].name == "resume_3.pt"
    resumed, student, _ = training(tmp_path / "stopped")
    assert run(resumed) and same_bits(student, expected)


def test_error_of_a_step_in_which_a_signal_came_is_an_error(tmp_path):
    trainer, _, handler = training(tmp_path)

    def fail(_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("out of memory")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=4), fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run()
    assert handler.files()[0].name == "resume_2.pt"


def test_worker_that_a_signal_ended_before_the_first_step_saves_nothing_and_is_no_error(tmp_path):
    trainer, _, handler = training(tmp_path)

    def fail(_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    trainer.add_event_handler(Events.STARTED, fail)
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == 143 and not handler.files()


def test_best_metric_goes_on_so_that_a_worse_model_takes_no_ones_place(tmp_path):
    def best_of(folder, metrics, epochs):
        trainer, student, handler = training(folder, epochs=epochs, validate=lambda *place: None)
        evaluator = handler.evaluator
        saver = WholeCheckpointSaver(
            str(folder), {"model": student}, save_key_metric=True, key_metric_filename="model.pt"
        )
        handler.best_saver = saver
        evaluator.state.key_metric_name = "dice"

        def measured(engine):
            engine.state.metrics["dice"] = metrics[engine.state.epoch - 1]
            if metrics[engine.state.epoch - 1] > engine.state.best_metric:
                engine.state.best_metric, engine.state.best_metric_epoch = (
                    engine.state.metrics["dice"],
                    engine.state.epoch,
                )

        evaluator.add_event_handler(Events.EPOCH_COMPLETED, measured)
        saver.attach(evaluator)
        assert run(trainer)
        return evaluator.state.best_metric, (folder / "model.pt").stat().st_mtime_ns

    first = best_of(tmp_path, [0.9], epochs=1)
    assert best_of(tmp_path, [0.9, 0.5], epochs=2) == first
    best, when = best_of(tmp_path, [0.9, 0.5, 0.95], epochs=3)
    assert best == 0.95 and when > first[1]


def test_newest_file_is_the_one_of_the_largest_iteration(tmp_path):
    for name in ("resume_8.pt", "resume_10.pt", "resume_9.pt", "resume_11.pt.tmp", "resume_x.pt"):
        (tmp_path / name).touch()
    files = Resume({}, tmp_path).files()
    assert [file.name for file in files] == ["resume_10.pt", "resume_9.pt", "resume_8.pt"]


class DoublingScaler:
    """A GradScaler that doubles its scale of 8 after each step."""

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)  # `run` makes one for CUDA


def test_scale_of_a_gradscaler_goes_on(tmp_path):
    for epochs, scale in ((1, 8 * 2**2), (2, 8 * 2**4)):
        trainer, _, _ = training(tmp_path, epochs=epochs, before=[DoublingScaler()])
        trainer.amp = True
        assert run(trainer) and trainer.scaler.get_scale() == scale


def test_two_files_are_kept_and_a_torn_one_falls_back_to_the_one_before(tmp_path, caplog):
    trainer, expected, handler = training(tmp_path)
    assert run(trainer)
    assert [file.name for file in handler.files()] == ["resume_6.pt", "resume_4.pt"]
    newest = handler.files()[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    resumed, student, _ = training(tmp_path)
    seen = []

    resumed.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.iteration))
    assert run(resumed) and seen == [5, 6]
    assert "resume_6.pt: it " in caplog.text
    for ours, theirs in zip(student.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs)


def test_finished_run_says_so_and_trains_no_more(tmp_path, caplog):
    trainer, expected, _ = training(tmp_path)
    assert run(trainer)
    again, student, _ = training(tmp_path)
    again.add_event_handler(Events.ITERATION_STARTED, lambda: pytest.fail("trained"))
    assert run(again)
    assert "has finished its 6 iterations" in caplog.text
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(student.parameters(), expected.parameters()))


def test_trainer_that_goes_on_keeps_the_weights_that_it_was_given_in_between(tmp_path):
    """As in each round of federated learning."""
    trainer, student, handler = training(tmp_path, epochs=2)
    assert run(trainer) and handler.files()[0].name == "resume_4.pt"
    for parameter in student.parameters():
        nn.init.zeros_(parameter)
    started_with = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=5), lambda: started_with.extend(p.clone() for p in student.parameters())
    )
    trainer.state.max_epochs = 3
    next(iter(trainer.data_loader))  # of somebody who looks at a batch
    assert run(trainer) and trainer.state.iteration == 6
    assert started_with and not any(parameter.any() for parameter in started_with)
    assert trainer.data_loader.next_iteration == 6


def test_run_that_its_validation_stopped_early_is_finished_too(tmp_path, caplog):
    def stopping_early():
        trainer, student, handler = training(tmp_path, epochs=4, validate=lambda *place: None)
        stops = Events.COMPLETED(event_filter=lambda *_: trainer.state.epoch == 2)
        handler.evaluator.add_event_handler(stops, lambda _: trainer.terminate())  # as EarlyStopHandler does
        return trainer, student, handler

    trainer, expected, _ = stopping_early()
    for _ in range(2):  # and with the same trainer
        assert run(trainer) and trainer.state.iteration == 4
    for _ in range(2):
        again, student, _ = stopping_early()
        again.add_event_handler(Events.ITERATION_STARTED, lambda: pytest.fail("trained"))
        assert run(again) and same_bits(student, expected)
    assert caplog.text.count("has finished its 4 iterations") == 3


def test_run_that_was_terminated_inside_an_epoch_resumes(tmp_path):
    """As by Ignite's TimeLimit."""
    trainer, *_ = training(tmp_path)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: trainer.terminate())
    assert run(trainer) and trainer.state.iteration == 3
    again, *_ = training(tmp_path)
    assert run(again) and again.state.iteration == 6


def test_repeated_validation_may_stop_the_run_early(tmp_path):
    def signal_in_validation(*place):
        if place == (2, 1):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        training(tmp_path, validate=signal_in_validation)[0].run()
    for _ in range(2):
        again, _, handler = training(tmp_path, validate=lambda *place: None)
        handler.evaluator.add_event_handler(Events.COMPLETED, lambda _: again.terminate())
        again.add_event_handler(Events.ITERATION_STARTED, lambda: pytest.fail("trained"))
        assert run(again) and handler.files()[0].name == "resume_4.pt"


def test_stop_before_the_first_step_finishes_nothing(tmp_path):
    stopped, _, handler = training(tmp_path)
    stopped.add_event_handler(Events.STARTED, lambda engine: engine.terminate())
    assert run(stopped) and not handler.files()
    trainer, _, _ = training(tmp_path)
    assert run(trainer) and trainer.state.iteration == 6


def test_flag_starts_afresh_and_removes_the_run_before(tmp_path):
    assert run(training(tmp_path)[0])
    for name in ("model.pt", "last_model_epoch=3.pt", "results.csv", "mine.pt"):
        (tmp_path / name).touch()
    trainer, _, handler = training(tmp_path, enabled=False, save=False, epochs=1)  # a preflight
    assert run(trainer) and (tmp_path / "model.pt").exists() and len(handler.files()) == 2
    trainer, _, handler = training(tmp_path, enabled=False, epochs=1)
    assert run(trainer) and {path.name for path in tmp_path.iterdir()} == {"mine.pt", "resume_2.pt"}
    assert [file.name for file in handler.files()] == ["resume_2.pt"]
    (tmp_path / "model.pt").touch()
    trainer.state.max_epochs = 2
    assert run(trainer) and (tmp_path / "model.pt").exists()  # the same run goes on


DATA = {"labeled": [("a.nii", "07"), ("b.nii", "1e")], "validation": [("c.nii", "5f")]}


def test_other_settings_and_data_are_refused_by_name_and_nothing_is_deleted(tmp_path):
    assert run(training(tmp_path, settings={"seed": 0, "lr": 0.1, "sizes": [1] * 100}, data=DATA)[0])
    before = sorted(tmp_path.iterdir())
    others = {**DATA, "labeled": [("/moved/a.nii", "07"), ("/moved/b.nii", "00")]}
    trainer, student, _ = training(tmp_path, settings={"seed": 1, "lr": 0.1, "sizes": [2] * 100}, data=others)
    with pytest.raises(ValueError) as error:
        trainer.run()
    assert re.fullmatch(
        r"This run differs from the one in .*/resume_6.pt: `seed` must be 0 but is 1, `sizes` must be "
        r"\[1, 1, .*….* but is \[2, 2, .*….*, /moved/b.nii or its label must be unchanged but is new or has "
        r"different content; choose another --output_dir, or start over with --resume False, which replaces that run\.",
        str(error.value),
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("settings", [None, {"lr": 0.1}])
def test_what_is_not_known_of_either_start_is_not_compared(tmp_path, settings):
    assert run(training(tmp_path, settings=settings, data=DATA if settings else None, epochs=1)[0])
    again, _, _ = training(tmp_path, settings=None if settings else {"lr": 0.1}, data=None if settings else DATA)
    assert run(again) and again.state.iteration == 6


@pytest.mark.parametrize("content", [torch.zeros(3), {"weight": torch.zeros(3)}, [1], "text", {}, None])
def test_file_of_something_else_is_skipped_for_the_previous_one(tmp_path, caplog, content):
    trainer, expected, handler = training(tmp_path)
    assert run(trainer)
    torch.save(content, tmp_path / "resume_6.pt")
    resumed, student, _ = training(tmp_path)
    assert run(resumed) and same_bits(student, expected)
    assert "resume_6.pt: it holds something else" in caplog.text
    assert "Resuming from" in caplog.text and [f.name for f in handler.files()] == ["resume_6.pt", "resume_4.pt"]


SPOILED = {
    "object is missing": (lambda state: state.pop("network"), "lacks `network`: it was written for other objects"),
    "of another version": (
        lambda state: [state.pop("settings"), state.pop("data")],
        "lacks `data`, `settings`: it was",
    ),
    "other shapes": (
        lambda state: state["network"].update({"first.bias": torch.zeros(9)}),
        "RuntimeError: Error.*bias",
    ),
    "other state": (lambda state: state.update(trainer=5), "TypeError: "),
    "no random state": (lambda state: state.update(random=[{}]), "KeyError: 'torch'"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_file_of_other_objects_is_one_sentence_and_stays(tmp_path, name):
    spoil, reason = SPOILED[name]
    assert run(training(tmp_path)[0])
    state = torch.load(tmp_path / "resume_6.pt", weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "resume_6.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"^.*resume_6.pt must .*{reason}.*; choose another --output_dir") as error:
        training(tmp_path)[0].run()
    assert "\n" not in str(error.value) and {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_flipped_bytes_in_a_file_are_found_and_the_one_before_is_taken(tmp_path, caplog):
    trainer, expected, _ = training(tmp_path)
    assert run(trainer)
    content = bytearray((tmp_path / "resume_6.pt").read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 200):
        content[place] ^= 255
    (tmp_path / "resume_6.pt").write_bytes(content)
    resumed, student, _ = training(tmp_path)
    assert run(resumed) and same_bits(student, expected) and "is damaged: its checksum" in caplog.text


def test_run_that_starts_over_beside_damaged_files_keeps_its_own(tmp_path):
    for number in (90, 80):
        (tmp_path / f"resume_{number}.pt").write_bytes(b"torn")
    broken, _, handler = training(tmp_path, stop_after=4)
    assert not run(broken)
    assert "resume_2.pt" in [file.name for file in handler.files()]
    resumed, student, _ = training(tmp_path)
    seen = []
    resumed.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.iteration))
    assert run(resumed) and seen == [3, 4, 5, 6]
    assert [file.name for file in handler.files()] == ["resume_6.pt", "resume_4.pt"]


def test_file_that_cannot_be_written_is_one_sentence_that_says_how_to_go_on(tmp_path):
    trainer, _, handler = training(tmp_path)
    missing = tmp_path / "gone" / "events"
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: missing.open("a"))
    with pytest.raises(RuntimeError) as error:
        trainer.run()
    assert str(error.value) == (
        f"`output_dir` must be readable and have free space but {missing} cannot be read or written (No such file or "
        "directory); fix this and run the same command: it resumes from resume_2.pt."
    )


def test_nothing_is_written_when_it_only_reads(tmp_path):
    trainer, _, handler = training(tmp_path, save=False)
    assert run(trainer) and not handler.files() and not handler.signals._previous
    assert copy.copy(handler.objects).keys() == {"network", "optimizer"}


def test_signal_that_arrives_while_processes_agree_is_kept_for_the_next_time(monkeypatch, tmp_path):
    resume = Resume({"network": torch.nn.Linear(1, 1)}, output_dir=tmp_path)

    def signal_comes_meanwhile(value, op):
        resume.signals.received = signal.SIGTERM
        return value

    monkeypatch.setattr("knowsam_monai.ranks.world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.all_reduce", signal_comes_meanwhile)
    assert not resume._must_stop() and resume.signals.received == signal.SIGTERM
    assert resume._must_stop()
