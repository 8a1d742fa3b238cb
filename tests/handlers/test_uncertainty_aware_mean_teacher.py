from __future__ import annotations

import copy
import math

import pytest
import torch

from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.handlers.uncertainty_aware_mean_teacher import UncertaintyAwareMeanTeacher
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.noisy_passes import NoisyPasses
from tests.hosts import (
    CASES,
    NotingInferer,
    assert_same_weights,
    hand_written_noise,
    hand_written_run,
    no_loss,
    toy_host,
)
from tests.toys import toy_batches, toy_trainer


def build(network, **kwargs):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return optimizer, UncertaintyAwareMeanTeacher(EMAStudent(network, optimizer), **kwargs)


@pytest.mark.parametrize("num_classes, size", CASES)
@pytest.mark.parametrize("with_sam", [False, True])
@pytest.mark.parametrize("as_published", [False, True])
def test_three_trainer_steps_equal_hand_written_ones(num_classes, size, with_sam, as_published):
    student, batches, distiller = toy_host(num_classes, size)
    other, other_distiller = copy.deepcopy((student, distiller))
    weight, loss = SigmoidRampUp(3, max=20.0), PartiallyLabeledLoss(dice_ce_loss(num_classes))
    options = {"num_classes": 2, "passes_at_once": 2} if as_published else {}
    optimizer, handler = build(student, max_iterations=30, weight=weight, start=2, **options)
    handlers = [handler, SAMDistillation(distiller)] if with_sam else [handler]
    trainer = toy_trainer(student, batches, loss, handlers, optimizer=optimizer)
    trainer.run()
    classes, terms, fractions = (2 if as_published else num_classes), [], []

    def term(t, batch, pred, ema):
        if t == 1:
            return 0.0
        image = batch["image"][2:]
        with torch.no_grad():
            target, *passes = (ema(image + noise).softmax(1) for noise in hand_written_noise(image, t, 9))
        mean = sum(passes) / 8
        uncertainty = -(mean * mean.log()).sum(1)
        mask = uncertainty < (0.75 + 0.25 * math.exp(-5 * (1 - t / 30) ** 2)) * math.log(classes)
        fractions.append(mask.float().mean().item())
        squared = (pred[2:, 0].softmax(1) - target).square().sum(1)
        terms.append(weight(t) * squared[mask].sum() / (classes * mask.sum()))
        return terms[-1]

    ema = hand_written_run(other, batches, loss, term, other_distiller.train() if with_sam else None)
    assert_same_weights(student, other)
    assert_same_weights(handler.ema_student.network, ema)
    assert_same_weights(distiller.teacher, other_distiller.teacher)
    output = trainer.state.output
    torch.testing.assert_close(output["consistency_loss"], terms[-1].detach(), rtol=1e-10, atol=1e-12)
    assert output["certain_fraction"].item() == fractions[-1] and 0 < fractions[-1] < 0.9
    assert not output["consistency_loss"].requires_grad and not output["certain_fraction"].requires_grad


def test_certain_pixels_checked_by_hand():
    _, handler = build(toy_host(2, (8, 8))[0], max_iterations=100)
    # two passes of three pixels: both sure of 0; sure of 0 and sure of 1, the mean is 1/2 1/2; both 0.8 for class 0
    first, second = [[9.0, 0.0], [9.0, 0.0], [1.386, 0.0]], [[9.0, 0.0], [0.0, 9.0], [1.386, 0.0]]
    passes = torch.tensor([first, second]).movedim(-1, 1).unsqueeze(1)  # (T, B, C, pixels)
    # entropy of 0.8 is 0.5004; the threshold is 0.7517 log 2 = 0.521 at first and log 2 in the end
    assert handler.certain_mask(passes, 1).tolist() == [[[True, False, True]]]
    assert 0.5 < 0.7504 * math.log(2) < 0.521
    wide = torch.cat((passes, torch.full((2, 1, 2, 3), -99.0)), dim=2)  # two more classes that never occur
    assert handler.certain_mask(wide, 1).tolist() == [[[True, True, True]]]  # log 2 < 3/4 log 4
    handler.num_classes = 2
    assert handler.certain_mask(wide, 1).tolist() == [[[True, False, True]]]


def test_nothing_certain_gives_zero_and_leaves_the_step_as_it_is_without():
    student, batches, _ = toy_host(3, (8, 8), scale=0.0)  # every class equally likely
    alone = copy.deepcopy(student)
    optimizer, handler = build(student, max_iterations=10**9, weight=1.0)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, batches[:1], loss, [handler], optimizer=optimizer)
    trainer.run()
    toy_trainer(alone, batches[:1], loss, []).run()
    assert trainer.state.output["consistency_loss"] == 0 and trainer.state.output["certain_fraction"] == 0
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters()))


@pytest.mark.parametrize("at_once, batches", [(None, [18]), (4, [8, 8, 2])])
def test_passes_run_as_one_batch_where_memory_allows(at_once, batches):
    student = toy_host(2, (8, 8))[0]
    optimizer, handler = build(student, max_iterations=3, passes_at_once=at_once)
    seen = []
    handler.ema_student.network.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    toy_trainer(student, toy_batches(1, num_classes=2), no_loss, [handler], optimizer=optimizer).run()
    assert seen == batches


def test_average_sees_the_noise_of_the_seed_and_the_trainers_inferer_calls_it():
    student, batches, _ = toy_host(2, (8, 8))
    optimizer, handler = build(student, max_iterations=3, num_passes=2, seed=3)
    inferer, image = NotingInferer(), batches[0]["image"][2:]
    toy_trainer(student, batches[:1], no_loss, [handler], optimizer=optimizer, inferer=inferer).run()
    noisy = image + NoisyPasses(handler.ema_student, seed=3).noise(image, iteration=1, num_passes=3)
    assert torch.equal(inferer.inputs[handler.ema_student.network], noisy.flatten(0, 1))


def test_bad_arguments_are_errors():
    student = toy_host(2, (8, 8))[0]
    with pytest.raises(ValueError, match="`rows` must be 'unlabeled' or 'all' but is 'labeled'"):
        build(student, max_iterations=1, rows="labeled")
    with pytest.raises(ValueError, match="`num_passes` must be at least 1 but is 0"):
        build(student, max_iterations=1, num_passes=0)
