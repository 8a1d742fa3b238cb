"""Silent mistakes are reported in each way of attaching, and nothing outlives its distiller."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from ignite.engine import Events
from torch import nn

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.watched_loader import WatchedLoader
from knowsam_monai.distillation.wiring import UNTAUGHT_CALLS, Wiring, has_each_row_twice
from knowsam_monai.handlers import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from tests.attached import build, host, loss_of, plain_loop
from tests.toys import ToyStudent, ToyTeacher, distiller_of, region_batches, toy_batches, toy_trainer

WAYS = ["handler", "loop", "attachment"]


def train(way, student, optimizer, distiller, batches, before_step=lambda step: None, **options):
    """Train in one of the three ways; `before_step` may change the host. Returns the object that keeps SKD attached."""
    if way == "handler":
        loss = PartiallyLabeledLoss(dice_ce_loss(3), labeled_rows="all" if "labeled_rows" in options else None)
        trainer = toy_trainer(student, batches, loss, [SAMDistillation(distiller, **options)], optimizer=optimizer)
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: before_step(engine.state.iteration))
        trainer.run()
        return trainer
    if way == "loop":
        handle = distiller.follow(optimizer)
        for step, batch in enumerate(batches, start=1):
            before_step(step)
            optimizer.zero_grad()
            logits = student(batch["image"])
            (loss_of(logits, batch) + distiller(batch["image"], logits, batch["label"], **options).loss).backward()
            optimizer.step()
        return handle
    skd = distiller.attach(student, optimizer, **options)
    for step, batch in enumerate(skd.watch(batches), start=1):
        before_step(step)
        host(student, optimizer, [batch])
    return skd


def warnings_with(caplog, words):
    return [line for line in caplog.messages if words in line]


# --- warnings within 100 steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_rebuilt", [True, False])
def test_optimizer_that_the_host_rebuilds_is_warned_of(way, is_rebuilt, caplog):
    student, optimizer, distiller, batches = build(num_batches=2)

    def before_step(step):
        if is_rebuilt and step == 5:  # the host steps another optimizer from now on
            optimizer.step = torch.optim.SGD(student.parameters(), lr=0.1).step

    train(way, student, optimizer, distiller, batches * 52, before_step)
    lines = warnings_with(caplog, "optimizer has not stepped in 100 steps, so SAM learns nothing")
    assert len(lines) == is_rebuilt and all("builds a new optimizer" in line for line in lines)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["softmax", None])
def test_student_that_returns_probabilities_is_warned_of(way, activation, caplog):
    student, optimizer, distiller, batches = build()
    if activation:
        student.register_forward_hook(lambda module, arguments, output: output.softmax(2 if module.training else 1))
    train(way, student, optimizer, distiller, batches)
    assert len(warnings_with(caplog, "the student seems to return probabilities, not logits")) == (
        activation is not None
    )


@pytest.mark.parametrize("num_regions", [1, 3])
@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Identity()])
def test_sigmoid_student_that_returns_probabilities_is_warned_of(activation, num_regions, caplog):
    distiller = distiller_of(ToyTeacher(num_regions).double(), overlapping=num_regions > 1)
    student = ToyStudent(num_regions).double()
    for batch in 51 * region_batches(1, num_regions):
        distiller(batch["image"], activation(8 * student(batch["image"]) - 4).detach(), batch["label"])
    assert len(warnings_with(caplog, "the student seems to return probabilities")) == isinstance(activation, nn.Sigmoid)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_twice", [True, False])
def test_batch_that_has_each_image_twice_is_warned_of(way, is_twice, caplog):
    student, optimizer, distiller, batches = build()
    if is_twice:
        batches = [{**batch, "image": torch.cat([batch["image"]] * 2)} for batch in batches]
    train(way, student, optimizer, distiller, batches)
    assert len(warnings_with(caplog, "each image is in the batch twice")) == is_twice


def test_student_called_on_its_batch_twice_over_is_warned_of(caplog):
    """R-Drop: cat([x, x]) in the step."""
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda batch, image: (image, batch["label"], None))
    batch = next(skd.watch(batches))
    student(torch.cat([batch["image"]] * 2))
    assert len(warnings_with(caplog, "each image is in the batch twice (as in R-Drop)")) == 1


@pytest.mark.parametrize("matches", ["never", "every third batch"])
def test_select_that_always_returns_none_is_warned_of(matches, caplog):
    student, optimizer, distiller, batches = build()

    def select(batch, image):
        is_taught = matches != "never" and batch is batches[0]
        return (image, batch["label"], None) if is_taught else None

    skd = distiller.attach(student, optimizer, select=select)
    for batch in skd.watch(batches * 34):
        optimizer.zero_grad()
        loss_of(student(batch["image"]), batch).backward()
        optimizer.step()
    lines = warnings_with(caplog, "nothing was distilled in 50 batches: `select` returned None for each call")
    assert len(lines) == (matches == "never") and all("torch.equal(image, batch['image'])" in line for line in lines)


def test_averaged_copy_is_an_error_or_warned_of(caplog):
    """Its parameters are in the optimizer, and it is called without gradients."""
    student, optimizer, distiller, batches = build()
    average = copy.deepcopy(student)
    both = torch.optim.SGD([*student.parameters(), *average.parameters()], lr=0.1)
    for steps_attached in (True, False):
        skd = distiller.attach(average, both)
        try:
            for batch in skd.watch(batches * 18):
                with torch.no_grad():
                    average(batch["image"])
                loss_of(student(batch["image"]), batch).backward()
                (both if steps_attached else optimizer).step()
        except RuntimeError as error:
            assert steps_attached and "not to an averaged copy" in str(error)
        else:
            assert not steps_attached
        skd.remove()
    assert (
        len(warnings_with(caplog, "not called in train mode with gradients. Attach to the module that the host tr"))
        == 1
    )


@pytest.mark.parametrize("is_average", [True, False])
def test_logits_without_a_gradient_are_warned_of(is_average, caplog):
    student, optimizer, distiller, batches = build()
    distiller.follow(optimizer)
    for batch in batches * 35:
        with torch.set_grad_enabled(not is_average):
            logits = student(batch["image"])
        distiller(batch["image"], logits, batch["label"]).loss.backward()
        optimizer.step()
    assert len(warnings_with(caplog, f"logits required no gradient in {UNTAUGHT_CALLS} steps")) == is_average


@pytest.mark.parametrize("kind", ["forgotten", "evaluation", "resumed in between"])
def test_distiller_that_a_loop_leaves_in_eval_mode_is_warned_of(kind, caplog):
    student, optimizer, distiller, batches = build()
    distiller.follow(optimizer)
    distiller.eval()
    for step, batch in enumerate(batches * 40):
        distiller.train(kind == "resumed in between" and step == 60)
        with torch.set_grad_enabled(kind != "evaluation"):
            distiller(batch["image"], student(batch["image"]), batch["label"])
    words = f"the distiller was in eval mode in {UNTAUGHT_CALLS} steps with labels, so SAM learns nothing"
    assert len(warnings_with(caplog, words)) == (kind == "forgotten")


# --- SKD twice --------------------------------------------------------------------------------------------------------


def test_two_lines_or_the_handler_while_attached_are_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    for way in ("loop", "handler"):
        with pytest.raises(RuntimeError, match="must be added once to each step .* while it is attached to a student"):
            train(way, student, optimizer, distiller, skd.watch(batches))
    with torch.no_grad():  # to inspect SAM's output
        distiller(batches[0]["image"], student(batches[0]["image"]), batches[0]["label"])
    skd.remove()
    plain_loop(student, optimizer, distiller, batches)


def test_handler_that_is_listed_twice_is_warned_of(caplog):
    student, optimizer, distiller, batches = build()
    handlers = [SAMDistillation(distiller), SAMDistillation(distiller)]
    toy_trainer(student, batches, PartiallyLabeledLoss(dice_ce_loss(3)), handlers, optimizer=optimizer).run()
    assert len(warnings_with(caplog, "called twice with the same logits, so SKD counts twice")) == 1


# --- labels of rows that are unlabeled to the student -----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_labels_for_every_row_are_an_error_until_somebody_says_whose_they_are(way):
    batches = toy_batches(2, num_labeled=4, num_unlabeled=0)
    student, optimizer, distiller, _ = build()
    before = copy.deepcopy(distiller.teacher.state_dict())
    with pytest.raises(ValueError, match='`label` must have the labeled rows only .* pass `labeled_rows`, .*"all"'):
        train(way, student, optimizer, distiller, batches)
    assert all(torch.equal(before[name], value) for name, value in distiller.teacher.state_dict().items())

    trained = {}
    for name, rows in {"all": "all", "number": 4, "slice": slice(0, 4), "two": 2}.items():
        student, optimizer, distiller, _ = build()
        train(way, student, optimizer, distiller, batches, labeled_rows=rows)
        trained[name] = list(distiller.teacher.parameters())
    assert all(torch.equal(a, b) for k in ("number", "slice") for a, b in zip(trained["all"], trained[k], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(trained["all"], trained["two"], strict=True))


@pytest.mark.parametrize("way", ["handler", "attachment"])
def test_labeled_rows_may_be_a_function_of_the_batch(way):
    batches = [{**batch, "count": 2} for batch in toy_batches(2, num_labeled=4, num_unlabeled=0)]
    ours, expected = build()[:3], build()[:3]
    train(way, *ours, batches, labeled_rows=lambda batch: batch["count"])
    train(way, *expected, batches, labeled_rows=2)
    assert all(
        torch.equal(a, b) for a, b in zip(ours[2].teacher.parameters(), expected[2].teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize("way", WAYS)
def test_loss_that_knows_pixels_without_a_label_takes_labels_of_every_row(way):
    """Bidirectional copy-paste has a label for every row, with pixels that nobody labeled."""
    student, optimizer, distiller, _ = build(sam_loss=dice_ce_loss(3, ignore_index=255))
    train(way, student, optimizer, distiller, toy_batches(2, num_labeled=4, num_unlabeled=0))


def test_teacher_that_does_not_learn_takes_labels_of_every_row():
    student, optimizer, distiller, _ = build()
    batch = toy_batches(1, num_labeled=4, num_unlabeled=0)[0]
    logits = student(batch["image"])
    distiller.eval()(batch["image"], logits, batch["label"])
    with torch.no_grad():
        distiller.train()(batch["image"], logits, batch["label"])
    SAMDistiller(distiller.teacher, taught_views=(1, 2), gate="none")(batch["image"], logits, batch["label"])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_teacher_that_could_learn_but_has_no_optimizer_is_warned_of_at_once(is_frozen, caplog):
    student, _, _, (batch, *_) = build()
    distiller = SAMDistiller(ToyTeacher().double().requires_grad_(not is_frozen), gate="none").train()
    distiller(batch["image"], student(batch["image"]), batch["label"])
    found = warnings_with(caplog, "no optimizer, so it does not train ToyTeacher, which has 4 trainable tensor(s)")
    assert len(found) == (not is_frozen)


# --- what is deleted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_broken_off", [False, True])
def test_deleted_distillers_are_freed_and_their_hooks_removed(way, is_broken_off):
    student, optimizer, _, batches = build()
    sam_optimizers = []  # a host may keep them too

    def break_off(step):
        if is_broken_off and step == 3:
            raise KeyboardInterrupt

    def attach_and_forget():
        _, _, distiller, _ = build()
        sam_optimizers.append(distiller.optimizer)
        try:
            train(way, student, optimizer, distiller, batches, break_off)
        except KeyboardInterrupt:
            pass
        return weakref.ref(distiller), weakref.ref(distiller.teacher)

    alive = [ref for _ in range(3) for ref in attach_and_forget()]
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6
    assert (
        not optimizer._optimizer_step_post_hooks and not student._forward_hooks and "zero_grad" not in vars(optimizer)
    )
    assert not any(sam_optimizer._optimizer_step_post_hooks for sam_optimizer in sam_optimizers)


@pytest.mark.parametrize("kept", ["attachment", "watched loader", "iterator"])
def test_attachment_lives_as_long_as_anything_of_it_that_the_host_has(kept, caplog):
    student, optimizer, distiller, batches = build()
    teacher = distiller.teacher
    skd = distiller.attach(student, optimizer)
    before = copy.deepcopy(teacher.state_dict())
    if kept == "attachment":
        del distiller
        host(student, optimizer, skd.watch(batches))
        del skd
    else:
        loader = skd.watch(batches) if kept == "watched loader" else iter(skd.watch(batches))
        del distiller, skd
        host(student, optimizer, loader)
        del loader
    assert not any(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not student._forward_hooks and not optimizer._optimizer_step_post_hooks
    assert not warnings_with(caplog, "an attachment was deleted")


def test_attachment_that_nobody_keeps_is_warned_of(caplog):
    student, optimizer, distiller, _ = build()
    distiller.attach(student, optimizer)
    assert not student._forward_hooks
    assert (
        len(
            warnings_with(
                caplog, "keep a reference to what `attach` returns, and let the host iterate over its `watch(loader)`"
            )
        )
        == 1
    )


def test_loop_that_stops_before_its_last_batch_is_not_warned(caplog):
    student, optimizer, distiller, batches = build()

    def train_two_steps():
        skd = distiller.attach(student, optimizer)
        for step, batch in enumerate(skd.watch(batches)):
            if step == 2:
                break
            student(batch["image"]).sum().backward()
            optimizer.step()

    train_two_steps()
    gc.collect()
    assert not student._forward_hooks and not warnings_with(caplog, "an attachment was deleted")


@pytest.mark.parametrize("fault", ["no batch", "no logits", "orientations", "step"])
def test_attachment_that_is_deleted_after_an_error_is_not_warned_of(fault, caplog):
    student, optimizer, distiller, batches = build()
    distiller.teacher.encoder = "cached" if fault == "orientations" else "adapted"

    def run():
        skd = distiller.attach(student, optimizer, logits_of=(lambda _: None) if fault == "no logits" else None)
        if fault == "step":
            skd.next_batch(batches[0])
            student.first.weight.square().sum().backward()
            optimizer.step()
        host(student, optimizer, batches if fault == "no batch" else skd.watch(batches))

    with pytest.raises((RuntimeError, TypeError, ValueError)):
        run()
    gc.collect()
    assert not student._forward_hooks and not warnings_with(caplog, "an attachment was deleted")


def test_copy_of_a_distiller_is_attached_to_nobody():
    student, optimizer, distiller, _ = build()
    skd = distiller.attach(student, optimizer)
    wirings = copy.deepcopy(distiller).wiring, pickle.loads(pickle.dumps(distiller.wiring))
    assert list(distiller.wiring.attachments) == [skd] and all(type(w) is Wiring and not w.attachments for w in wirings)


def test_loader_that_is_watched_twice_counts_each_batch_once():
    student, optimizer, distiller, batches = build()
    watched_loader = WatchedLoader(batches)
    skd = distiller.attach(student, optimizer, loader=watched_loader)
    assert skd.watch(watched_loader) is watched_loader
    for number, batch in enumerate(skd.watch(watched_loader), start=1):
        student(batch["image"])
        assert skd.iteration == number
    with torch.no_grad():
        for batch in watched_loader:  # the host evaluates its training set
            student.eval()(batch["image"])
    assert skd.iteration == number


@pytest.mark.parametrize("way", ["loop", "attachment"])
def test_following_again_with_another_scaler_undoes_the_former_call(way):
    """As in a notebook whose training is started again with AMP, or after an exception."""
    found = []
    for again in (False, True):
        student, optimizer, distiller, batches = build(num_batches=2)
        if again:
            distiller.follow(optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**16))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        skd = distiller.attach(student, optimizer, scaler=scaler) if way == "attachment" else None
        if skd is None:
            distiller.follow(optimizer, scaler)
        for batch in batches:
            if skd is not None:
                skd.next_batch(batch)
            optimizer.zero_grad()
            logits = student(batch["image"])
            loss = loss_of(logits, batch)
            loss = loss if skd is not None else loss + distiller(batch["image"], logits, batch["label"]).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(copy.deepcopy(distiller.teacher.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_sam_that_breaks_down_teaches_nothing_and_is_named(way, caplog, monkeypatch):
    monkeypatch.setattr("knowsam_monai.distillation.wiring.CHECKED", 2)
    student, optimizer, distiller, batches = build(num_batches=4)
    with torch.no_grad():
        distiller.teacher.image_conv.bias.fill_(torch.nan)
    train(way, student, optimizer, distiller, batches)
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    assert len(warnings_with(caplog, "SAM's loss is repeatedly not finite")) == 1
    assert len(warnings_with(caplog, "the output of ToyTeacher is repeatedly not finite")) == 1


def test_follower_of_two_students_with_one_optimizer_steps_for_the_other_when_one_is_removed():
    students = [ToyStudent().double(), ToyStudent().double()]
    optimizer = torch.optim.SGD([p for student in students for p in student.parameters()], lr=0.1)
    distiller = distiller_of(ToyTeacher().double())
    first, second = (distiller.attach(student, optimizer, scaler=lambda: None) for student in students)
    second.remove()
    before = copy.deepcopy(distiller.teacher.state_dict())
    host(students[0], optimizer, first.watch(toy_batches(1)))
    assert any((value != before[name]).any() for name, value in distiller.teacher.state_dict().items())


def test_following_keeps_neither_the_optimizer_nor_the_host_alive():
    class Host:
        scaler = None

    optimizer, distiller, owner = torch.optim.SGD(ToyStudent().double().parameters(), lr=0.1), build()[2], Host()
    handle = distiller.follow(optimizer, lambda owner=owner: owner.scaler)
    handle.remove()
    alive = [weakref.ref(optimizer), weakref.ref(owner)]
    del optimizer, owner, handle
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_copied_distiller_hears_the_steps_of_its_own_teacher():
    distiller = copy.deepcopy(build()[2])
    distiller.wiring._since_step = 7
    distiller.optimizer.step()
    assert distiller.wiring._since_step == 0


def test_an_empty_slice_hides_no_copies():
    image = torch.rand(2, 1, 4, 4)
    empty = torch.zeros(1, 1, 4, 4)
    assert has_each_row_twice(torch.cat([image, empty, image, empty]))
    assert not has_each_row_twice(torch.cat([image, empty, empty]))


def test_default_ignore_index_of_torch_s_losses_is_none():
    student, optimizer, distiller, batches = build(sam_loss=torch.nn.CrossEntropyLoss())
    assert distiller.ignore_index is None
    distiller.sam_loss = torch.nn.CrossEntropyLoss(ignore_index=255)
    assert distiller.ignore_index == 255
