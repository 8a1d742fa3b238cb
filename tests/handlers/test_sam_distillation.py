from __future__ import annotations

import copy

import pytest
import torch

from knowsam_monai.distiller import SAMDistiller
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss

from ..toys import ToyStudent, ToyTeacher, toy_batches, toy_trainer


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    student, teacher = ToyStudent().double(), ToyTeacher().double()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), taught_views=(1, 2), **kwargs)
    return student, teacher, distiller


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_trainer_steps_equal_hand_written_ones(accumulation):
    batches = toy_batches(3)
    student, teacher, distiller = build()
    other_student, other_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    handler = SAMDistillation(distiller, weight=SigmoidRampUp(3), start=2)
    toy_trainer(student, batches, loss, [handler], accumulation_steps=accumulation).run()

    other = SAMDistiller(other_teacher, taught_views=(1, 2)).train()
    other.optimizer = torch.optim.Adam(other_teacher.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(other_student.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        if (t - 1) % accumulation == 0:
            optimizer.zero_grad()
            other.optimizer.zero_grad()
        pred = other_student(batch["image"])
        weight = SigmoidRampUp(3)(t) if t >= 2 else 0.0
        total = loss(pred, batch["label"]) + other(batch["image"], pred, batch["label"], weight=weight).loss
        (total / accumulation).backward()
        if t % accumulation == 0 or t == len(batches):
            optimizer.step()
            other.optimizer.step()
    for ours, expected in zip(
        [*student.parameters(), *teacher.parameters()], [*other_student.parameters(), *other_teacher.parameters()]
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_terms_are_logged_under_their_names_and_detached():
    student, _, distiller = build()
    trainer = toy_trainer(
        student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller, log_interval=1)]
    )
    trainer.run()
    output = trainer.state.output
    names = {"distillation_loss", "sam_loss", "gate_weight", "teacher_labeled_dice", "student_labeled_dice"}
    assert all(output[name].ndim == 0 and not output[name].requires_grad for name in names)
    assert output["teacher_logits"].shape == (4, 3, 8, 8) and not output["teacher_logits"].requires_grad


def test_shut_gate_leaves_the_students_step_exactly_as_without_distillation():
    batches = toy_batches(3)
    student, _, distiller = build(gate="validation")  # no validation yet: weight 0
    alone = copy.deepcopy(student)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(student, batches, loss, [SAMDistillation(distiller)]).run()
    toy_trainer(alone, batches, loss, []).run()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters()))


def test_poor_teacher_costs_nothing_under_the_validation_gate():
    batches = toy_batches(3)
    student, _, distiller = build(gate="validation")
    distiller.gate.update(student_dice=0.6, teacher_dice=0.3)  # it has memorised its labelled rows
    alone = copy.deepcopy(student)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(student, batches, loss, [SAMDistillation(distiller)]).run()
    toy_trainer(alone, batches, loss, []).run()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters()))


def test_agreement_gate_measures_in_the_run_and_leaves_the_student_in_train_mode():
    student, _, distiller = build(gate="agreement")
    trainer = toy_trainer(
        student, toy_batches(3), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller, gate_interval=2)]
    )
    trainer.run()
    assert distiller.gate.num_measured == 2 and student.training


def test_labeled_rows_may_be_a_callable_of_the_batch():
    batches = toy_batches(2, num_labeled=4, num_unlabeled=0)
    for batch in batches:
        batch["count"] = 1
    student, teacher, distiller = build()
    rows = []
    teacher.register_forward_hook(lambda m, a, out: rows.append(len(out)) if out.requires_grad else None)
    handler = SAMDistillation(distiller, labeled_rows=lambda batch: batch["count"])
    toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3)), [handler]).run()
    assert rows == [1, 1]


def test_trainers_optimizer_is_left_as_it_was_after_the_run():
    student, _, distiller = build()
    trainer = toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)])
    trainer.run()
    assert "zero_grad" not in vars(trainer.optimizer) and not trainer.optimizer._optimizer_step_post_hooks


def test_intervals_below_one_are_errors():
    with pytest.raises(ValueError, match="must be at least 1"):
        SAMDistillation(build()[2], gate_interval=0)
