from __future__ import annotations

import copy
import gc
from operator import itemgetter

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import TerminateOnNan
from monai.data import Dataset
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.losses import DiceLoss
from monai.networks.nets import VNet
from monai.transforms import Compose, RandFlipd

from knowsam_monai.data import RandOrientationd, SemiSupervisedLoader
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.loss_terms import scalar_terms
from knowsam_monai.handlers.sam_distillation import SAMDistillation, _foreground_dice
from knowsam_monai.losses import DistillationLoss, PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.teachers import SAMTeacher, SliceTeacher
from tests.hosts import no_loss
from tests.toys import (
    RegionTeacher,
    ToyStudent,
    ToyTeacher,
    region_batches,
    region_of,
    toy_batches,
    toy_trainer,
    with_gradient,
)


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    student, teacher = ToyStudent().double(), ToyTeacher().double()
    distiller = SAMDistiller(
        teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), taught_views=(1, 2), **{"gate": "none", **kwargs}
    )
    return student, teacher, distiller


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_trainer_steps_equal_hand_written_ones(accumulation):
    batches = toy_batches(5)
    student, teacher, distiller = build()
    other_student, other_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    handler = SAMDistillation(distiller, weight=SigmoidRampUp(3), start=2)
    toy_trainer(student, batches, loss, [handler], accumulation_steps=accumulation).run()

    other = SAMDistiller(other_teacher, taught_views=(1, 2), gate="none").train()
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


def test_gate_weight_in_the_output_is_that_of_the_step_whatever_the_gate_becomes():
    student, _, distiller = build(gate="validation", gate_tolerance=0.9)
    trainer = toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)])
    trainer.run()
    distiller.gate.weight.fill_(1)
    assert trainer.state.output["gate_weight"] == 0


def test_distiller_that_was_in_eval_mode_learns_in_the_run():
    student, teacher, distiller = build()
    before = copy.deepcopy(teacher.state_dict())
    handler = SAMDistillation(distiller.eval())
    toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [handler]).run()
    assert not any(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_teacher_steps_with_unscaled_gradients_under_a_gradscaler():
    weights = []
    for amp in (False, True):
        torch.manual_seed(0)
        student, teacher = ToyStudent(), ToyTeacher()
        distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), gate="none")
        batches = [{name: tensor.float() for name, tensor in batch.items()} for batch in toy_batches(2)]
        loss = PartiallyLabeledLoss(dice_ce_loss(3))
        trainer = toy_trainer(student, batches, loss, [SAMDistillation(distiller)], amp=amp)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        trainer.add_event_handler(Events.STARTED, setattr, trainer, "scaler", scaler)  # `run` makes one for CUDA
        trainer.run()
        weights.append([*student.parameters(), *teacher.parameters()])
    torch.testing.assert_close(weights[1], weights[0])


def test_rows_that_the_teacher_left_out_do_not_end_a_run_that_stops_at_nan():
    student, _, distiller = build(gate="agreement")
    trainer = toy_trainer(student, toy_batches(3), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)])
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run()
    assert trainer.state.iteration == 3


def test_run_after_one_that_an_exception_ended_steps_the_teacher_once_a_step():
    student, _, distiller = build()
    optimizer, hooks = torch.optim.SGD(student.parameters(), lr=0.1), []
    handler, loss = SAMDistillation(distiller), PartiallyLabeledLoss(dice_ce_loss(3))
    with pytest.raises(TypeError):
        toy_trainer(student, toy_batches(1), None, [handler], optimizer=optimizer).run()
    trainer = toy_trainer(student, toy_batches(1), loss, [handler], optimizer=optimizer)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: hooks.append(len(optimizer._optimizer_step_post_hooks)))
    trainer.run()
    assert hooks == [1] and not optimizer._optimizer_step_post_hooks and "zero_grad" not in vars(optimizer)


def test_optimizer_steps_on_after_an_exception_ended_the_run_of_its_trainer():
    student, _, distiller = build()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = toy_trainer(student, toy_batches(1), None, [SAMDistillation(distiller)], optimizer=optimizer)
    with pytest.raises(TypeError):
        trainer.run()
    del trainer
    gc.collect()
    batch = toy_batches(1)[0]
    distiller(batch["image"], student(batch["image"]), batch["label"]).loss.backward()
    optimizer.step()


