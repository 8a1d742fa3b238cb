from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from knowsam_monai.handlers.mean_teacher import MeanTeacher
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.noisy_passes import NoisyPasses
from tests.hosts import CASES, NotingInferer, assert_same_weights, hand_written_noise, hand_written_run, toy_host
from tests.toys import toy_batches, toy_trainer


def build(network, lr=0.1, **kwargs):
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    return optimizer, MeanTeacher(EMAStudent(network, optimizer), **kwargs)


@pytest.mark.parametrize("num_classes, size", CASES)
@pytest.mark.parametrize("with_sam", [False, True])
@pytest.mark.parametrize("rows", ["unlabeled", "all"])
def test_three_trainer_steps_equal_hand_written_ones(num_classes, size, with_sam, rows):
    student, batches, distiller = toy_host(num_classes, size)
    other, other_distiller = copy.deepcopy((student, distiller))
    weight, loss = SigmoidRampUp(3, max=20.0), PartiallyLabeledLoss(dice_ce_loss(num_classes))
    optimizer, handler = build(student, weight=weight, start=2, rows=rows)
    handlers = [handler, SAMDistillation(distiller)] if with_sam else [handler]
    trainer = toy_trainer(student, batches, loss, handlers, optimizer=optimizer)
    trainer.run()
    taught = slice(2, None) if rows == "unlabeled" else slice(None)
    terms = []

    def term(t, batch, pred, ema):
        if t == 1:
            return 0.0
        image = batch["image"][taught]
        with torch.no_grad():
            target = ema(image + hand_written_noise(image, t)[0]).softmax(1)
        terms.append(weight(t) * (pred[taught, 0].softmax(1) - target).square().mean())
        return terms[-1]

    ema = hand_written_run(other, batches, loss, term, other_distiller.train() if with_sam else None)
    assert_same_weights(student, other)
    assert_same_weights(handler.ema_student.network, ema)
    assert_same_weights(distiller.teacher, other_distiller.teacher)
    assert not trainer.state.output["consistency_loss"].requires_grad
    torch.testing.assert_close(trainer.state.output["consistency_loss"], terms[-1].detach(), rtol=1e-10, atol=1e-12)
    assert terms[-1] > 1e-5


@pytest.mark.parametrize("options", [{"start": 4}, {"start": 0, "weight": 0.0}])
def test_nothing_but_averaging_happens_before_the_start_or_without_weight(options):
    student, batches, _ = toy_host(2, (8, 8))
    alone = copy.deepcopy(student)
    optimizer, handler = build(student, **options)
    seen = []
    handler.ema_student.network.register_forward_hook(lambda *_: seen.append(1))
    loss = PartiallyLabeledLoss(dice_ce_loss(2))
    trainer = toy_trainer(student, batches, loss, [handler], optimizer=optimizer)
    trainer.run()
    toy_trainer(alone, batches, loss, []).run()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters()))
    assert not seen and "consistency_loss" not in trainer.state.output
    assert handler.ema_student.average.n_averaged == 4


def test_students_dropout_draws_the_same_with_and_without_it():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Dropout(0.5)).double()
    draws = []
    student.register_forward_hook(lambda module, args, out: draws.append((out == 0).detach()))
    batches = toy_batches(3, num_classes=2)
    for lr_handlers in (True, False):
        torch.manual_seed(1)
        optimizer, handler = build(student, lr=0.0, weight=1.0, start=0)
        handlers = [handler] if lr_handlers else []
        toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(2)), handlers, optimizer=optimizer).run()
    students = [mask for mask in draws if len(mask) == 4]  # the averaged copy carries the hook too, with 2 rows
    assert len(students) == 6 and len(draws) == 9
    assert all(torch.equal(a, b) for a, b in zip(students[:3], students[3:]))


def test_average_sees_the_noise_of_the_seed_and_the_trainers_inferer_calls_it():
    student, batches, _ = toy_host(2, (8, 8))
    optimizer, handler = build(student, start=0, seed=3)
    inferer, image = NotingInferer(), batches[0]["image"][2:]
    loss = PartiallyLabeledLoss(dice_ce_loss(2))
    toy_trainer(student, batches[:1], loss, [handler], optimizer=optimizer, inferer=inferer).run()
    noisy = image + NoisyPasses(handler.ema_student, seed=3).noise(image, iteration=1)[0]
    assert torch.equal(inferer.inputs[handler.ema_student.network], noisy)


def test_unknown_rows_are_an_error():
    student = toy_host(2, (8, 8))[0]
    with pytest.raises(ValueError, match="`rows` must be 'unlabeled' or 'all' but is 'labeled'"):
        build(student, rows="labeled")
