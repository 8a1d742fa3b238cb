from __future__ import annotations

import copy

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from torch import nn
from torch.nn import functional as F

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers import (
    BidirectionalCopyPaste,
    FixMatch,
    MeanTeacher,
    MultiViewCoTraining,
    SAMDistillation,
    UncertaintyAwareMeanTeacher,
    UncertaintyGuidedMixing,
)
from knowsam_monai.handlers.supervision import unlabeled_rows
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from tests.toys import ToyStudent, ToyTeacher, distiller_of, region_batches, toy_batches, toy_trainer


def ema_student():
    student = ToyStudent()
    return EMAStudent(student, torch.optim.SGD(student.parameters(), lr=0.1))


def name(handler):
    return type(handler).__name__


def handlers():
    return [
        MultiViewCoTraining(),
        UncertaintyGuidedMixing(F.mse_loss),
        SAMDistillation(SAMDistiller(ToyTeacher())),
        MeanTeacher(ema_student()),
        UncertaintyAwareMeanTeacher(ema_student(), max_iterations=3),
        FixMatch(),
    ]


def trainer_of(handler, batches, loss):
    """A trainer of the student that the handler averages, or of any student."""
    average = getattr(handler, "ema_student", None)
    student, optimizer = (ToyStudent(), None) if average is None else (average._student, average.optimizer)
    dtype = batches[0]["image"].dtype
    return toy_trainer(student.to(dtype).eval(), batches, loss, [handler], optimizer=optimizer)


def run(handler, loss, **batch):
    batches = [{name: tensor.float() for name, tensor in b.items()} for b in toy_batches(1, **batch)]
    trainer = trainer_of(handler, batches, loss)
    trainer.run()
    return trainer


@pytest.mark.parametrize("handler", handlers(), ids=name)
def test_bare_loss_that_sees_fewer_labels_than_rows_is_one_clear_error(handler):
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    with pytest.raises(
        ValueError, match=r"must be a PartiallyLabeledLoss if only 2 of 4 rows .* but is DiceCELoss; wrap it"
    ):
        run(handler, loss)


@pytest.mark.parametrize("handler", [*handlers(), BidirectionalCopyPaste(ema_student(), F.mse_loss)], ids=name)
def test_only_distillation_takes_overlapping_regions(handler):
    loss, batches = PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=255), overlapping=True), region_batches(1)
    if isinstance(handler, SAMDistillation):
        handler = SAMDistillation(SAMDistiller(ToyTeacher().double(), overlapping=True))
        toy_trainer(ToyStudent().double(), batches, loss, [handler]).run()
    else:
        with pytest.raises(
            ValueError, match="`label` must have one channel of class numbers but has 3: .*; remove the"
        ):
            trainer_of(handler, batches, loss).run()


@pytest.mark.parametrize("is_told", [True, False])
def test_one_hot_labels_are_no_regions(is_told):
    (batch,) = toy_batches(1)
    label = F.one_hot(batch["label"][:, 0].long(), 3).movedim(-1, 1).float()
    batches = [{"image": batch["image"].float(), "label": label}]
    dice = DiceLoss(softmax=True) if is_told else lambda pred, label: (pred.softmax(1) - label).square().mean()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.dice = dice if is_told else None

        def forward(self, pred, label):
            return dice(pred[: len(label), 0], label)

    trainer = trainer_of(MeanTeacher(ema_student()), batches, Own())
    trainer.run()
    assert torch.isfinite(trainer.state.output["loss"])


def test_loss_that_takes_fewer_labels_passes_whoever_wrote_it():
    def own_loss(pred, label):
        return F.cross_entropy(pred[: len(label), 0], label[:, 0].long())

    for loss in (PartiallyLabeledLoss(), own_loss):
        trainer = run(SAMDistillation(SAMDistiller(ToyTeacher())), loss)
        assert torch.isfinite(trainer.state.output["loss"])


def test_bare_loss_passes_where_every_row_has_a_label():
    class FusedLoss(DiceCELoss):
        def forward(self, pred, label):
            return super().forward(pred[:, 0], label)

    trainer = run(
        SAMDistillation(SAMDistiller(ToyTeacher())), FusedLoss(softmax=True, to_onehot_y=True), num_unlabeled=0
    )
    assert torch.isfinite(trainer.state.output["loss"])


