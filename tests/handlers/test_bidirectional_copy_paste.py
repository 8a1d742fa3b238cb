from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.bidirectional_copy_paste import BidirectionalCopyPaste
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.runs.preflight import Preflight
from tests.hosts import CASES, assert_same_weights, toy_host
from tests.toys import ToyStudent, ToyTeacher, toy_batches, toy_trainer


def build(student, num_classes=3, **kwargs):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    ema_student = EMAStudent(student, optimizer, warm_up=False, buffers="average")
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes, ignore_index=255))
    return optimizer, loss, BidirectionalCopyPaste(ema_student, loss, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16])
def test_pixels_without_a_true_label_are_ignored_for_labels_of_any_type(dtype):
    student, batch = ToyStudent(2).double(), toy_batches(1, num_classes=2)[0]
    optimizer, loss, handler = build(student, num_classes=2, pretraining=0)
    batch["label"] = batch["label"].to(dtype)
    trainer, seen = toy_trainer(student, [batch], loss, [handler], optimizer=optimizer), []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.batch["label"].unique().tolist()))
    trainer.run()
    assert seen == [[0, 1, 255]]


@pytest.mark.parametrize("num_classes, size", CASES)
@pytest.mark.parametrize("with_sam", [False, True])
def test_three_trainer_steps_equal_hand_written_ones(num_classes, size, with_sam):
    """One step of pre-training and two of self-training."""
    student, batches, distiller = toy_host(num_classes, size)
    distiller.sam_loss = dice_ce_loss(num_classes, ignore_index=255)
    other, teacher = copy.deepcopy((student, distiller.teacher))
    optimizer, loss, handler = build(student, num_classes, pretraining=1, weight=lambda t: t / 4)
    handlers = [handler, SAMDistillation(distiller)] if with_sam else [handler]
    trainer = toy_trainer(student, batches, loss, handlers, optimizer=optimizer)
    trainer.run()

    adam = torch.optim.Adam(teacher.parameters(), lr=0.01)
    other_distiller = SAMDistiller(teacher, adam, sam_loss=distiller.sam_loss, gate="none")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        (l1, l2, u1, u2), (y1, y2) = batch["image"].split(1), batch["label"].split(1)
        box = handler.box_mask(l1, t)
        unlabeled_loss = 0.0
        if t == 1:
            image, label = torch.where(box, l1, l2), torch.where(box, y1, y2)
            ema = copy.deepcopy(other).eval()
        else:
            ema = copy.deepcopy(other).eval() if t == 2 else ema
            with torch.no_grad():
                q1, q2 = handler.pseudo_label(ema(torch.cat([u1, u2]))).double().split(1)
            none = torch.full_like(y1, 255)
            image = torch.cat([torch.where(box, u1, l1), torch.where(box, l2, u2)])
            label = torch.cat([torch.where(box, none, y1), torch.where(box, y2, none)])
            pseudo_label = torch.cat([torch.where(box, q1, none), torch.where(box, none, q2)])
        pred = other(image)
        if t > 1:
            unlabeled_loss = t / 4 * loss(pred, pseudo_label)
        total = loss(pred, label) + unlabeled_loss
        optimizer.zero_grad()
        if with_sam:
            other_distiller.optimizer.zero_grad()
            total = total + other_distiller.train()(image, pred, label).loss
        total.backward()
        optimizer.step()
        if with_sam:
            other_distiller.optimizer.step()
        if t > 1:
            for averaged, parameter in zip(ema.parameters(), other.parameters()):
                averaged.data = 0.99 * averaged.data + 0.01 * parameter.data
    assert_same_weights(student, other)
    assert_same_weights(handler.ema_student.network, ema)
    assert_same_weights(distiller.teacher, teacher)
    term = trainer.state.output["pseudo_label_loss"]
    assert not term.requires_grad
    torch.testing.assert_close(term, unlabeled_loss.detach(), rtol=1e-10, atol=1e-12)


