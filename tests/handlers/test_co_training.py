from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knowsam_monai.handlers.co_training import MultiViewCoTraining
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks import StackedNetworks
from tests.hosts import CASES, no_loss
from tests.toys import ToyStudent, toy_batches, toy_trainer


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("size", [(8, 8), (4, 5, 6)])
def test_steps_equal_hand_written_ones(target, size):
    torch.manual_seed(0)
    student = ToyStudent(spatial_dims=len(size)).double()
    other = copy.deepcopy(student)
    batches, loss = toy_batches(3, size=size), PartiallyLabeledLoss(dice_ce_loss(3))
    handler = MultiViewCoTraining(mutual_weight=SigmoidRampUp(3), entropy_weight=0.9, target=target)
    trainer = toy_trainer(student, batches, loss, [handler])
    trainer.run()

    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        pred = other(batch["image"])
        a, b = pred[:, 1], pred[:, 2]
        if target == "hard":
            mutual = F.cross_entropy(a, b.argmax(1)) + F.cross_entropy(b, a.argmax(1))
        else:
            mutual = F.cross_entropy(a, b.detach().softmax(1)) + F.cross_entropy(b, a.detach().softmax(1))
        entropy = (
            sum(-(p.softmax(1) * p.log_softmax(1)).sum(1).mean() for p in (a, b)) / torch.tensor(3.0).double().log()
        )
        total = loss(pred, batch["label"]) + SigmoidRampUp(3)(t) * mutual + 0.9 * entropy
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for ours, expected in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    output = trainer.state.output
    torch.testing.assert_close(output["entropy_loss"], (0.9 * entropy).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["mutual_loss"], SigmoidRampUp(3)(3) * mutual.detach(), rtol=1e-5, atol=1e-6)
    assert not output["entropy_loss"].requires_grad and not output["mutual_loss"].requires_grad


def test_weights_of_zero_switch_the_terms_off():
    student = ToyStudent().double()
    trainer = toy_trainer(
        student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [MultiViewCoTraining(0.0, 0.0)]
    )
    trainer.run()
    assert not {"mutual_loss", "entropy_loss"} & set(trainer.state.output)


def test_plain_network_is_one_clear_error():
    network = torch.nn.Conv2d(1, 3, 1).double()
    trainer = toy_trainer(network, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [MultiViewCoTraining()])
    with pytest.raises(ValueError, match="needs a multi-view student"):
        trainer.run()


def test_heads_of_deep_supervision_are_no_views():
    student = ToyStudent().double()
    student.deep_supervision = True  # as in MONAI's DynUNet
    trainer = toy_trainer(student, toy_batches(1), no_loss, [MultiViewCoTraining()])
    with pytest.raises(ValueError, match="ToyStudent stacks heads of its deep supervision; leave co-training out"):
        trainer.run()


# --- Cross Pseudo Supervision -----------------------------------------------------------------------------------------


def two_networks(num_classes, spatial_dims):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d if spatial_dims == 2 else torch.nn.Conv3d
    return StackedNetworks([conv(1, num_classes, 3, padding=1) for _ in range(2)]).double()


def cross_pseudo_supervision(rows, weight=1.5):
    return MultiViewCoTraining(mutual_weight=weight, entropy_weight=0, target="hard", views=(0, 1), rows=rows)


@pytest.mark.parametrize("num_classes, size", CASES)
@pytest.mark.parametrize("rows", ["all", "unlabeled"])
def test_two_networks_and_hard_targets_are_cross_pseudo_supervision(num_classes, size, rows):
    student = two_networks(num_classes, len(size))
    first, second = copy.deepcopy(student).networks
    batches, loss = toy_batches(3, num_classes=num_classes, size=size), dice_ce_loss(num_classes)
    trainer = toy_trainer(student, batches, PartiallyLabeledLoss(loss), [cross_pseudo_supervision(rows)])
    trainer.run()

    taught = slice(2, None) if rows == "unlabeled" else slice(None)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    for batch in batches:
        a, b = first(batch["image"]), second(batch["image"])
        mutual = F.cross_entropy(a[taught], b[taught].argmax(1)) + F.cross_entropy(b[taught], a[taught].argmax(1))
        optimizer.zero_grad()
        (loss(a[:2], batch["label"]) + loss(b[:2], batch["label"]) + 1.5 * mutual).backward()
        optimizer.step()
    for ours, expected in zip(student.parameters(), [*first.parameters(), *second.parameters()], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trainer.state.output["mutual_loss"], 1.5 * mutual.detach(), rtol=1e-10, atol=1e-12)


def test_two_networks_need_views_of_their_own():
    student = StackedNetworks([nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)]).double()
    trainer = toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(), [MultiViewCoTraining()])
    with pytest.raises(ValueError, match=r"`views` must be \(0, 1\) for a student of two views but is \(1, 2\)"):
        trainer.run()


@pytest.mark.parametrize("views", [(0, -2), (1, -1), (1, 1), (0,), (0, 1, 1)])
def test_views_that_may_be_the_same_are_an_error(views):
    with pytest.raises(ValueError, match="`views` must be the numbers of two different views, from 0 on, but is"):
        MultiViewCoTraining(views=views)


def test_only_labeled_rows_are_an_error_where_unlabeled_ones_are_asked_for():
    batches = toy_batches(1, num_unlabeled=0)
    with pytest.raises(ValueError, match="must have unlabeled rows"):
        toy_trainer(two_networks(3, 2), batches, no_loss, [cross_pseudo_supervision("unlabeled")]).run()
    with pytest.raises(ValueError, match="`rows` must be 'all' or 'unlabeled' but is 'labeled'"):
        cross_pseudo_supervision("labeled")
