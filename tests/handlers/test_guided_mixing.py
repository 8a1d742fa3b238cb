from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.guided_mixing import UncertaintyGuidedMixing, gated
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.teachers import SliceTeacher
from tests.toys import ToyStudent, ToyTeacher, toy_batches, toy_trainer


def unsure_logits(cells, num_rows=2, size=8, cell=2):
    """Logits certain of class 1 (logit 9), except in the given cells of a 4 x 4 grid, where all classes are equal."""
    logits = torch.zeros(num_rows, 2, size, size)
    logits[:, 1] = 9
    for row, col in cells:
        logits[:, :, row * cell : (row + 1) * cell, col * cell : (col + 1) * cell] = 0
    return logits


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cells_of_highest_entropy_are_chosen(spatial_dims):
    mixing = UncertaintyGuidedMixing(dice_ce_loss(2), num_cells=2)
    logits = unsure_logits([(0, 1), (3, 2)])
    if spatial_dims == 3:
        logits = logits[..., None].repeat(1, 1, 1, 1, 8)
        logits[..., 2:] = torch.tensor([0.0, 9.0]).reshape(1, 2, 1, 1, 1)  # unsure in the first slab alone
    mask = mixing.uncertain_mask(logits)
    assert mask.shape == (2, 1, *logits.shape[2:]) and mask.dtype == torch.bool
    expected = (logits[:, :1] == logits[:, 1:]) & True
    assert torch.equal(mask, expected)


def test_cell_counts_by_its_mean_entropy_and_not_by_its_most_uncertain_pixel():
    logits = unsure_logits([], num_rows=1)
    logits[0, 1, 0, 0] = 0  # one pixel of the first cell knows nothing: log 2 / 4 = 0.17
    logits[0, 1, 2:4, 2:4] = 1  # all four of another one have probability 0.73: 0.58
    mask = UncertaintyGuidedMixing(dice_ce_loss(2), num_cells=1).uncertain_mask(logits)
    assert mask[0, 0].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_content_and_labels_are_exchanged_in_uncertain_cells():
    mixing = UncertaintyGuidedMixing(dice_ce_loss(2), num_cells=1)
    image = torch.stack([torch.full((1, 8, 8), 10.0), torch.full((1, 8, 8), 20.0)])  # labeled, unlabeled
    label = torch.zeros(1, 1, 8, 8)
    logits = torch.cat([unsure_logits([(0, 0)], 1), unsure_logits([(3, 3)], 1)])
    pseudo = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(2, 2, 8, 8)  # class 1 everywhere
    mixed_image, mixed_label = mixing.mix(image, label, logits, pseudo)
    unlabeled, labeled = mixed_image[0, 0], mixed_image[1, 0]
    assert (unlabeled[6:, 6:] == 10).all() and (unlabeled == 10).sum() == 4  # its own unsure cell gets labeled content
    assert (labeled[:2, :2] == 20).all() and (labeled == 20).sum() == 4
    assert torch.equal(mixed_label[0, 0], (unlabeled == 20).float()) and torch.equal(
        mixed_label[1, 0], (labeled == 20).float()
    )


def test_blocks_of_a_small_volume_are_exchanged_with_their_labels():
    mixing = UncertaintyGuidedMixing(dice_ce_loss(2), grid_size=(1, 2, 3), num_cells=1)  # cells of 2 x 2 x 1 voxels
    image = torch.tensor([10.0, 20.0]).reshape(2, 1, 1, 1, 1).expand(2, 1, 2, 4, 3)  # labeled, unlabeled
    label = torch.zeros(1, 1, 2, 4, 3)
    logits = torch.tensor([0.0, 9.0]).reshape(1, 2, 1, 1, 1).repeat(2, 1, 2, 4, 3)
    logits[0, :, :, :2, 2] = 0  # the labeled image is unsure in the first half of the last plane
    logits[1, :, :, 2:, 0] = 0  # the unlabeled one in the second half of the first plane
    mixed_image, mixed_label = mixing.mix(image, label, logits, logits)  # the pseudo-label is 1, and 0 where unsure
    unlabeled, labeled = torch.full((2, 4, 3), 20.0), torch.full((2, 4, 3), 10.0)
    unlabeled[:, 2:, 0], labeled[:, :2, 2] = 10, 20
    assert torch.equal(mixed_image, torch.stack([unlabeled, labeled])[:, None])
    assert torch.equal(mixed_label, (mixed_image == 20).float())