def test_box_takes_two_thirds_of_each_axis_rounded_down_and_is_a_function_of_seed_and_iteration():
    handler, image = build(ToyStudent())[2], torch.zeros(2, 1, 10, 12, 6)
    boxes = [handler.box_mask(image, t) for t in range(40)]
    for box in boxes:
        assert box.shape == (1, 1, 10, 12, 6) and box.sum() == 6 * 8 * 4
        assert [int(box[0, 0].any(dim=tuple({0, 1, 2} - {axis})).sum()) for axis in range(3)] == [6, 8, 4]
    assert all(torch.equal(a, handler.box_mask(image, t)) for t, a in enumerate(boxes))
    assert len({tuple(box.nonzero()[0].tolist()) for box in boxes}) > 10
    other = build(ToyStudent(), seed=1)[2]
    assert any(not torch.equal(a, other.box_mask(image, t)) for t, a in enumerate(boxes))
    covered = torch.stack(boxes).any(0)[0, 0]
    for axis in range(3):  # the box reaches both ends of each
        assert covered.any(dim=tuple({0, 1, 2} - {axis})).all()


def test_half_of_the_mixed_rows_have_the_unlabeled_image_in_the_box():
    handler = build(ToyStudent())[2]
    box = torch.tensor([[[[True, False]]]])

    def rows(*values):
        return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 2)

    labeled = rows([10, 11], [20, 21], [30, 31]), rows([1, 1], [2, 2], [1, 2])
    unlabeled = rows([40, 41], [50, 51], [60, 61]), rows([0, 1], [2, 0], [0, 2])
    batch = handler.mix(labeled, unlabeled, box)
    assert torch.equal(batch["image"], rows([40, 11], [50, 21], [30, 61]))  # of three rows the larger half
    assert torch.equal(batch["label"], rows([255, 1], [255, 2], [1, 255]))
    assert torch.equal(batch["pseudo_label"], rows([0, 255], [2, 255], [255, 2]))


@pytest.mark.parametrize(("num_labeled", "num_unlabeled"), [(3, 1), (1, 3)])
def test_only_the_unlabeled_rows_that_are_mixed_are_predicted_by_the_average_in_its_mode(num_labeled, num_unlabeled):
    student, batch = ToyStudent().double(), toy_batches(1, num_labeled, num_unlabeled)[0]
    optimizer, loss, handler = build(student, pretraining=0, ema_mode="dropout")
    asked, logits = [], handler.ema_student.logits
    handler.ema_student.logits = lambda image, mode, inferer: asked.append((image, mode)) or logits(image)
    toy_trainer(student, [batch], loss, [handler], optimizer=optimizer).run()
    ((image, mode),) = asked
    assert torch.equal(image, batch["image"][num_labeled : num_labeled + 1]) and mode == "dropout"
    assert not handler.ema_student.is_followed and not optimizer._optimizer_step_post_hooks  # after the run


@pytest.mark.parametrize("depth", [None, 2])
def test_pseudo_label_keeps_the_largest_component_of_each_class(depth):
    label = torch.tensor([[1, 1, 0, 1, 2], [0, 0, 0, 0, 0], [2, 2, 2, 0, 1]])
    kept = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [2, 2, 2, 0, 0]])
    if depth is not None:
        label, kept = (torch.stack([x] * depth, -1) for x in (label, kept))
    logits = torch.nn.functional.one_hot(label, 3).movedim(-1, 0)[None].double()
    assert torch.equal(build(ToyStudent())[2].pseudo_label(logits)[0, 0], kept.to(torch.uint8))
    sigmoid = build(ToyStudent())[2].pseudo_label((label == 1).double()[None, None] - 0.5)
    assert torch.equal(sigmoid[0, 0], (kept == 1).to(torch.uint8))


def test_average_begins_at_the_end_of_pretraining_whoever_else_attaches_it():
    averages = []
    for is_listed in (False, True):
        student, batches, _ = toy_host(3, (8, 8))
        optimizer, loss, handler = build(student, pretraining=2)
        handlers = [handler.ema_student, handler] if is_listed else [handler]
        toy_trainer(student, batches, loss, handlers, optimizer=optimizer).run()
        averages.append(handler.ema_student.network)
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in averages), strict=True))


