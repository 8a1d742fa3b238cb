from __future__ import annotations

import copy
from operator import itemgetter

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from knowsam_monai.attachment import Attachment
from knowsam_monai.distiller import SAMDistiller
from knowsam_monai.handlers import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks import SliceTeacher, unstack_views

from .hosts import CASES, assert_same_weights
from .toys import ToyStudent, ToyTeacher, toy_batches, toy_trainer

WEIGHT = SigmoidRampUp(3)


def build(num_classes=3, size=(8, 8), num_batches=3, dtype=torch.float64, device="cpu", **kwargs):
    """Student, its optimiser, distiller and batches; of volumes SAM sees two slices a step."""
    torch.manual_seed(0)
    student = ToyStudent(num_classes, len(size)).to(device, dtype)
    teacher = ToyTeacher(num_classes).to(device, dtype)
    if len(size) == 3:
        teacher = SliceTeacher(teacher, slices=2)
    sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    distiller = SAMDistiller(teacher, sam_optimizer, taught_views=(1, 2), **kwargs)
    batches = [
        {name: tensor.to(device, dtype) for name, tensor in batch.items()}
        for batch in toy_batches(num_batches, num_classes=num_classes, size=size)
    ]
    return student, torch.optim.SGD(student.parameters(), lr=0.1), distiller, batches


def loss_of(logits, batch):
    return PartiallyLabeledLoss(dice_ce_loss(logits.shape[2]))(logits, batch["label"])


def host(student, optimizer, batches, accumulation_steps=1):
    """Somebody else's training: it knows nothing of SKD."""
    for t, batch in enumerate(batches, start=1):
        loss = loss_of(student(batch["image"]), batch)
        if (t - 1) % accumulation_steps == 0:
            optimizer.zero_grad()
        (loss / accumulation_steps).backward()
        if t % accumulation_steps == 0 or t == len(batches):
            optimizer.step()


def plain_loop(student, optimizer, distiller, batches, weight=lambda t: 1.0, skipped=(), accumulation_steps=1):
    """The same with SKD's two lines; steps 1.. in `skipped` are not made."""
    distiller.follow(optimizer)
    for t, batch in enumerate(batches, start=1):
        logits = student(batch["image"])
        loss = loss_of(logits, batch)
        loss = loss + distiller(batch["image"], logits, batch["label"], weight=weight(t), iteration=t).loss
        if (t - 1) % accumulation_steps == 0:
            optimizer.zero_grad()
        (loss / accumulation_steps).backward()
        if t not in skipped and (t % accumulation_steps == 0 or t == len(batches)):
            optimizer.step()


def assert_same(ours, expected):
    """The same weights of students and teachers, (student, optimizer, distiller, ...) each."""
    assert_same_weights(ours[0], expected[0])
    assert_same_weights(ours[2].teacher, expected[2].teacher)


def gradients_of_steps(optimizer):
    steps = []
    parameters = optimizer.param_groups[0]["params"]
    optimizer.register_step_post_hook(lambda *_: steps.append([p.grad.clone() for p in parameters]))
    return steps


# --- the three ways in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_classes", "size"), CASES)
def test_handler_loop_and_attachment_train_the_same(num_classes, size):
    ways = {name: build(num_classes, size) for name in ("handler", "loop", "attachment")}
    gradients = {name: gradients_of_steps(way[1]) for name, way in ways.items()}

    student, optimizer, distiller, batches = ways["handler"]
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes))
    toy_trainer(student, batches, loss, [SAMDistillation(distiller, weight=WEIGHT)], optimizer=optimizer).run()
    plain_loop(*ways["loop"], weight=WEIGHT)
    student, optimizer, distiller, batches = ways["attachment"]
    before = copy.deepcopy(distiller.teacher.state_dict())
    skd = distiller.attach(student, optimizer, weight=WEIGHT)
    host(student, optimizer, skd.watch(batches))

    for way in ("loop", "attachment"):
        assert len(gradients[way]) == 3
        torch.testing.assert_close(gradients[way], gradients["handler"], rtol=1e-10, atol=1e-12)
        assert_same(ways[way], ways["handler"])
    weights = distiller.teacher.state_dict()
    assert not any(torch.equal(before[name], weights[name]) for name in before if "extra_state" not in name)
    assert set(skd.terms) == {"distillation_loss", "sam_loss", "gate_weight"}