def test_labeled_dice_leaves_out_a_class_that_a_row_lacks():
    label = torch.zeros(2, 1, 4, 4)
    label[0, :, :2] = 1  # class 2 is in no row, class 1 in one
    logits = torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    assert _foreground_dice(logits, label) == 1
    assert _foreground_dice(logits[1:], label[1:]).isnan()
    assert _foreground_dice(2.0 * label.expand(-1, 2, -1, -1) - 1, torch.cat([label, label], 1)) == 1


def test_labeled_dice_of_overlapping_regions_leaves_out_an_absent_one_and_ignored_pixels():
    label = torch.tensor([[[1, 1, 255, 0]], [[0, 0, 0, 0]]])[None]
    logits = torch.tensor([[[1.0, -1.0, 1.0, -1.0]], [[-1.0, -1.0, -1.0, -1.0]]])[None]
    assert _foreground_dice(logits, label, ignore_index=255) == pytest.approx(2 / 3)  # 1 pixel against 2


def test_labeled_dice_is_the_mean_over_rows_for_each_class_and_then_over_classes():
    label = torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0]]).view(2, 1, 1, 4)
    pred = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(pred, 3).movedim(-1, 1).view(2, 3, 1, 4).float()
    assert _foreground_dice(logits, label) == 0.25  # class 1: 1 and 0; class 2: 0


def test_labeled_dice_leaves_out_ignored_pixels_of_the_label_and_of_the_prediction():
    label = torch.tensor([1, 255, 255, 0]).view(1, 1, 1, 4)
    pred = torch.tensor([[1, 1, 2, 0]])
    logits = torch.nn.functional.one_hot(pred, 3).movedim(-1, 1).view(1, 3, 1, 4).float()
    assert _foreground_dice(logits, label, ignore_index=255) == 1


@pytest.mark.parametrize("view", [0, 2])
def test_labeled_dice_of_the_student_is_that_of_the_view_that_prompts(view):
    student, teacher, distiller = build(prompt_view=view)
    batch, handler = toy_batches(1)[0], SAMDistillation(distiller, log_interval=1)
    with torch.no_grad():
        views = student(batch["image"])
        expected = {
            "student": _foreground_dice(views[:2, view], batch["label"]),
            "teacher": _foreground_dice(teacher(batch["image"], views[:, view])[:2], batch["label"]),
        }
        other = _foreground_dice(views[:2, 1], batch["label"])
    trainer = toy_trainer(student, [batch], PartiallyLabeledLoss(dice_ce_loss(3)), [handler])
    trainer.run()
    assert len({other.item(), *(value.item() for value in expected.values())}) == 3
    assert all(trainer.state.output[f"{who}_labeled_dice"] == value for who, value in expected.items())


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 3), slice(0, None, 2)])
@pytest.mark.parametrize("all_have_labels", [True, False])
def test_labeled_dice_is_of_the_named_rows(rows, all_have_labels):
    student, teacher, distiller = build()
    (batch,) = toy_batches(1, num_labeled=4, num_unlabeled=0)
    label, views = batch["label"], student(batch["image"])
    teacher_logits = teacher(batch["image"], views[:, 0])
    batch["label"] = label if all_have_labels else label[rows]
    trainer = toy_trainer(student, [batch], no_loss, [SAMDistillation(distiller, labeled_rows=rows, log_interval=1)])
    trainer.run()
    for who, logits in (("teacher", teacher_logits), ("student", views[:, 0])):
        assert trainer.state.output[f"{who}_labeled_dice"] == _foreground_dice(logits[rows], label[rows])


def test_shut_gate_leaves_the_students_step_exactly_as_without_distillation():
    batches = toy_batches(3)
    student, _, distiller = build(gate="validation")  # no validation yet: weight 0
    alone = copy.deepcopy(student)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(student, batches, loss, [SAMDistillation(distiller)]).run()
    toy_trainer(alone, batches, loss, []).run()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters()))


def test_agreement_gate_measures_in_the_run_and_leaves_the_student_in_train_mode():
    student, _, distiller = build(gate="agreement")
    trainer = toy_trainer(
        student, toy_batches(4), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller, gate_interval=2)]
    )
    trainer.run()
    assert distiller.gate.num_measured == 2 and student.training