@pytest.mark.parametrize(("num_labeled", "pair"), [(1, [0, 1]), (3, [0, 3])])
def test_as_many_pairs_as_there_are_rows_of_both_kinds_in_plain_tensors_with_the_labels_dtype(num_labeled, pair):
    mixing = UncertaintyGuidedMixing(dice_ce_loss(2), num_cells=1)
    image = MetaTensor(torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 8))  # the first rows are labeled
    label, logits = MetaTensor(torch.zeros(num_labeled, 1, 8, 8, dtype=torch.uint8)), torch.zeros(4, 2, 8, 8)
    mixed_image, mixed_label = mixing.mix(image, label, logits, logits)
    assert type(mixed_image) is type(mixed_label) is torch.Tensor and mixed_label.dtype == torch.uint8
    assert mixed_image.unique().tolist() == pair and len(mixed_image) == len(mixed_label) == 2
    with pytest.raises(ValueError, match="`image` must have labeled and unlabeled rows but has only one kind"):
        mixing.mix(image[:1], label[:1], logits[:1], logits[:1])


@pytest.mark.parametrize(
    ("size", "cells"), [((8, 8), {}), ((4, 4, 4), dict(num_cells=20)), ((4, 4, 6), dict(grid_size=(2, 2, 3)))]
)
def test_own_backward_adds_the_gradient_of_one_joint_backward(size, cells):
    torch.manual_seed(0)
    student = ToyStudent(spatial_dims=len(size)).double()
    other = copy.deepcopy(student)
    batches, loss = toy_batches(3, size=size), PartiallyLabeledLoss(dice_ce_loss(3))
    mixing = UncertaintyGuidedMixing(loss, start=2, weight=0.5, **cells)
    trainer = toy_trainer(student, batches, loss, [mixing], accumulation_steps=2)
    trainer.run()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        if t % 2 == 1:
            optimizer.zero_grad()
        pred = other(batch["image"])
        total = loss(pred, batch["label"])
        if t > 1:
            fused = pred[:, 0].detach()
            total = total + 0.5 * loss(*reversed_mix(mixing, other, batch, fused))
        (total / 2).backward()
        if t != 1:
            optimizer.step()
    for ours, expected in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert not trainer.state.output["mixing_loss"].requires_grad


def test_scaler_scales_the_loss_of_the_mixed_images_too():
    students, loss = [], PartiallyLabeledLoss(dice_ce_loss(3))
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        torch.manual_seed(0)
        student = ToyStudent().double()
        mixing = UncertaintyGuidedMixing(loss)
        trainer = toy_trainer(student, toy_batches(2), loss, [mixing], amp=scaler is not None)
        # the one that MONAI builds for a run needs a GPU
        trainer.add_event_handler(Events.STARTED, lambda e, own=scaler: setattr(e, "scaler", own))
        trainer.run()
        students.append(student)
    assert all(torch.equal(a, b) for a, b in zip(*(student.parameters() for student in students), strict=True))


@pytest.mark.parametrize("size", [(8, 8), (4, 4, 4)])
def test_first_graph_is_spent_before_the_second_is_built(size):
    student = ToyStudent(spatial_dims=len(size)).double()
    gradients = []
    student.register_forward_pre_hook(lambda *_: gradients.append(student.first.weight.grad is not None))
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(student, toy_batches(1, size=size), loss, [UncertaintyGuidedMixing(loss)]).run()
    assert gradients == [False, True]