def test_attachment_to_a_monai_trainer_with_start_every_and_gate_equals_the_handler():
    options = dict(start=2, every=2, gate_interval=2)
    ours, expected = (build(num_batches=5, gate="agreement") for _ in range(2))
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(expected[0], expected[3], loss, [SAMDistillation(expected[2], **options)], optimizer=expected[1]).run()
    skd = ours[2].attach(ours[0], ours[1], **options)
    toy_trainer(ours[0], skd.watch(ours[3]), loss, [], optimizer=ours[1]).run()
    assert_same(ours, expected)
    assert ours[2].gate.num_measured == expected[2].gate.num_measured == 2
    assert torch.equal(ours[2].gate.scores, expected[2].gate.scores)


class Pair(nn.Module):
    """A network that returns its logits as a part of something else."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        logits = self.network(image)
        return logits, logits.mean()


def test_logits_may_be_a_part_of_what_the_student_returns():
    def loss(pred, label):
        return PartiallyLabeledLoss(dice_ce_loss(3))(pred[0], label) + pred[1]

    ours, expected = (build(gate="agreement") for _ in range(2))
    handler = SAMDistillation(expected[2], logits_of=itemgetter(0))
    toy_trainer(Pair(expected[0]), expected[3], loss, [handler], optimizer=expected[1]).run()
    student = Pair(ours[0])
    skd = ours[2].attach(student, ours[1], logits_of=itemgetter(0))
    toy_trainer(student, skd.watch(ours[3]), loss, [], optimizer=ours[1]).run()
    assert_same(ours, expected)
    assert ours[2].gate.num_measured == 1


@pytest.mark.parametrize("attached", [False, True])
def test_output_that_is_no_tensor_is_an_error(attached):
    student, optimizer, distiller, batches = build()
    student, handlers = Pair(student), [] if attached else [SAMDistillation(distiller)]
    batches = distiller.attach(student, optimizer).watch(batches) if attached else batches
    with pytest.raises(TypeError, match="tuple; .*`logits_of`"):
        toy_trainer(student, batches, lambda pred, label: pred[1], handlers, optimizer=optimizer).run()


# --- detaching --------------------------------------------------------------------------------------------------------


def test_detached_host_is_as_it_was_bit_for_bit():
    student, optimizer, distiller, batches = build()
    alone = copy.deepcopy(student)
    names = set(vars(student)), set(vars(optimizer))
    skd = distiller.attach(student, optimizer)
    loader = skd.watch(batches)
    assert student._forward_hooks and optimizer._optimizer_step_post_hooks
    skd.remove()
    assert (set(vars(student)), set(vars(optimizer))) == names
    assert not student._forward_hooks and not student._forward_hooks_with_kwargs
    assert not optimizer._optimizer_step_post_hooks
    host(student, optimizer, loader)
    host(alone, torch.optim.SGD(alone.parameters(), lr=0.1), batches)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters(), strict=True))


def test_detaching_between_forward_and_backward_leaves_that_backward_alone():
    student, optimizer, distiller, batches = build()
    alone = copy.deepcopy(student)
    skd = distiller.attach(student, optimizer)
    batch = next(iter(skd.watch(batches)))
    loss = loss_of(student(batch["image"]), batch)
    skd.remove()
    loss.backward()
    loss_of(alone(batch["image"]), batch).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(student.parameters(), alone.parameters(), strict=True))
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_two_distillers_on_one_optimizer_detach_one_by_one():
    student, optimizer, distiller, _ = build()
    other = build()[2]
    for removed_first in (0, 1):
        attachments = [d.attach(student, optimizer) for d in (distiller, other)]
        attachments[removed_first].remove()
        parameter = (other if removed_first == 0 else distiller).optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        optimizer.zero_grad()
        assert parameter.grad is None  # the one that is left still clears its teacher
        attachments[1 - removed_first].remove()
        assert not optimizer._optimizer_step_post_hooks and "zero_grad" not in vars(optimizer)


def test_watched_loader_is_the_loader_in_all_else():
    student, optimizer, distiller, batches = build()
    data = torch.utils.data.DataLoader([(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))] * 6, batch_size=2)
    loader = distiller.attach(student, optimizer).watch(data)
    assert len(loader) == 3 and loader.batch_size == 2 and loader.dataset is data.dataset
    assert [torch.equal(a[0], b[0]) for a, b in zip(loader, data, strict=True)] == [True] * 3
    assert copy.copy(loader).batch_size == 2
    with pytest.raises(AttributeError):
        loader.set_iteration


def test_deep_copy_of_the_student_is_not_taught_and_copies_no_teacher():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(iter(skd.watch(batches)))
    average = copy.deepcopy(student)
    loss_of(average(batch["image"]), batch).backward()
    assert skd.terms == {} and average._forward_hooks


# --- hosts that do more than one forward, one backward, one step ------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_host_that_accumulates(accumulation_steps):
    ours, expected = build(num_batches=5), build(num_batches=5)
    skd = ours[2].attach(ours[0], ours[1], accumulation_steps=accumulation_steps)
    host(ours[0], ours[1], skd.watch(ours[3]), accumulation_steps)
    plain_loop(*expected, accumulation_steps=accumulation_steps)
    assert_same(ours, expected)


def test_host_that_changes_batch_size():
    batches = [toy_batches(1, num_labeled=i, num_unlabeled=4 - i)[0] for i in (1, 3)] + toy_batches(1, num_unlabeled=0)
    ours, expected = build()[:3], build()[:3]
    host(ours[0], ours[1], ours[2].attach(ours[0], ours[1]).watch(batches))
    plain_loop(*expected, batches)
    assert_same(ours, expected)


def test_forward_that_is_never_backpropagated_teaches_nobody():
    ours, expected = build(), build()
    for batch in ours[2].attach(ours[0], ours[1]).watch(ours[3]):
        loss = loss_of(ours[0](batch["image"]), batch)
        if batch is ours[3][1]:
            continue
        ours[1].zero_grad()
        loss.backward()
        ours[1].step()
    del expected[3][1]
    plain_loop(*expected)
    assert_same(ours, expected)


@pytest.mark.parametrize("clears_by", ["optimizer", "student"])
def test_host_that_skips_a_step_after_its_backward(clears_by):
    ours, expected = build(), build()
    for batch in ours[2].attach(ours[0], ours[1]).watch(ours[3]):
        loss = loss_of(ours[0](batch["image"]), batch)
        (ours[1] if clears_by == "optimizer" else ours[0]).zero_grad()
        loss.backward()
        if batch is not ours[3][1]:
            ours[1].step()
    plain_loop(*expected, skipped=(2,))
    assert_same(ours, expected)


def of_the_batch(batch, image):
    """Only the call on the batch's own image is taught."""
    return (image, batch["label"], None) if torch.equal(image, batch["image"]) else None


