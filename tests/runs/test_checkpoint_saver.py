from __future__ import annotations

import pytest
import torch
from ignite.engine import Events

from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.runs import WholeCheckpointSaver
from tests.toys import ToyStudent, toy_batches, toy_trainer


def run(folder, spoil=None, metric=lambda epoch: epoch, **options):
    """Three epochs of one step; `spoil(student, epoch)` acts before the saver, `metric(epoch)` is the key metric."""
    student = ToyStudent().double()
    saver = WholeCheckpointSaver(str(folder), {"model": student}, **options)
    trainer = toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [saver], max_epochs=3)
    trainer.state.key_metric_name = "dice"

    def before(engine):
        engine.state.metrics["dice"] = metric(engine.state.epoch)
        if spoil is not None:
            spoil(student, engine.state.epoch)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, before)
    return trainer, student


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_best_model_is_a_plain_state_dict_under_its_name(tmp_path):
    trainer, student = run(tmp_path, save_key_metric=True, key_metric_filename="model.pt")
    trainer.run()
    assert names(tmp_path) == ["model.pt"]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in student.state_dict().items())


def test_worse_model_does_not_take_its_place(tmp_path):
    trainer, student = run(tmp_path, metric=lambda epoch: -epoch, save_key_metric=True, key_metric_filename="model.pt")
    trainer.run()
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not any(torch.equal(saved[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"save_key_metric": True, "key_metric_filename": "model.pt"}, {"save_interval": 1}]
)
def test_better_model_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, options):
    real, calls = torch.save, []

    def save(content, file):
        calls.append(file.name)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", save)
    trainer, _ = run(tmp_path, n_saved=1, **options)
    with pytest.raises(RuntimeError, match="must have room for model.*No space left"):
        trainer.run()
    assert names(tmp_path) == ["model.pt" if "save_key_metric" in options else "model_epoch=1.pt"]
    assert torch.load(tmp_path / names(tmp_path)[0], weights_only=True)


def test_last_one_alone_stays(tmp_path):
    trainer, _ = run(tmp_path, save_interval=1, n_saved=1, file_prefix="last")
    trainer.run()
    assert names(tmp_path) == ["last_model_epoch=3.pt"]


@pytest.mark.parametrize("n_saved,kept", [(1, [3]), (2, [2, 3]), (5, [0, 1, 2, 3]), (None, [0, 1, 2, 3, 7, 12])])
@pytest.mark.parametrize("file_prefix,name", [("last", "last_model"), ("", "model")])
def test_files_of_an_earlier_start_count_and_those_of_steps_that_are_made_again_go(
    tmp_path, n_saved, kept, file_prefix, name
):
    others = ["model.pt", "last_model_epoch=best.pt", "other_model_epoch=1.pt"]
    for file in [*others, *(f"{name}_epoch={number}.pt" for number in (0, 1, 7, 12))]:
        (tmp_path / file).touch()
    trainer, _ = run(tmp_path, save_interval=1, n_saved=n_saved, file_prefix=file_prefix)
    trainer.run()
    assert names(tmp_path) == sorted([*others, *(f"{name}_epoch={number}.pt" for number in kept)])


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    def spoil(student, epoch):
        if epoch == 2:
            torch.nn.init.constant_(student.first.bias, float("nan"))

    trainer, _ = run(tmp_path, spoil, save_key_metric=True, key_metric_filename="model.pt")
    with pytest.raises(RuntimeError, match="`first.bias` is not, so .*model.pt was not written"):
        trainer.run()
    assert all(value.isfinite().all() for value in torch.load(tmp_path / "model.pt").values())