@pytest.mark.parametrize("weight", [0.0, lambda iteration: float(iteration == 2)])
def test_teacher_is_asked_for_unlabeled_rows_only_at_steps_that_mix(weight):
    teacher, rows = ToyTeacher().double(), []
    teacher.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters()), gate="none")
    handlers = [SAMDistillation(distiller, weight=0.0), UncertaintyGuidedMixing(loss, weight=weight)]
    toy_trainer(ToyStudent().double(), toy_batches(3), loss, handlers).run()
    assert rows == ([2, 2, 2, 2] if callable(weight) else [2, 2, 2])  # the second step has the unlabeled rows apart


def test_student_labels_where_the_teacher_sees_some_slices_only():
    student = ToyStudent(spatial_dims=3).double()
    teacher = SliceTeacher(ToyTeacher().double(), slices=2)
    loss, mixed = PartiallyLabeledLoss(dice_ce_loss(3)), []
    mixing = UncertaintyGuidedMixing(loss)
    mix = mixing.mix
    mixing.mix = lambda image, label, logits, pseudo_logits: mixed.append((logits, pseudo_logits)) or mix(
        image, label, logits, pseudo_logits
    )
    handlers = [SAMDistillation(SAMDistiller(teacher, gate="none")), mixing]
    toy_trainer(student, toy_batches(1, size=(4, 4, 4)), loss, handlers).run()
    assert torch.equal(*mixed[0])


def reversed_mix(mixing, network, batch, logits):
    image, label = mixing.mix(batch["image"], batch["label"], logits, logits)
    return network(image), label


def test_pseudo_labels_come_from_the_teacher_when_one_runs():
    student = ToyStudent().double()
    seen = []
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    mixing = UncertaintyGuidedMixing(lambda pred, label: seen.append(label) or loss(pred, label))
    trainer = toy_trainer(student, toy_batches(1), loss, [mixing])
    teacher_logits = torch.zeros(4, 3, 8, 8)
    teacher_logits[:, 2] = 1
    from monai.engines.utils import IterationEvents

    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED, lambda e: e.state.output.update(teacher_logits=teacher_logits)
    )
    trainer.run()
    unlabeled = seen[0][:2]  # the mostly unlabeled rows: 11 of 16 cells keep the pseudo-label 2
    assert (unlabeled == 2).float().mean() >= 11 / 16


@pytest.mark.parametrize(("gate_weight", "expected"), [(1.0, 2), (0.6, 2), (0.4, 1), (0.0, 1)])
def test_teacher_labels_as_far_as_its_gate_lets_it(gate_weight, expected):
    # teacher sure of class 2, student of class 1: p = g and 1 - g
    teacher_logits, student_logits = torch.tensor([[0.0, 0.0, 30.0]]), torch.tensor([[0.0, 30.0, 0.0]])
    mixed = gated(teacher_logits, student_logits, torch.tensor(gate_weight))
    assert mixed.argmax(1).item() == expected
    torch.testing.assert_close(
        mixed.softmax(1)[0], torch.tensor([0.0, 1 - gate_weight, gate_weight]), rtol=0, atol=1e-6
    )
    one_channel = gated(torch.tensor([[30.0]]), torch.tensor([[-30.0]]), torch.tensor(gate_weight))
    assert (one_channel > 0).item() == (expected == 2)