@pytest.mark.parametrize("backwards", [1, 2])
def test_host_that_calls_its_student_twice_says_which_call_is_taught(backwards):
    ours, expected = build(), build()
    skd = ours[2].attach(ours[0], ours[1], select=of_the_batch)
    for (student, optimizer, distiller, _), batches in ((ours, skd.watch(ours[3])), (expected, expected[3])):
        is_attached = distiller is ours[2]
        if not is_attached:
            distiller.follow(optimizer)
        for batch in batches:
            noisy_loss = student(batch["image"] + 0.1).square().mean()
            logits = student(batch["image"])
            loss = loss_of(logits, batch)
            if not is_attached:
                loss = loss + distiller(batch["image"], logits, batch["label"]).loss
            optimizer.zero_grad()
            if backwards == 2:
                noisy_loss.backward()
                loss.backward()
            else:
                (noisy_loss + loss).backward()
            optimizer.step()
    assert_same(ours, expected)


@pytest.mark.parametrize("backwards", [1, 2])
def test_host_with_labels_for_every_row_that_calls_its_student_on_each_kind_apart(backwards):
    def select(batch, image):
        is_labeled = torch.equal(image, batch["image"][:2])
        return image, batch["label"][:2, None] if is_labeled else None, None

    ours, expected = build(), build()
    every_label = [{**b, "label": torch.cat([b["label"], 1 - b["label"].clamp(max=1)])[:, 0]} for b in ours[3]]
    skd = ours[2].attach(ours[0], ours[1], select=select)
    for (student, optimizer, distiller, _), batches in ((ours, skd.watch(every_label)), (expected, every_label)):
        is_attached = distiller is ours[2]
        if not is_attached:
            distiller.follow(optimizer)
        for batch in batches:
            label = batch["label"][:2, None]
            labeled, unlabeled = student(batch["image"][:2]), student(batch["image"][2:])
            losses = [loss_of(labeled, {"label": label}), unlabeled.square().mean()]
            if not is_attached:
                losses[0] = losses[0] + distiller(batch["image"][:2], labeled, label).loss
                losses[1] = losses[1] + distiller(batch["image"][2:], unlabeled).loss
            optimizer.zero_grad()
            for loss in losses if backwards == 2 else [sum(losses)]:
                loss.backward()
            optimizer.step()
    assert_same(ours, expected)