@pytest.mark.parametrize("labeled_rows", [2, lambda batch: slice(0, 2)], ids=["number", "callable"])
def test_hidden_labels_never_reach_the_student(labeled_rows):
    def student_of(batch):
        torch.manual_seed(0)
        handler = SAMDistillation(distiller_of(ToyTeacher(), taught_rows="unlabeled"), labeled_rows=labeled_rows)
        trainer = trainer_of(handler, [batch], PartiallyLabeledLoss(labeled_rows=2))
        trainer.run()
        return torch.cat([parameter.flatten() for parameter in trainer.network.parameters()])

    (batch,) = ({name: tensor.float() for name, tensor in b.items()} for b in toy_batches(1, 4, 0))
    hidden = torch.cat([batch["label"][:2], 2 - batch["label"][2:]])
    expected = student_of({**batch, "label": batch["label"][:2]})
    assert torch.equal(student_of(batch), expected) and torch.equal(student_of({**batch, "label": hidden}), expected)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "loss, labeled_rows, remedy",
    [
        (PartiallyLabeledLoss(), 2, r"labeled_rows=2\)"),
        (dice_ce_loss(3), 2, r"labeled_rows=2\)"),
        (DeepSupervisionLoss(PartiallyLabeledLoss()), 2, r"labeled_rows=2\)"),
        (PartiallyLabeledLoss(labeled_rows=3), 2, r"labeled_rows=2\)"),
        (PartiallyLabeledLoss(labeled_rows=2), slice(2, 4), r"labeled_rows=slice\(2, 4, 1\)\)"),
        (PartiallyLabeledLoss(), slice(2, 4), r"labeled_rows=slice\(2, 4, 1\)\)"),
        (PartiallyLabeledLoss(), 0, r'labeled_rows="all"\)'),
    ],
)
def test_loss_that_uses_hidden_labels_is_one_clear_error(loss, labeled_rows, remedy, every):
    class Fused(ToyStudent):
        def forward(self, image):
            return super().forward(image)[:, 0]

    batches = [{name: tensor.float() for name, tensor in b.items()} for b in toy_batches(1, 4, 0)]
    student = Fused()
    before = copy.deepcopy(student.state_dict())
    handler = SAMDistillation(SAMDistiller(ToyTeacher()), labeled_rows=labeled_rows, every=every)
    with pytest.raises(
        ValueError, match=rf"of 4 rows that `labeled_rows` selects; make it PartiallyLabeledLoss\(\.\.\., {remedy}"
    ):
        toy_trainer(student, batches, loss, [handler]).run()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


class IgnoresSome:
    ignore_index = 255

    def __call__(self, logits, label):
        return F.cross_entropy(logits, label[:, 0].long(), ignore_index=255)


@pytest.mark.parametrize(
    "loss, labeled_rows",
    [
        (PartiallyLabeledLoss(labeled_rows="all"), 2),  # the student may see every label
        (PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=255)), 2),  # other rows may have it everywhere
        (PartiallyLabeledLoss(IgnoresSome()), 2),  # no module
        (PartiallyLabeledLoss(labeled_rows=1), 2),
        (PartiallyLabeledLoss(labeled_rows=slice(2, 4)), slice(2, 4)),
        (lambda pred, label: F.cross_entropy(pred[:2, 0], label[:2, 0].long()), 2),
        (PartiallyLabeledLoss(), "all"),
    ],
)
def test_loss_that_may_use_every_label_passes(loss, labeled_rows):
    handler = SAMDistillation(SAMDistiller(ToyTeacher(), gate="none"), labeled_rows=labeled_rows)
    assert torch.isfinite(run(handler, loss, num_labeled=4, num_unlabeled=0).state.output["loss"])


def test_unlabeled_rows_are_those_after_the_labels():
    output = {"image": torch.zeros(5, 1, 4, 4), "label": torch.zeros(2, 1, 4, 4)}
    assert unlabeled_rows(output) == slice(2, None)
    assert unlabeled_rows({**output, "label": None}) == slice(0, None)


def test_batch_without_unlabeled_rows_is_an_error_rather_than_a_method_that_does_nothing():
    output = {"image": torch.zeros(2, 1, 4, 4), "label": torch.zeros(2, 1, 4, 4)}
    with pytest.raises(ValueError, match="unlabeled rows after the 2 labeled ones but has 2 rows; leave"):
        unlabeled_rows(output)


@pytest.mark.parametrize(
    "handler",
    [
        MeanTeacher(ema_student(), start=1000),
        UncertaintyAwareMeanTeacher(ema_student(), max_iterations=3, start=1000),
        FixMatch(start=1000),
        UncertaintyGuidedMixing(PartiallyLabeledLoss(), start=1000),
    ],
    ids=name,
)
def test_batch_without_unlabeled_rows_is_an_error_long_before_the_start(handler):
    with pytest.raises(ValueError, match="`image` must have unlabeled rows after the 4 labeled ones but has 4 rows"):
        run(handler, PartiallyLabeledLoss(), num_labeled=4, num_unlabeled=0)


@pytest.mark.parametrize("handler", [h for h in handlers() if not isinstance(h, SAMDistillation)], ids=name)
def test_student_without_one_tensor_of_logits_is_an_error_long_before_the_start(handler):
    handler.start = 1000
    trainer = trainer_of(handler, toy_batches(1), PartiallyLabeledLoss())
    trainer.network.forward = lambda x: [torch.zeros(len(x), 3, *x.shape[2:])]
    with pytest.raises(TypeError, match="`pred` must be a tensor of logits or stacked views but is a list; pick"):
        trainer.run()


@pytest.mark.parametrize("wrong", ["network", "optimizer"])
@pytest.mark.parametrize("method", [MeanTeacher, BidirectionalCopyPaste])
def test_average_of_another_student_is_an_error_at_the_start(wrong, method):
    """It would never move, and pull the student toward its first weights."""
    loss = PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=255))
    average = ema_student()
    handler = method(average) if method is MeanTeacher else method(average, loss)
    student = ToyStudent() if wrong == "network" else average._student
    trainer = toy_trainer(student, toy_batches(1), loss, [handler])
    trainer.optimizer.partners = [trainer.optimizer]  # as some wrappers do
    with pytest.raises(ValueError, match=f"`{wrong}` of EMAStudent must be the trainer's but is not, so nothing"):
        trainer.run()


def test_method_that_is_switched_off_takes_a_batch_without_unlabeled_rows():
    for handler in (
        MeanTeacher(ema_student(), weight=0.0),
        UncertaintyAwareMeanTeacher(ema_student(), max_iterations=3, weight=0.0),
        UncertaintyGuidedMixing(PartiallyLabeledLoss(), weight=0.0),
    ):
        run(handler, PartiallyLabeledLoss(), num_labeled=4, num_unlabeled=0)
