from __future__ import annotations

import copy
import logging
import random
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.bidirectional_copy_paste import BidirectionalCopyPaste
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.runs.preflight import Preflight
from knowsam_monai.seeds import random_state
from knowsam_monai.teachers import SliceTeacher
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from tests.same_bits import assert_same_bits
from tests.toys import ToyStudent, ToyTeacher, toy_batches, toy_trainer


class DroppingStudent(ToyStudent):
    """Draws from all global generators in its forward."""

    def forward(self, image):
        noise = random.random() + float(np.random.rand())
        return torch.nn.functional.dropout(super().forward(image + noise), 0.2, self.training)


def run(with_preflight, stop=False):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    student, teacher = DroppingStudent().double(), ToyTeacher().double()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), gate="none")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    handlers = [SAMDistillation(distiller)]
    if with_preflight:
        handlers.append(Preflight(student, optimizer, distiller, num_rows=(6, 60), stop=stop))
    before = copy.deepcopy([*student.parameters(), *teacher.parameters()])
    trainer = toy_trainer(student, toy_batches(3), PartiallyLabeledLoss(dice_ce_loss(3)), handlers, optimizer=optimizer)
    trainer.run()
    return trainer, before, [*student.parameters(), *teacher.parameters()]


def test_trial_iterations_leave_no_trace_in_the_run():
    with_it, without = run(True)[2], run(False)[2]
    assert all(torch.equal(a, b) for a, b in zip(with_it, without))


def test_trial_iterations_leave_modes_generators_and_the_engines_state():
    student = DroppingStudent().double().eval()
    student.first.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss = PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=255))
    batches = toy_batches(3)
    ema_student = EMAStudent(student, optimizer, warm_up=False, buffers="average")
    method = BidirectionalCopyPaste(ema_student, loss, pretraining=1)
    preflight = Preflight(student, optimizer, num_rows=(2, 2), stop=True, ema_student=ema_student)
    trainer = toy_trainer(student, batches, loss, [method], optimizer=optimizer)
    found = []

    def facts():
        modes = [module.training for module in student.modules()]
        averaged = copy.deepcopy(ema_student.state_dict())
        state = {name: value for name, value in vars(trainer.state).items() if name != "times"}
        found.append((random_state(), modes, averaged, ema_student.is_followed, state))

    trainer.add_event_handler(Events.STARTED, lambda _: facts())
    preflight.attach(trainer)
    trainer.add_event_handler(Events.STARTED, lambda _: facts())
    trainer.run()
    assert_same_bits(found[0][:4], found[1][:4])
    assert found[0][4].keys() == found[1][4].keys()
    assert all(found[1][4][name] is value or found[1][4][name] == value for name, value in found[0][4].items())


def test_stop_ends_the_run_before_its_first_step():
    trainer, before, after = run(True, stop=True)
    assert trainer.state.iteration == 0 and all(torch.equal(a, b) for a, b in zip(before, after))


def test_report_says_what_the_run_is(caplog):
    with caplog.at_level(logging.INFO, logger="knowsam_monai"):
        run(True)
    text = caplog.text
    for fact in (
        "6 labeled, 60 unlabeled",
        "60 of 60 parameters train",
        "NOT pretrained",
        "3 of ",
        "peak memory",
        "expected finish",
    ):
        assert fact in text, fact


def test_report_of_a_teacher_of_slices_names_the_parts_of_sam_that_train():
    student, teacher = ToyStudent(spatial_dims=3), SliceTeacher(ToyTeacher())
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters()))
    preflight = Preflight(student, torch.optim.SGD(student.parameters()), distiller, num_rows=(6, 60))
    rows = dict(preflight._teacher_rows())
    assert (
        rows["teacher"].startswith("ToyTeacher on slices") and "image_conv 30, prompt_conv 12" in rows["teacher trains"]
    )


class CachedTeacher(ToyTeacher):
    """A frozen encoder that takes 10 seconds of `clock` for an image, which it encodes once."""

    encoder = "cached"

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.cache = EmbeddingCache(self.image_conv.requires_grad_(False), {}, shape=(3, 8, 8))

    def encode(self, image):
        self.clock.append(self.clock[-1] + 10)
        return self.image_conv(image.float())

    def forward(self, image, prompt_logits):
        return self.cache(image, self.encode) + self.prompt_conv(prompt_logits.float())


@pytest.mark.parametrize(("num_iterations", "encoded", "pays"), [(3, 8, False), (400, 44, True)])
def test_report_says_what_a_cached_encoder_will_encode_and_warns_if_the_run_is_too_short(
    num_iterations, encoded, pays, caplog, monkeypatch
):
    """6 rows in 8 orientations: 48 embeddings. The 10 seconds of each are no part of an iteration."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    teacher, student = CachedTeacher(clock), ToyStudent()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.prompt_conv.parameters()), gate="agreement")
    batches = [{key: value.float() for key, value in batch.items()} for batch in toy_batches(1)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    preflight = Preflight(student, optimizer, distiller, num_rows=(2, 4), stop=True)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, batches, loss, [], optimizer=optimizer, epoch_length=num_iterations)
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, CachedStep(distiller))
    preflight.attach(trainer)
    with caplog.at_level(logging.INFO, logger="knowsam_monai"):
        trainer.run()
    # 2, 4 and 4 rows in the trials: those without a label only behind an open gate; 4 are encoded already
    asked = 10 * num_iterations // 3
    assert (
        f"48 different, 8 of each row (0.0 GiB); the run uses {asked:,} and encodes about {encoded} of them, 10.00 s "
        f"each ({timedelta(seconds=10 * encoded)} in all)"
    ) in caplog.text
    assert (
        f"{num_iterations} of 0.00 s each" in caplog.text and f"(in {timedelta(seconds=10 * encoded)}," in caplog.text
    )
    assert ("The run is too short for a cached encoder" in caplog.text) != pays


class CachedStep:
    """What `SAMDistillation` does in a step, for a loader whose transforms nobody knows."""

    def __init__(self, distiller):
        self.distiller = distiller.train()

    def __call__(self, engine):
        output = engine.state.output
        result = self.distiller(output["image"], output["pred"], output["label"])
        output["loss"] = output["loss"] + result.loss