def test_labeled_rows_of_a_batch_with_labels_for_every_row():
    ours, expected = build(), build()
    labeled_bs = 2
    batches = [{**b, "label": torch.cat([b["label"], torch.zeros_like(b["label"])])[:, 0]} for b in ours[3]]
    skd = ours[2].attach(ours[0], ours[1], select=lambda batch, image: (image, batch["label"][:, None], labeled_bs))
    for batch in skd.watch(batches):
        loss = loss_of(ours[0](batch["image"]), {"label": batch["label"][:labeled_bs, None]})
        ours[1].zero_grad()
        loss.backward()
        ours[1].step()
    plain_loop(*expected)
    assert_same(ours, expected)


def test_pairs_of_image_and_label_are_batches_too_and_all_labels_are_learned_from_with_a_warning(caplog):
    batches = toy_batches(3, num_labeled=4, num_unlabeled=0)
    ours, expected = build()[:3], build()[:3]
    skd = ours[2].attach(ours[0], ours[1])
    for image, label in skd.watch([(b["image"], b["label"]) for b in batches]):
        host(ours[0], ours[1], [{"image": image, "label": label}])
    plain_loop(*expected, batches)
    assert_same(ours, expected)
    assert caplog.text.count("SAM learns from all 4 rows") == 1


def test_gradient_of_half_precision_logits_is_of_their_type_and_sam_s_in_its_own():
    student, optimizer, distiller, batches = build(dtype=torch.float32)
    seen = []
    for batch in distiller.attach(student, optimizer).watch(batches):
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(batch["image"])
        logits.register_hook(seen.append)
        loss_of(logits, batch).backward()
        optimizer.step()
    assert {gradient.dtype for gradient in seen} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in distiller.teacher.parameters())


def test_normalisation_that_the_host_keeps_in_eval_mode_stays_in_it():
    student, optimizer, distiller, batches = build(gate="agreement")
    student = nn.Sequential(nn.BatchNorm2d(1).double().eval(), student)
    skd = distiller.attach(student, optimizer)
    host(student, optimizer, skd.watch(batches))
    assert distiller.gate.num_measured == 1
    assert student.training and student[1].training and not student[0].training


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_and_a_step_that_overflows(device, fused):
    ours, expected = (build(dtype=torch.float32, device=device) for _ in range(2))
    steps = []
    for student, optimizer, distiller, batches in (ours, expected):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
        is_attached = distiller is ours[2]
        if is_attached:
            batches = distiller.attach(student, optimizer, scaler=scaler).watch(batches)
        else:
            distiller.follow(optimizer, scaler)
        before = copy.deepcopy(distiller.teacher.state_dict())
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            logits = student(batch["image"])
            loss = loss_of(logits, batch)
            if not is_attached:
                loss = loss + distiller(batch["image"], logits, batch["label"]).loss
            if i == 1:
                loss = loss + float("inf") * logits.sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            weights = copy.deepcopy(distiller.teacher.state_dict())
            steps.append(not all(torch.equal(before[name], weights[name]) for name in before))
            before = weights
    assert steps == [True, False, True] * 2
    for network, other in ((ours[0], expected[0]), (ours[2].teacher, expected[2].teacher)):
        for parameter, same in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, same, rtol=1e-4, atol=1e-6)


# --- what torch puts around a student ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A student under activation checkpointing."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, image):
        return checkpoint(self.student, image, use_reentrant=False)


@pytest.mark.parametrize("attach_to", ["wrapper", "the whole checkpointed module"])
def test_student_under_activation_checkpointing(attach_to):
    ours, expected = build(), build()
    network = Checkpointed(ours[0])
    skd = ours[2].attach(network if attach_to == "wrapper" else ours[0], ours[1])
    host(network, ours[1], skd.watch(ours[3]))
    plain_loop(*expected)
    assert_same(ours, expected)


