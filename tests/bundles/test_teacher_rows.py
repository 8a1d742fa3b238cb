"""Both bundles: the teacher processes the rows that something reads, and no others."""

from __future__ import annotations

import pytest
import torch

from knowsam_monai.handlers.sam_distillation import SAMDistillation
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, Training
from tests.same_bits import assert_same_bits

LABELED, UNLABELED = 1, 2
BOTH = LABELED + UNLABELED
OPEN, SHUT = {"gate.weight": 1.0}, {"gate.weight": 0.0}
OF_UNLABELED = {"taught_rows": "unlabeled"}
# iteration, settings, rows of each call of a teacher that learns, and of a frozen one; without mixing.
# Dice of the labeled rows is logged at every second iteration. The gate is measured at 10: agreement on images and
# turned ones, and Dice of the labeled rows.
SITUATIONS = {
    "gate open": (1, OPEN, [LABELED, UNLABELED], [BOTH]),
    "gate shut": (1, SHUT, [LABELED], []),
    "gate shut, gate due": (10, SHUT, [UNLABELED] * 2 + [LABELED] * 2, [UNLABELED] * 2 + [LABELED] * 2),
    "gate shut, Dice due": (2, SHUT, [LABELED], [LABELED]),
    "weight 0": (1, OPEN | {"weight": 0.0}, [LABELED], []),
    "not started": (3, OPEN | {"start": 5}, [LABELED], []),
    "started": (5, OPEN | {"start": 5}, [LABELED, UNLABELED], [BOTH]),
    "skipped": (3, OPEN | {"every": 2}, [], []),
    "not skipped": (4, OPEN | {"every": 2}, [LABELED, UNLABELED], [BOTH]),
    "unlabeled rows": (1, OPEN | OF_UNLABELED, [LABELED, UNLABELED], [UNLABELED]),
    "unlabeled rows, gate shut": (1, SHUT | OF_UNLABELED, [LABELED], []),
    "unlabeled rows, Dice due": (2, OPEN | OF_UNLABELED, [LABELED, UNLABELED], [BOTH]),
}
# the same with mixing from iteration 2 on, in the bundle whose teacher sees whole images
WITH_MIXING = {
    "weight 0, not mixed yet": (1, OPEN | {"weight": 0.0}, [LABELED]),
    "weight 0, mixed": (3, OPEN | {"weight": 0.0}, [LABELED, UNLABELED]),
    "gate shut, mixed": (3, SHUT, [LABELED]),
    "every row taught, mixed": (3, OPEN, [LABELED, UNLABELED]),
}


class Counted:
    """A bundle's trainer, step by step; `rows_of(iteration, settings)` are the rows of each call of its teacher."""

    def __init__(self, training):
        training.workflow.initialize()
        self.training, self.trainer = training, training["train#trainer"]
        self.distillation, self.distiller = training["train#distillation"], training["distiller"]
        self.distillation.started(self.trainer)
        self.batch = next(iter(self.trainer.data_loader))
        self.calls = []
        self.distiller.teacher.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))

    def rows_of(self, iteration, settings):
        settings = {"weight": 1.0, "start": 0, "every": 1, "taught_rows": "all", **settings}
        for name in ("weight", "start", "every"):
            setattr(self.distillation, name, settings[name])
        self.distiller.taught_rows = settings["taught_rows"]
        self.distiller.gate.weight.fill_(settings["gate.weight"])
        counts = torch.full((2, 3, self.distiller.teacher.num_classes - 1), 1e9)
        counts[:, 0] = torch.tensor([[5e8], [0.0]])  # only the student agreed: one measurement opens nothing
        self.distiller.gate.agreement_counts = counts
        self.trainer.state.iteration, self.trainer.state.batch = iteration, self.batch
        self.calls.clear()
        self.trainer._process_function(self.trainer, self.batch)
        return list(self.calls)


@pytest.fixture(scope="module")
def counted(small_phantom, small_volumes, small_teachers, tmp_path_factory):
    built = {}

    def build(configs, frozen, **options):
        key = (configs, frozen, *options)
        if key not in built:
            options |= {"labeled_batch_size": LABELED, "unlabeled_batch_size": UNLABELED, "log_interval": 2}
            options |= {"dataset_dir": str(small_phantom if configs == CONFIGS else small_volumes)}
            options |= small_teachers(configs, "network") if frozen else {}
            overlays = ("teacher_network.json",) if frozen else ()
            folder = tmp_path_factory.mktemp("output")
            built[key] = Counted(Training(folder, configs=configs, overlays=overlays, **options))
        return built[key]

    return build


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=lambda configs: configs.parent.name)
@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_rows_that_enter_the_teacher(counted, configs, frozen, situation):
    iteration, settings, learning_rows, frozen_rows = SITUATIONS[situation]
    rows = counted(configs, frozen, mixing_weight=0.0).rows_of(iteration, settings)
    assert rows == (frozen_rows if frozen else learning_rows)


@pytest.mark.parametrize("situation", WITH_MIXING)
def test_rows_that_enter_the_teacher_when_mixing_reads_its_labels(counted, situation):
    iteration, settings, expected = WITH_MIXING[situation]
    assert counted(CONFIGS, False, mixing_start=2, max_iterations=3).rows_of(iteration, settings) == expected


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=lambda configs: configs.parent.name)
def test_rows_that_are_left_out_change_no_bit_of_student_and_teacher(
    configs, small_phantom, small_volumes, tmp_path, monkeypatch
):
    """While the gate is shut; with a frozen teacher, the same holds up to the batch size of its calls."""
    dataset_dir = str(small_phantom if configs == CONFIGS else small_volumes)
    options = {"max_iterations": 3, "mixing_start": 2, "distillation_gate": "validation", "dataset_dir": dataset_dir}
    ours = Training(tmp_path / "ours", configs=configs, **options).run()
    step, calls = SAMDistillation.__call__, []

    def read_every_row(handler, engine):
        forward = handler.distiller.forward
        handler.distiller.forward = lambda *args: forward(*args[:6], also_read=("labeled", "unlabeled"))
        handle = handler.distiller.teacher.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        step(handler, engine)
        handle.remove()
        del handler.distiller.forward

    monkeypatch.setattr(SAMDistillation, "__call__", read_every_row)
    whole = Training(tmp_path / "whole", configs=configs, **options).run()
    assert calls == [2, 2] * 3
    for name in ("network", "teacher"):
        assert_same_bits(ours[name].state_dict(), whole[name].state_dict())
