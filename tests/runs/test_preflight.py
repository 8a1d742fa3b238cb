from __future__ import annotations

import copy
import logging
import random

import numpy as np
import torch
from ignite.engine import Events

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.bidirectional_copy_paste import BidirectionalCopyPaste
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.runs.preflight import Preflight
from knowsam_monai.seeds import random_state
from knowsam_monai.teachers import SliceTeacher
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