def test_reentrant_activation_checkpointing_of_the_whole_student():
    ours, expected = build(), build()
    for batch in ours[2].attach(ours[0], ours[1]).watch(ours[3]):
        image = batch["image"].clone().requires_grad_()
        loss = loss_of(checkpoint(ours[0], image, use_reentrant=True), batch)
        ours[1].zero_grad()
        loss.backward()
        ours[1].step()
    plain_loop(*expected)
    assert_same(ours, expected)


def test_student_that_is_called_again_in_the_backward_is_an_error():
    student, optimizer, distiller, batches = build()
    batch = next(iter(distiller.attach(student, optimizer).watch(batches)))
    with set_checkpoint_early_stop(False):  # it would stop before the hook
        loss = loss_of(checkpoint(student, batch["image"], use_reentrant=False), batch)
    with pytest.raises(RuntimeError, match="activation checkpointing, checkpoint its blocks"):
        loss.backward()


@pytest.mark.parametrize("how", ["wrapped", "in place", "after attaching"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_student(how, backend):
    torch.compiler.reset()
    ours, expected = build(), build()
    student = ours[0]
    if how == "in place":
        student.compile(backend=backend)
    network = student if how == "in place" else torch.compile(student, backend=backend)
    skd = ours[2].attach(student if how == "after attaching" else network, ours[1])
    host(network, ours[1], skd.watch(ours[3]))
    plain_loop(*expected)
    assert_same(ours, expected)


# --- what can't be right is one clear error ---------------------------------------------------------------------------


def test_second_call_for_a_batch_without_select_is_an_error():
    student, optimizer, distiller, batches = build()
    batch = next(iter(distiller.attach(student, optimizer).watch(batches)))
    student(batch["image"])
    with pytest.raises(RuntimeError, match="must be called once for each batch but is called again; give `select`"):
        student(batch["image"])


def test_second_backward_through_the_same_logits_is_an_error():
    student, optimizer, distiller, batches = build()
    batch = next(iter(distiller.attach(student, optimizer).watch(batches)))
    loss = loss_of(student(batch["image"]), batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must be backpropagated once but are a second time"):
        loss.backward()


def test_step_without_a_backward_through_the_logits_is_an_error():
    student, optimizer, distiller, batches = build()
    batch = next(iter(distiller.attach(student, optimizer).watch(batches)))
    student(batch["image"])
    student.first.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="must step after a backward through the student's logits but none came"):
        optimizer.step()


def test_student_compiled_and_called_before_it_was_attached_to_is_taught_or_an_error():
    torch.compiler.reset()
    student, optimizer, distiller, batches = build()
    network = torch.compile(student, backend="eager")
    network(batches[0]["image"])
    skd = distiller.attach(student, optimizer)
    try:
        host(network, optimizer, skd.watch(batches))
    except RuntimeError as error:
        assert "attach to the module that the host calls" in str(error)
    else:
        expected = build()
        plain_loop(*expected)
        assert_same((student, optimizer, distiller), expected)


def test_call_without_a_batch_is_an_error_and_in_eval_mode_or_without_gradient_none():
    student, optimizer, distiller, batches = build()
    distiller.attach(student, optimizer)
    with torch.no_grad():
        student(batches[0]["image"])
    student.eval()(batches[0]["image"])
    with pytest.raises(RuntimeError, match=r"must be called on a batch of `watch\(loader\)` but none was taken"):
        student.train()(batches[0]["image"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[:3], r"of shape \(3, 1, 8, 8\), must be the image of the watched batch, of shape \(4, 1"),
        (lambda image: image + 0.01, "but differs: it was changed in the step, or batches are fetched ahead"),
    ],
)
def test_input_that_is_not_the_batch_s_image_is_an_error(change, message):
    student, optimizer, distiller, batches = build()
    batch = next(iter(distiller.attach(student, optimizer).watch(batches)))
    with pytest.raises(ValueError, match=message):
        student(change(batch["image"]))


def test_batches_fetched_ahead_are_an_error():
    student, optimizer, distiller, batches = build()
    fetched = list(distiller.attach(student, optimizer).watch(batches))
    with pytest.raises(ValueError, match="batches are fetched ahead"):
        host(student, optimizer, fetched)


def test_batch_that_is_neither_mapping_nor_pair_is_an_error():
    student, optimizer, distiller, batches = build()
    image = next(iter(distiller.attach(student, optimizer).watch([batches[0]["image"]])))
    with pytest.raises(ValueError, match="a mapping with 'image' and 'label' or a pair .* but is a Tensor"):
        student(image)


def test_image_for_sam_of_other_rows_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda batch, image: (image[:3], batch["label"], None))
    batch = next(iter(skd.watch(batches)))
    with pytest.raises(ValueError, match="`sam_image` must have the rows and the size of the image"):
        student(batch["image"])