def test_sam_learns_from_pixels_of_true_label_alone():
    torch.manual_seed(0)
    student, teacher = ToyStudent().double(), ToyTeacher().double()
    loss_of_sam, seen = dice_ce_loss(3, ignore_index=255), []

    class SAMLoss(torch.nn.Module):
        ignore_index = 255

        def forward(self, logits, label):
            logits.retain_grad()
            seen.append((logits, label))
            return loss_of_sam(logits, label)

    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), sam_loss=SAMLoss(), gate="none")
    optimizer, loss, handler = build(student, pretraining=0)
    handlers = [handler, SAMDistillation(distiller, log_interval=1)]
    trainer = toy_trainer(student, toy_batches(1), loss, handlers, optimizer=optimizer)
    trainer.run()
    (logits, label), box = seen[0], handler.box_mask(toy_batches(1)[0]["image"], 1)
    assert torch.equal((label == 255), torch.cat([box, ~box]))
    assert logits.grad.movedim(1, -1)[(label == 255)[:, 0]].abs().sum() == 0
    assert torch.isfinite(trainer.state.output["teacher_labeled_dice"])
    assert 0 <= trainer.state.output["teacher_labeled_dice"] <= 1


@pytest.mark.parametrize("pretraining", [0, 2])
def test_preflight_leaves_no_trace_in_student_and_average(pretraining):
    results = []
    for with_preflight in (True, False):
        torch.manual_seed(0)
        student = ToyStudent().double()
        optimizer, loss, handler = build(student, pretraining=pretraining)
        handlers = [handler]
        if with_preflight:
            handlers.append(Preflight(student, optimizer, ema_student=handler.ema_student))
        toy_trainer(student, toy_batches(4), loss, handlers, optimizer=optimizer).run()
        results.append([*student.parameters(), *handler.ema_student.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "options, rows, message",
    [
        ({"pretraining": 0}, (2, 0), "must have labeled and unlabeled rows but has only one kind"),
        ({"pretraining": 1}, (1, 2), "`label` must have 2 rows or more in pre-training"),
    ],
)
def test_batch_that_cannot_be_mixed_is_one_clear_error(options, rows, message):
    student = ToyStudent().double()
    optimizer, loss, handler = build(student, **options)
    with pytest.raises(ValueError, match=message):
        toy_trainer(student, toy_batches(1, *rows), loss, [handler], optimizer=optimizer).run()


@pytest.mark.parametrize("options", [{"box_fraction": 1.0}, {"pretraining": -1}, {"ema_mode": "test"}])
def test_argument_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"`{list(options)[0]}` must be"):
        build(ToyStudent(), **options)


@pytest.mark.parametrize("wrong", ["loss_function", "loss", "another value", "sam_loss"])
def test_loss_that_would_learn_from_pixels_without_a_label_is_an_error_at_the_start(wrong):
    """Not at the end of pre-training, thousands of iterations later."""
    student = ToyStudent()
    optimizer, loss, handler = build(student)
    teacher, trainer_loss = ToyTeacher(), loss
    sam_loss = None if wrong == "sam_loss" else dice_ce_loss(3, ignore_index=255)
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters()), sam_loss=sam_loss)
    if wrong == "loss_function":
        trainer_loss = PartiallyLabeledLoss()
    elif wrong == "loss":
        handler.loss = torch.nn.CrossEntropyLoss()
    elif wrong == "another value":
        trainer_loss = PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=254))
    found = {"loss_function": None, "loss": -100, "another value": 254, "sam_loss": None}[wrong]
    handlers = [SAMDistillation(distiller), handler]
    trainer = toy_trainer(student, toy_batches(), trainer_loss, handlers, optimizer=optimizer)
    name = "loss_function" if wrong == "another value" else wrong
    with pytest.raises(ValueError, match=f"`{name}` must ignore the label 255, .* its `ignore_index` is {found}; use"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_label_type_that_cannot_hold_the_ignored_value_is_an_error():
    student = ToyStudent()
    optimizer, _, handler = build(student, ignore_index=-1, pretraining=1)
    handler.loss = loss = PartiallyLabeledLoss(dice_ce_loss(3, ignore_index=-1))
    batches = [{**batch, "image": batch["image"].float(), "label": batch["label"].byte()} for batch in toy_batches()]
    with pytest.raises(ValueError, match="a type that holds the `ignore_index` -1 but has torch.uint8; use int64"):
        toy_trainer(student, batches, loss, [handler], optimizer=optimizer).run()
