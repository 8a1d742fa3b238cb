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
    """A frozen encoder that takes 10 seconds of `clock` for an image, which it encodes once, and 60 for its first."""

    encoder = "cached"

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.cache = EmbeddingCache(self.image_conv.requires_grad_(False), {}, shape=(3, 8, 8))

    def encode(self, image):
        self.clock.append(self.clock[-1] + (10 if self.cache.encoding_seconds else 60))
        return self.image_conv(image.float())

    def forward(self, image, prompt_logits):
        return self.cache(image, self.encode) + self.prompt_conv(prompt_logits.float())


def preflight_of_a_cached_teacher(caplog, monkeypatch, num_iterations, seconds_per_step, is_filled=False):
    """What preflight logs for 1 labeled row of 2 in a batch and 60 unlabeled ones, each in 8 orientations."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    teacher, student = CachedTeacher(clock), ToyStudent()
    batches = [{key: value.float() for key, value in batch.items()} for batch in toy_batches(1)]
    if is_filled:
        teacher.cache(batches[0]["image"], teacher.encode)
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.prompt_conv.parameters()), gate="agreement")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    preflight = Preflight(student, optimizer, distiller, num_rows=(1, 60), stop=True)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, batches, loss, [], optimizer=optimizer, epoch_length=num_iterations)
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, CachedStep(distiller, clock, seconds_per_step))
    preflight.attach(trainer)
    with caplog.at_level(logging.INFO, logger="knowsam_monai"):
        trainer.run()
    return caplog.text


@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize(("num_iterations", "encoded"), [(3, 8), (480, 359)])
def test_report_says_what_a_cached_encoder_will_encode(num_iterations, encoded, is_filled, caplog, monkeypatch):
    """
    Two labeled rows in every step and two others in two of three, since those need an open gate.

    The labeled row's 8 embeddings are asked for 6 or 960 times, which is 8 (1 - (7/8)^6) = 4.4 or 8 different ones; the
    480 others 4 or 640 times, 480 (1 - exp(-4/3)) = 353.5. 4 of 488 are encoded already.
    """
    text = preflight_of_a_cached_teacher(caplog, monkeypatch, num_iterations, 100, is_filled)
    seconds = 10 * encoded
    assert (
        f"488 different, 8 of each row (0.0 GiB); the run uses {10 * num_iterations // 3:,} and encodes about {encoded}"
        f" of them, 10.00 s each ({timedelta(seconds=seconds)} in all)"
    ) in text
    assert f"{num_iterations} of 100.00 s each" in text
    assert f"(in {timedelta(seconds=seconds + 100 * num_iterations)}," in text


@pytest.mark.parametrize(
    ("num_iterations", "seconds_per_step", "share"),
    [(3, 100, 21), (3, 20, 57), (480, 10, None), (480, 5, 60)],  # 8 of 10 and 359 of 1,600 are new, 10 s each
)
def test_a_run_that_mostly_encodes_gets_a_warning(num_iterations, seconds_per_step, share, caplog, monkeypatch):
    text = preflight_of_a_cached_teacher(caplog, monkeypatch, num_iterations, seconds_per_step)
    assert (f"takes about {share} % of this run" in text) == (share is not None)
    assert ("Encoding new images" in text) == (share is not None)
    assert "adapted" not in text


class CachedStep:
    """What `SAMDistillation` does in a step, for a loader whose transforms nobody knows; it takes some seconds."""

    def __init__(self, distiller, clock, seconds):
        self.distiller = distiller.train()
        self.clock = clock
        self.seconds = seconds

    def __call__(self, engine):
        output = engine.state.output
        result = self.distiller(output["image"], output["pred"], output["label"])
        output["loss"] = output["loss"] + result.loss
        self.clock.append(self.clock[-1] + self.seconds)
