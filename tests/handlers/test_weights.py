"""Every weight of a handler is a number or a function of the iteration."""

from __future__ import annotations

import inspect

import pytest
import torch

from knowsam_monai import handlers
from knowsam_monai.distillation.attachment import Attachment
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from tests.hosts import toy_host
from tests.toys import toy_trainer

LOSS = PartiallyLabeledLoss(dice_ce_loss(2, ignore_index=255))
# class and argument -> the handler for a student, an optimizer, a distiller and the argument's value
BUILDERS = {
    (handlers.MeanTeacher, "weight"): lambda student, optimizer, distiller, **weight: handlers.MeanTeacher(
        EMAStudent(student, optimizer), start=0, **weight
    ),
    (handlers.UncertaintyAwareMeanTeacher, "weight"): (
        lambda student, optimizer, distiller, **weight: handlers.UncertaintyAwareMeanTeacher(
            EMAStudent(student, optimizer), max_iterations=4, **weight
        )
    ),
    (handlers.FixMatch, "weight"): lambda *_, **weight: handlers.FixMatch(threshold=0.6, **weight),
    (handlers.MultiViewCoTraining, "mutual_weight"): lambda *_, **weight: handlers.MultiViewCoTraining(**weight),
    (handlers.MultiViewCoTraining, "entropy_weight"): lambda *_, **weight: handlers.MultiViewCoTraining(**weight),
    (handlers.UncertaintyGuidedMixing, "weight"): (
        lambda *_, **weight: handlers.UncertaintyGuidedMixing(LOSS, **weight)
    ),
    (handlers.BidirectionalCopyPaste, "weight"): (
        lambda student, optimizer, distiller, **weight: handlers.BidirectionalCopyPaste(
            EMAStudent(student, optimizer), LOSS, pretraining=0, **weight
        )
    ),
    (handlers.SAMDistillation, "weight"): (
        lambda student, optimizer, distiller, **weight: handlers.SAMDistillation(distiller, **weight)
    ),
    (Attachment, "weight"): lambda student, optimizer, distiller, **weight: distiller.attach(
        student, optimizer, **weight
    ),
}


def trained_weights(case, weight):
    student, batches, distiller = toy_host(2, (8, 8))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    handler = BUILDERS[case](student, optimizer, distiller, **{case[1]: weight})
    is_attachment = isinstance(handler, Attachment)
    loader = handler.watch(batches) if is_attachment else batches
    toy_trainer(student, loader, LOSS, [] if is_attachment else [handler], optimizer=optimizer).run()
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("case", BUILDERS, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_number_and_constant_function_train_the_same_student(case):
    iterations = []
    expected = trained_weights(case, 0.3)
    assert torch.equal(trained_weights(case, lambda iteration: iterations.append(iteration) or 0.3), expected)
    assert iterations == [1, 2, 3]
    assert not torch.equal(trained_weights(case, lambda iteration: 0.3 * iteration), expected)


def test_all_weights_of_handlers_are_here():
    arguments = {
        (kind, name)
        for kind in [getattr(handlers, name) for name in handlers.__all__] + [Attachment]
        for name in inspect.signature(kind).parameters
        if name.endswith("weight")
    }
    assert arguments == BUILDERS.keys()