def test_gate_is_measured_as_the_trainer_calls_its_student_and_on_the_image_for_sam():
    student, teacher, distiller = build(gate="agreement")
    network, inferred, seen, calls = Both(student), [], [], []

    class CountingInferer(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            inferred.append(inputs)
            return super().__call__(inputs, network, *args, **kwargs)

    network.register_forward_hook(lambda *_: calls.append(None))
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].min().item()))
    batches = [{**batch, "sam_image": batch["image"] + 1} for batch in toy_batches(2)]
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    handler = SAMDistillation(distiller, gate_interval=1, logits_of=itemgetter(0))
    trainer = toy_trainer(
        network, batches, lambda pred, label: loss(pred[0], label), [handler], inferer=CountingInferer()
    )
    trainer.run()
    assert distiller.gate.num_measured == 2 and len(calls) == len(inferred) > 2
    assert min(seen) >= 1  # and images are below 1


class Both(torch.nn.Module):
    """A student that returns more than its logits."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, image):
        return self.student(image), "features"


def test_labeled_dice_of_a_teacher_that_neither_learns_nor_teaches_is_written():
    student, teacher, distiller = build()
    teacher.requires_grad_(False)
    handler = SAMDistillation(distiller, weight=0.0, log_interval=1)
    (batch,), loss = toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3))
    expected = _foreground_dice(teacher(batch["image"], student(batch["image"])[:, 0])[:2], batch["label"])
    trainer = toy_trainer(student, [batch], loss, [handler])
    trainer.run()
    assert trainer.state.output["teacher_labeled_dice"] == expected


def test_no_labeled_dice_is_written_where_no_row_is_labeled():
    student, _, distiller = build()
    handler = SAMDistillation(distiller, labeled_rows=0, log_interval=1)
    loss = PartiallyLabeledLoss(dice_ce_loss(3), labeled_rows="all")
    trainer = toy_trainer(student, toy_batches(1, num_labeled=4, num_unlabeled=0), loss, [handler])
    trainer.run()
    assert "distillation_loss" in trainer.state.output and "teacher_labeled_dice" not in trainer.state.output


@pytest.mark.parametrize("learns", [True, False])
def test_sam_loss_is_written_and_added_where_the_teacher_learns(learns):
    batches = toy_batches(1)
    student, teacher, distiller = build()
    teacher.requires_grad_(learns)
    trainer = toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)])
    supervised = PartiallyLabeledLoss(dice_ce_loss(3))(student(batches[0]["image"]), batches[0]["label"])
    trainer.run()
    output = trainer.state.output
    added = output["distillation_loss"] + (output["sam_loss"] if learns else 0)
    assert ("sam_loss" in output) == learns and output["distillation_loss"] > 0
    torch.testing.assert_close(output["loss"].detach(), (supervised + added).detach(), rtol=1e-10, atol=0)


def test_labeled_rows_may_be_a_callable_of_the_batch():
    batches = toy_batches(2, num_labeled=4, num_unlabeled=0)
    for batch in batches:
        batch["count"] = 1
    student, teacher, distiller = build()
    rows = []
    teacher.register_forward_hook(lambda m, a, out: rows.append(len(out)) if out.requires_grad else None)
    handler = SAMDistillation(distiller, labeled_rows=lambda batch: batch["count"])
    toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3), labeled_rows=1), [handler]).run()
    assert rows == [1, 1]


def test_trainers_optimizer_is_left_as_it_was_after_the_run():
    student, _, distiller = build()
    trainer = toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)])
    trainer.run()
    assert "zero_grad" not in vars(trainer.optimizer) and not trainer.optimizer._optimizer_step_post_hooks


# --- every k-th step, and the image that SAM sees ---------------------------------------------------------------------


def test_teacher_runs_at_every_second_step_and_leaves_the_others_as_they_are():
    batches = toy_batches(5)
    student, teacher, distiller = build()
    other_student, other_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(None))
    toy_trainer(student, batches, loss, [SAMDistillation(distiller, every=2)]).run()
    assert len(calls) == 2 * 2  # labeled and unlabeled rows of steps 2 and 4

    other = SAMDistiller(
        other_teacher, torch.optim.Adam(other_teacher.parameters(), lr=0.01), taught_views=(1, 2), gate="none"
    ).train()
    optimizer = torch.optim.SGD(other_student.parameters(), lr=0.1)
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        other.optimizer.zero_grad()
        pred = other_student(batch["image"])
        total = loss(pred, batch["label"])
        if step % 2 == 0:
            total = total + other(batch["image"], pred, batch["label"]).loss
        total.backward()
        optimizer.step()
        if step % 2 == 0:
            other.optimizer.step()
    pairs = zip((student, teacher), (other_student, other_teacher))
    for ours, expected in ((a, b) for one, two in pairs for a, b in zip(one.parameters(), two.parameters())):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert {int(state["step"]) for state in distiller.optimizer.state.values()} == {2}


def test_step_without_the_teacher_has_no_terms_of_it():
    student, _, distiller = build()
    trainer = toy_trainer(
        student, toy_batches(3), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller, every=2)]
    )
    trainer.run()
    assert not {"distillation_loss", "sam_loss", "teacher_logits", "gate_weight"} & set(trainer.state.output)


@pytest.mark.parametrize("every,expected", [(1, [4, 8]), (2, [4, 8]), (3, [6, 9]), (4, [4, 8])])
def test_labeled_dice_is_logged_once_an_interval_however_rarely_the_teacher_runs(every, expected):
    logged = []
    trainer = toy_trainer(
        build()[0],
        toy_batches(9),
        PartiallyLabeledLoss(dice_ce_loss(3)),
        [SAMDistillation(build()[2], every=every, log_interval=4)],
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: logged.append(engine.state.iteration) if "teacher_labeled_dice" in engine.state.output else None,
    )
    trainer.run()
    assert logged == expected


def test_every_below_one_is_an_error():
    with pytest.raises(ValueError, match="`every` must be at least 1 but is 0"):
        SAMDistillation(build()[2], every=0)


def test_teacher_sees_the_batch_s_own_image_for_it_and_the_student_does_not():
    batches = toy_batches(1)
    batches[0]["sam_image"] = batches[0]["image"] + 1
    student, teacher, distiller = build()
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)]).run()
    assert torch.equal(seen[0], batches[0]["image"]) and torch.equal(torch.cat(seen[1:]), batches[0]["sam_image"])


def test_image_for_the_teacher_of_another_size_is_an_error():
    batches = toy_batches(1)
    batches[0]["sam_image"] = batches[0]["image"][:3]
    student, _, distiller = build()
    with pytest.raises(ValueError, match="`sam_image` must have the rows and the size of the image"):
        toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)]).run()


def test_cached_teacher_without_an_image_of_its_own_is_an_error():
    student, teacher, distiller = build()
    teacher.encoder = "cached"
    with pytest.raises(ValueError, match="`batch` must have a 'sam_image' for a teacher with encoder 'cached'"):
        toy_trainer(student, toy_batches(1), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)]).run()


def test_cached_teacher_with_another_spatial_transform_is_an_error_before_the_first_step():
    rows = [{"image": torch.rand(1, 8, 8), "label": torch.zeros(1, 8, 8)} for _ in range(2)]
    loader = SemiSupervisedLoader(Dataset(rows, Compose([RandOrientationd(), RandFlipd("image")])), None, 2, 0)
    student, teacher, distiller = build()
    teacher.encoder = "cached"
    student.register_forward_pre_hook(lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match="only random flip.* but the augmentation has RandFlipd"):
        toy_trainer(student, loader, PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)]).run()


# --- volumes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_three_steps_on_slices_of_volumes_equal_hand_written_ones(sampling):
    batches = toy_batches(3, size=(4, 5, 6))
    torch.manual_seed(0)
    student, sam_teacher = ToyStudent(spatial_dims=3).double(), ToyTeacher().double()
    other_student, other_teacher = copy.deepcopy(student), copy.deepcopy(sam_teacher)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    teacher = SliceTeacher(sam_teacher, slices=2, sampling=sampling, seed=3)
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), taught_views=(1, 2), gate="none")
    toy_trainer(student, batches, loss, [SAMDistillation(distiller, weight=0.5)]).run()

    optimizer = torch.optim.SGD(other_student.parameters(), lr=0.1)
    other_optimizer = torch.optim.Adam(other_teacher.parameters(), lr=0.01)
    for t, batch in enumerate(batches, start=1):
        image, label, pred = batch["image"], batch["label"], other_student(batch["image"])
        index = teacher.draw_slices(pred[:, 0].detach(), t).index.tolist()
        images = torch.stack([image[row, ..., i] for row in range(4) for i in index[row]])
        views = torch.stack([pred[row, ..., i] for row in range(4) for i in index[row]])
        labels = torch.stack([label[row, ..., i] for row in range(2) for i in index[row]])
        target = other_teacher(images, views[:, 0].detach())
        total = loss(pred, label) + dice_ce_loss(3)(target[:4], labels)
        total = total + 0.5 * sum(DistillationLoss()(views[:, v], target.detach()) for v in (1, 2))
        optimizer.zero_grad()
        other_optimizer.zero_grad()
        total.backward()
        optimizer.step()
        other_optimizer.step()
    for ours, expected in zip(
        [*student.parameters(), *sam_teacher.parameters()], [*other_student.parameters(), *other_teacher.parameters()]
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def volume_trainer(slices, **kwargs):
    torch.manual_seed(0)
    teacher = SliceTeacher(ToyTeacher().double(), slices=slices)
    distiller = SAMDistiller(
        teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), taught_views=(1, 2), **{"gate": "none", **kwargs}
    )
    student = ToyStudent(spatial_dims=3).double()
    handler = SAMDistillation(distiller, log_interval=1, gate_interval=1)
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    return toy_trainer(student, toy_batches(2, size=(4, 5, 6)), loss, [handler]), distiller


def test_teacher_logits_are_there_if_a_handler_asks_for_them_and_of_whole_volumes_or_none():
    (silent, _), (whole, _), (drawn, _) = volume_trainer(slices=None), volume_trainer(None), volume_trainer(2)
    for trainer in (whole, drawn):
        trainer.add_event_handler(
            IterationEvents.FORWARD_COMPLETED, lambda engine: engine.state.output.update(teacher_logits=None)
        )
    read = {}
    for trainer in (silent, whole, drawn):
        trainer.add_event_handler(
            IterationEvents.BACKWARD_COMPLETED,
            lambda engine: read.update({engine: engine.state.output.get("teacher_logits", "nothing")}),
        )
        trainer.run()
        assert "teacher_logits" not in trainer.state.output
    logits = read[whole]
    assert logits.shape == (4, 3, 4, 5, 6) and not logits.requires_grad and torch.isfinite(logits).all()
    assert read[drawn] is None and read[silent] == "nothing"
    names = {"distillation_loss", "sam_loss", "gate_weight", "teacher_labeled_dice", "student_labeled_dice"}
    assert all(drawn.state.output[name].ndim == 0 for name in names)


def test_teacher_logits_are_none_while_the_gate_is_shut():
    trainer, _ = volume_trainer(slices=None, gate="validation")
    read = []
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda engine: engine.state.output.update(teacher_logits=None)
    )
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda engine: read.append(engine.state.output["teacher_logits"])
    )
    trainer.run()
    assert read == [None, None]


def test_slices_are_drawn_by_the_iteration_of_the_trainer():
    trainer, distiller = volume_trainer(slices=2)
    teacher, drawn = distiller.teacher, []
    draw = teacher.draw_slices
    teacher.draw_slices = lambda logits, iteration: drawn.append(iteration) or draw(logits, iteration)
    trainer.run()
    assert drawn == [1, 2]


def test_agreement_gate_sees_whole_volumes_where_slices_are_drawn():
    trainer, distiller = volume_trainer(slices=2, gate="agreement")
    shapes = []
    distiller.teacher.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    trainer.run()
    assert distiller.gate.num_measured == 2
    # whole volumes for each measurement: unlabeled ones, the same turned, and labeled ones
    assert shapes.count((2, 1, 4, 5, 6)) == 2 * 3 and shapes.count((2, 1, 4, 5, 2)) == 2 * 2


def test_monais_own_vnet_is_taught_volumes_by_sam():
    torch.manual_seed(0)
    student = VNet(spatial_dims=3, in_channels=1, out_channels=2, dropout_dim=3)
    sam_teacher = SAMTeacher(2, image_size=32, variant="stand_in", trainable="all")
    optimizer = torch.optim.Adam([p for p in sam_teacher.parameters() if p.requires_grad], lr=1e-4)
    handler = SAMDistillation(SAMDistiller(SliceTeacher(sam_teacher, slices=2), optimizer, gate="none"), log_interval=1)
    batches = [
        {name: tensor.float() for name, tensor in batch.items()}
        for batch in toy_batches(2, num_classes=2, size=(32, 32, 16))
    ]
    before = copy.deepcopy(sam_teacher.state_dict())
    trainer = toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(2)), [handler], lr=0.01)
    trainer.run()
    output = trainer.state.output
    assert all(output[name].isfinite() and output[name] > 0 for name in ("distillation_loss", "sam_loss"))
    assert with_gradient(student) == {name for name, _ in student.named_parameters()}
    changed = {name for name, tensor in sam_teacher.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {name for name, p in sam_teacher.named_parameters() if p.requires_grad} and changed


def test_default_gate_is_measured_without_labels_of_its_own_and_without_an_evaluator():
    student, teacher, _ = build()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01))
    toy_trainer(student, toy_batches(10), PartiallyLabeledLoss(dice_ce_loss(3)), [SAMDistillation(distiller)]).run()
    assert distiller.gate.mode == "agreement" and distiller.gate.num_measured == 1


def test_run_with_overlapping_regions_is_as_many_runs_of_one_channel():
    """Losses and Dice values are the mean of theirs, and student and teacher learn the same."""
    torch.manual_seed(0)
    student, teacher = torch.nn.Conv2d(1, 3, 3, padding=1).double(), RegionTeacher(3).double()
    batches = region_batches(6)
    students = [region_of(student, lambda: torch.nn.Conv2d(1, 1, 3, padding=1), c) for c in range(3)]
    teachers = [region_of(teacher, lambda: RegionTeacher(1), c) for c in range(3)]

    def run(student, teacher, channels, lr, **overlapping):
        distiller = SAMDistiller(
            teacher, torch.optim.SGD(teacher.parameters(), lr), DistillationLoss(2.0), gate="none", **overlapping
        )
        handler = SAMDistillation(distiller, weight=0.7, log_interval=1)
        loss = PartiallyLabeledLoss(DiceLoss(sigmoid=True), **overlapping)
        mine = [{**batch, "label": batch["label"][:, channels]} for batch in batches]
        trainer, terms = toy_trainer(student, mine, loss, [handler], lr=lr), []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: terms.append(scalar_terms(e.state.output)))
        trainer.run()
        return terms

    # a loss that is a mean over three has a third of the gradient
    together = run(student, teacher, slice(None), lr=0.3, overlapping=True)
    alone = [run(students[c], teachers[c], slice(c, c + 1), lr=0.1) for c in range(3)]
    assert {"loss", "distillation_loss", "sam_loss", "teacher_labeled_dice"} < set(together[0])
    for ours, *theirs in zip(together, *alone, strict=True):
        for name, term in ours.items():
            torch.testing.assert_close(term, torch.stack([t[name] for t in theirs]).mean(), rtol=1e-6, atol=1e-9)
    for ours, theirs in ((student, students), (teacher, teachers)):
        for name, value in ours.state_dict().items():
            expected = torch.cat([other.state_dict()[name] for other in theirs])
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "overlapping", "warned"),
    [
        (
            DiceLoss(sigmoid=True),
            False,
            "has a sigmoid for each channel but the distiller a softmax over all channels; build it with "
            "`overlapping=True`.",
        ),
        (
            DiceLoss(softmax=True),
            True,
            "has a softmax over all channels but the distiller a sigmoid for each channel; build it with "
            "`overlapping=False`.",
        ),
        (DiceLoss(sigmoid=True), True, None),
        (DiceLoss(softmax=True), False, None),
        (torch.nn.functional.cross_entropy, True, None),
    ],
)
def test_loss_that_applies_another_activation_is_warned_of(loss, overlapping, warned, caplog):
    student, _, distiller = build(overlapping=overlapping)
    loss = PartiallyLabeledLoss(loss, overlapping=overlapping)
    SAMDistillation(distiller).started(toy_trainer(student, toy_batches(1), loss, []))
    assert len(caplog.messages) == (warned is not None)
    assert warned is None or warned in caplog.messages[0]


def test_one_channel_is_the_same_with_either_activation(caplog):
    distiller = SAMDistiller(ToyTeacher(num_classes=1))
    loss = PartiallyLabeledLoss(DiceLoss(sigmoid=True))
    SAMDistillation(distiller).started(toy_trainer(ToyStudent(num_classes=1), toy_batches(1), loss, []))
    assert not caplog.messages