def test_label_without_a_channel_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda batch, image: (image, batch["label"][:, 0], 2))
    batch = next(iter(skd.watch(batches)))
    with pytest.raises(ValueError, match=r"`label` must be of shape \(labeled rows, 1, 8, 8\)"):
        student(batch["image"])


def test_sam_sees_the_batch_s_own_image_and_a_cached_teacher_needs_it():
    student, optimizer, distiller, batches = build()
    seen = []
    distiller.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    distiller.teacher.encoder = "cached"
    own = {**batches[0], "sam_image": batches[0]["image"] + 1}
    loader = iter(distiller.attach(student, optimizer).watch([own, batches[1]]))
    student(next(loader)["image"])
    assert torch.equal(torch.cat(seen), own["sam_image"])
    with pytest.raises(ValueError, match="`batch` must have a 'sam_image' for a teacher whose encoder is 'cached'"):
        student(next(loader)["image"])


@pytest.mark.parametrize("name", ["accumulation_steps", "every", "gate_interval"])
def test_intervals_below_one_are_errors(name):
    student, optimizer, distiller, _ = build()
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1 but is 0"):
        Attachment(distiller, student, optimizer, **{name: 0})
    assert not student._forward_hooks


def test_optimizer_of_another_network_is_an_error():
    student, _, distiller, _ = build()
    with pytest.raises(ValueError, match="`optimizer` must step parameters of `student` but has none"):
        distiller.attach(student, distiller.optimizer)


def test_teacher_that_does_not_learn_only_teaches():
    student, optimizer, distiller, batches = build()
    fixed = SAMDistiller(distiller.teacher, taught_views=(1, 2))
    before = copy.deepcopy((student.state_dict(), fixed.teacher.state_dict()))
    host(student, optimizer, fixed.attach(student, optimizer).watch(batches))
    assert all(torch.equal(before[1][name], tensor) for name, tensor in fixed.teacher.state_dict().items())
    assert not any(torch.equal(before[0][name], tensor) for name, tensor in student.state_dict().items())


# --- several processes ------------------------------------------------------------------------------------------------


def ce_loss(logits, label):
    """A mean over pixels, so that the mean over ranks is that of the whole batch, which a Dice is not."""
    views = unstack_views(logits, label)
    return sum(nn.functional.cross_entropy(view[: len(label)], label[:, 0].long()) for view in views)


def train_on_a_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("wrapper", "student"):
        student, optimizer, distiller, batches = build(sam_loss=ce_loss)
        network = DistributedDataParallel(student)
        skd = distiller.attach(network if name == "wrapper" else student, optimizer)
        for batch in skd.watch([{"image": b["image"][rank::2], "label": b["label"][rank::2]} for b in batches]):
            optimizer.zero_grad()
            ce_loss(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
        torch.save((student.state_dict(), distiller.teacher.state_dict()), folder / f"{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_process_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(train_on_a_rank, args=(tmp_path,), nprocs=2)
    student, optimizer, distiller, batches = build(sam_loss=ce_loss)
    distiller.follow(optimizer)
    for batch in batches:
        optimizer.zero_grad()
        logits = student(batch["image"])
        loss = ce_loss(logits, batch["label"]) + distiller(batch["image"], logits, batch["label"]).loss
        loss.backward()
        optimizer.step()
    for name in ("wrapper", "student"):
        for rank in (0, 1):
            weights = torch.load(tmp_path / f"{name}_{rank}.pt")
            torch.testing.assert_close(weights[0], student.state_dict(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(weights[1], distiller.teacher.state_dict(), rtol=1e-10, atol=1e-12)
