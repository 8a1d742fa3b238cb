"""`start` means the same everywhere: the first iteration with the term, counted from 1."""

from __future__ import annotations

import inspect

import pytest
import torch
from ignite.engine import Events

from knowsam_monai import handlers
from knowsam_monai.distillation import attachment
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from tests.hosts import toy_host
from tests.toys import toy_trainer

LOSS = PartiallyLabeledLoss(dice_ce_loss(2))
# what takes `start` -> its handler for a student, an optimizer, a distiller and a start; the term that it adds
BUILDERS = {
    handlers.MeanTeacher: (
        lambda student, optimizer, distiller, start: handlers.MeanTeacher(EMAStudent(student, optimizer), start=start),
        "consistency_loss",
    ),
    handlers.UncertaintyAwareMeanTeacher: (
        lambda student, optimizer, distiller, start: handlers.UncertaintyAwareMeanTeacher(
            EMAStudent(student, optimizer), max_iterations=4, start=start
        ),
        "consistency_loss",
    ),
    handlers.FixMatch: (
        lambda student, optimizer, distiller, start: handlers.FixMatch(threshold=0.6, start=start),
        "pseudo_label_loss",
    ),
    handlers.UncertaintyGuidedMixing: (
        lambda student, optimizer, distiller, start: handlers.UncertaintyGuidedMixing(LOSS, start=start),
        "mixing_loss",
    ),
    handlers.SAMDistillation: (
        lambda student, optimizer, distiller, start: handlers.SAMDistillation(distiller, start=start),
        "distillation_loss",
    ),
    SigmoidRampUp: (
        lambda student, optimizer, distiller, start: handlers.MultiViewCoTraining(SigmoidRampUp(4, start=start)),
        "mutual_loss",
    ),
    attachment.Attachment: (
        lambda student, optimizer, distiller, start: attachment.Attachment(distiller, student, optimizer, start=start),
        "distillation_loss",
    ),
}


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("kind", BUILDERS, ids=lambda kind: kind.__name__)
def test_term_is_there_from_iteration_start_on(kind, start):
    student, batches, distiller = toy_host(2, (8, 8))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    build, term = BUILDERS[kind]
    handler = build(student, optimizer, distiller, start)
    is_attachment = kind is attachment.Attachment
    loader = handler.watch(batches + batches[:1]) if is_attachment else batches + batches[:1]
    trainer = toy_trainer(student, loader, LOSS, [] if is_attachment else [handler], optimizer=optimizer)
    seen = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine):
        terms = handler.terms if is_attachment else engine.state.output
        if terms.get(term, 0) > 0:
            seen.append(engine.state.iteration)

    trainer.run()
    assert seen == list(range(max(start, 1), 5))


def test_table_covers_everything_that_takes_a_start():
    public = {getattr(handlers, name) for name in handlers.__all__} | {attachment.Attachment, SigmoidRampUp}
    assert {kind for kind in public if "start" in inspect.signature(kind).parameters} == set(BUILDERS)