@pytest.mark.parametrize("channels", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(("gate_weight", "expected"), [(1.0, 1), (0.6, 1), (0.4, 0), (0.0, 0)])
def test_one_channel_and_two_classes_label_alike(channels, gate_weight, expected):
    """The teacher is sure of class 1, the student of class 0."""
    teacher, student = (torch.tensor([[z]] if num == 1 else [[0.0, z]]) for z, num in zip((30.0, -30.0), channels))
    mixed = gated(teacher, student, torch.tensor(gate_weight))
    assert mixed.shape == (1, max(channels))
    assert (mixed > 0 if mixed.shape[1] == 1 else mixed.argmax(1)).item() == expected


@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gate_weight", [0.0, 0.6, 1.0])
def test_teacher_has_no_say_where_it_is_not_finite(num_classes, bad, gate_weight):
    generator = torch.Generator().manual_seed(0)
    student, finite = torch.randn((2, 2, num_classes, 4, 4), generator=generator)
    teacher = finite.clone()
    teacher[0, -1] = bad  # all of one row, in one class
    teacher[1, :, :2] = bad  # and half of the other
    mixed, expected = (gated(logits, student, torch.tensor(gate_weight)) for logits in (teacher, finite))
    assert torch.equal(mixed[0], student[0]) and torch.equal(mixed[1, :, :2], student[1, :, :2])
    assert torch.equal(mixed[1, :, 2:], expected[1, :, 2:])


@pytest.mark.parametrize(("num_classes", "size"), [(2, (8, 8)), (4, (8, 8)), (2, (8, 8, 8))])
@pytest.mark.parametrize("gate", ["validation", "agreement"])
def test_not_finite_teacher_behind_a_shut_gate_leaves_the_student_that_labels_its_own_mixed_images(
    num_classes, size, gate
):
    batches = toy_batches(3, num_classes=num_classes, size=size)
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes))
    students = []
    for pseudo_label in ("teacher", "student"):
        torch.manual_seed(0)
        student, teacher = (kind(num_classes, len(size)).double() for kind in (ToyStudent, ToyTeacher))
        torch.nn.init.constant_(teacher.image_conv.bias[-1:], torch.nan)  # its last class, everywhere
        optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
        distiller = SAMDistiller(teacher, optimizer, taught_views=(1, 2), gate=gate)
        handlers = [
            SAMDistillation(distiller, gate_interval=1),
            UncertaintyGuidedMixing(loss, num_cells=3, grid_size=2, pseudo_label=pseudo_label),
        ]
        toy_trainer(student, batches, loss, handlers).run()
        assert distiller.gate.weight == 0
        students.append(student)
    assert all(torch.equal(a, b) for a, b in zip(*(student.parameters() for student in students), strict=True))


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="`num_cells` must be between 1 and 63, for a grid of 4 x 4 x 4 cells"):
        UncertaintyGuidedMixing(PartiallyLabeledLoss(), num_cells=64)  # too many in 3D too
    with pytest.raises(ValueError, match="`num_cells` must be between 1 and 5, for a grid of 2 x 3 cells, but is 6"):
        UncertaintyGuidedMixing(PartiallyLabeledLoss(), grid_size=(2, 3), num_cells=6)
    with pytest.raises(ValueError, match="`pseudo_label` must be"):
        UncertaintyGuidedMixing(PartiallyLabeledLoss(), pseudo_label="truth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_cells=16), "`num_cells` must be between 1 and 15"),
        (dict(grid_size=(4, 4, 4)), "`grid_size` must be at most the image's size .*, one number for each axis"),
        (dict(grid_size=9), "`grid_size` must be at most the image's size .* but is .9, 9."),
    ],
)
def test_grid_that_does_not_fit_is_an_error_long_before_the_start(arguments, message):
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    mixing = UncertaintyGuidedMixing(loss, start=1000, **arguments)
    with pytest.raises(ValueError, match=message):
        toy_trainer(ToyStudent().double(), toy_batches(1), loss, [mixing]).run()


def test_weight_of_zero_takes_no_second_forward():
    student, calls = ToyStudent().double(), []
    student.register_forward_hook(lambda *_: calls.append(None))
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    trainer = toy_trainer(student, toy_batches(2), loss, [UncertaintyGuidedMixing(loss, weight=lambda t: t - 1)])
    trainer.run()
    assert len(calls) == 1 + 2  # weight 0, then 1
