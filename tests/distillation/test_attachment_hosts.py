"""Attaching to hosts that do more than one forward, backward and step per batch."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.teachers import SAMTeacher
from knowsam_monai.tensors import unstack_views
from tests.attached import assert_same, build, host, loss_of, plain_loop
from tests.processes import finish, start_ranks
from tests.toys import ToyTeacher, toy_batches

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
    host(ours[0], ours[1], ours[2].attach(ours[0], ours[1], labeled_rows="all").watch(batches))
    plain_loop(*expected, batches, labeled_rows="all")
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


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clears_by", ["optimizer", "student"])
def test_host_that_skips_a_step_after_its_backward(clears_by, set_to_none):
    ours, expected = build(), build()
    for batch in ours[2].attach(ours[0], ours[1]).watch(ours[3]):
        loss = loss_of(ours[0](batch["image"]), batch)
        (ours[1] if clears_by == "optimizer" else ours[0]).zero_grad(set_to_none)
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


@pytest.mark.parametrize("clears_by", ["optimizer", "student"])
def test_two_students_of_one_teacher_bring_it_the_gradients_of_both(clears_by):
    """Cross pseudo supervision as SSL4MIS writes it: two networks, two optimizers, one backward."""
    gradients = []
    for is_attached in (True, False):
        student, optimizer, distiller, batches = build(num_batches=2)
        pair = [(student, optimizer)]
        other = copy.deepcopy(student)
        for parameter in other.parameters():
            parameter.data.mul_(0.9)
        pair.append((other, torch.optim.SGD(other.parameters(), lr=0.1)))
        watched = batches
        for network, its_optimizer in pair if is_attached else ():
            watched = distiller.attach(network, its_optimizer).watch(watched)
        for step, batch in enumerate(watched):
            loss = 0
            for network, its_optimizer in pair:
                (network if clears_by == "student" else its_optimizer).zero_grad()
                logits = network(batch["image"])
                loss = loss + loss_of(logits, batch)
                if not is_attached:
                    loss = loss + distiller(batch["image"], logits, batch["label"]).loss
            if not is_attached:  # the step before was skipped
                distiller.optimizer.zero_grad()
            loss.backward()
        gradients.append([p.grad for p in distiller.teacher.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_labeled", [2, 4])  # of four rows, two a call
@pytest.mark.parametrize("backwards", [1, 2])
def test_host_that_calls_its_student_on_two_halves_has_both_taught(backwards, num_labeled):
    def select(batch, image):
        is_first = torch.equal(image, batch["image"][:2])
        label = batch["label"][:2] if is_first else batch["label"][2:]
        return image, label if len(label) > 0 else None, len(label)

    ours, expected = build(num_labeled=num_labeled), build(num_labeled=num_labeled)
    skd = ours[2].attach(ours[0], ours[1], select=select)
    for (student, optimizer, distiller, _), batches in ((ours, skd.watch(ours[3])), (expected, expected[3])):
        is_attached = distiller is ours[2]
        if not is_attached:
            distiller.follow(optimizer)
        for batch in batches:
            image, label = batch["image"], batch["label"]
            first, second = student(image[:2]), student(image[2:])
            losses = [loss_of(first, {"label": label[:2]}), second.square().mean()]
            if not is_attached:
                losses[0] = losses[0] + distiller(image[:2], first, label[:2], 2).loss
                losses[1] = (
                    losses[1] + distiller(image[2:], second, label[2:] if num_labeled == 4 else None, "all").loss
                )
            optimizer.zero_grad()
            for loss in losses if backwards == 2 else [sum(losses)]:
                loss.backward()
            optimizer.step()
    assert_same(ours, expected)


def test_separate_calls_of_two_loaders_as_the_documentation_has_them(caplog):
    ours, expected = (build(num_batches=70, gate="agreement") for _ in range(2))

    def select(batch, image):
        is_labeled = torch.equal(image, batch["image"])
        return (image, batch["label"], "all") if is_labeled else (image, None, None)

    skd = ours[2].attach(ours[0], ours[1], select=select, weight=0.5)
    expected[2].follow(expected[1])
    for student, optimizer, distiller, batches in (ours, expected):
        labeled_loader = [{"image": batch["image"][:2], "label": batch["label"]} for batch in batches]
        is_attached = distiller is ours[2]
        pairs = zip(skd.watch(labeled_loader) if is_attached else labeled_loader, batches)
        for step, (labeled, unlabeled) in enumerate(pairs):
            image, label, rest = labeled["image"], labeled["label"], unlabeled["image"][2:]
            logits, unlabeled_logits = student(image), student(rest)
            loss = loss_of(logits, labeled) + unlabeled_logits.square().mean()
            if not is_attached:
                if step % 50 == 10:
                    distiller.measure_agreement(student, torch.cat([image, rest]), label, turn=step // 50)
                loss = loss + distiller(image, logits, label, labeled_rows="all", weight=0.5).loss
                loss = loss + distiller(rest, unlabeled_logits, weight=0.5).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert distiller.gate.num_measured == 2 and (distiller.gate.labeled_scores >= 0).all()
    assert not caplog.messages


@pytest.mark.parametrize("way", ["joined", "separate"])
def test_two_loaders_train_the_same_attached_and_in_a_plain_loop(way):
    def select(batch, image):
        if way == "joined":
            return image, batch["label"], len(batch["label"])
        return (image, batch["label"], "all") if torch.equal(image, batch["image"]) else (image, None, None)

    ours, expected = build(), build()
    skd = ours[2].attach(ours[0], ours[1], select=select)
    expected[2].follow(expected[1])
    for student, optimizer, distiller, batches in (ours, expected):
        labeled_loader = [{"image": batch["image"][:2], "label": batch["label"]} for batch in batches]
        is_attached = distiller is ours[2]
        for batch, other in zip(skd.watch(labeled_loader) if is_attached else labeled_loader, batches):
            image, label, rest = batch["image"], batch["label"], other["image"][2:]
            joined = torch.cat([image, rest])
            logits = student(joined) if way == "joined" else torch.cat([student(image), student(rest)])
            loss = loss_of(logits, batch) + logits[2:].square().mean()
            if not is_attached and way == "joined":
                loss = loss + distiller(joined, logits, label).loss
            elif not is_attached:
                loss = loss + distiller(image, logits[:2], label, labeled_rows="all").loss
                loss = loss + distiller(rest, logits[2:]).loss
            optimizer.zero_grad()
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


def test_pairs_of_image_and_label_are_batches_too():
    ours, expected = build(), build()
    skd = ours[2].attach(ours[0], ours[1])
    for image, label in skd.watch([(b["image"], b["label"]) for b in ours[3]]):
        host(ours[0], ours[1], [{"image": image, "label": label}])
    plain_loop(*expected)
    assert_same(ours, expected)


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


def test_parameters_of_sam_that_share_a_gradient_are_unscaled_once():
    class Biased(ToyTeacher):
        """Torch's gradient of a sum is one tensor for both of its terms."""

        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.zeros(3, 1, 1)) for _ in range(2))

        def forward(self, image, prompt_logits):
            return super().forward(image, prompt_logits) + (self.first + self.second)

    biases = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):
        student, optimizer, _, batches = build(dtype=torch.float32)
        teacher = Biased()
        teacher.load_state_dict(build(dtype=torch.float32)[2].teacher.state_dict(), strict=False)
        distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), gate="none")
        skd = distiller.attach(student, optimizer, scaler=scaler)
        batch = next(skd.watch(batches))
        loss = loss_of(student(batch["image"]), batch)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        biases.append([teacher.first.detach(), teacher.second.detach()])
        assert biases[-1][0].abs().min() > 0
    torch.testing.assert_close(biases[1], biases[0])


def test_normalization_that_the_host_keeps_in_eval_mode_stays_in_it():
    student, optimizer, distiller, batches = build(gate="agreement")
    student = nn.Sequential(nn.BatchNorm2d(1).double().eval(), student)
    skd = distiller.attach(student, optimizer, gate_interval=1)
    host(student, optimizer, skd.watch(batches))
    assert distiller.gate.num_measured == len(batches)
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("learns", [True, False])
def test_gradscaler_that_was_not_passed_is_an_error(fused, learns):
    student, _, distiller, batches = build(dtype=torch.float32)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=fused)
    if not learns:
        distiller = SAMDistiller(distiller.teacher, taught_views=(1, 2), gate="none")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    scaler.scale(loss_of(student(batch["image"]), batch)).backward()
    with pytest.raises(RuntimeError, match="`scaler` must be the GradScaler .* but is None; pass it to"):
        scaler.step(optimizer)


def test_float16_host_without_a_gradscaler_is_warned(caplog):
    student, optimizer, distiller, batches = build(dtype=torch.float32)
    for batch in distiller.attach(student, optimizer).watch(batches):
        with torch.autocast("cpu", dtype=torch.float16):
            student(batch["image"])
    assert [message.split(":")[1] for message in caplog.messages] == [
        " the student runs in float16 but `scaler` is None"
    ]


@pytest.mark.parametrize("way", ["loop", "attachment"])
def test_sam_that_is_no_longer_finite_neither_steps_nor_lowers_the_hosts_scale(way, caplog):
    """Weights are those without SKD, bit for bit."""
    students = []
    for is_taught in (True, False):
        student, optimizer, distiller, batches = build(dtype=torch.float32, num_batches=40)
        students.append(student)
        scaler = torch.amp.GradScaler("cpu")
        next(distiller.teacher.parameters()).data.fill_(torch.nan)
        if is_taught and way == "loop":
            distiller.follow(optimizer, scaler)
        elif is_taught:
            batches = distiller.attach(student, optimizer, scaler=scaler, weight=0.0).watch(batches)
        for batch in batches:
            optimizer.zero_grad()
            logits = student(batch["image"])
            loss = loss_of(logits, batch)
            if is_taught and way == "loop":
                loss = loss + distiller(batch["image"], logits, batch["label"], weight=0.0).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**16
    assert all(torch.equal(ours, bare) for ours, bare in zip(*(student.parameters() for student in students)))
    assert len([message for message in caplog.messages if "SAM's loss was not finite, so SAM did not" in message]) == 1


def test_disabled_gradscaler_need_not_be_passed():
    student, optimizer, distiller, batches = build(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    scaler.scale(loss_of(student(batch["image"]), batch)).backward()
    scaler.step(optimizer)


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
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    with set_checkpoint_early_stop(False):  # it would stop before the hook
        loss = loss_of(checkpoint(student, batch["image"], use_reentrant=False), batch)
    with pytest.raises(RuntimeError, match="checkpoint its blocks instead"):
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


# --- several processes ------------------------------------------------------------------------------------------------


def ce_loss(logits, label):
    """A mean over pixels, so that the mean over ranks is that of the whole batch, which a Dice is not."""
    views = unstack_views(logits, label)
    return sum(nn.functional.cross_entropy(view[: len(label)], label[:, 0].long()) for view in views)


def train_on_two_ranks(folder, train):
    ranks = start_ranks(folder, 2, in_a_group, str(folder), train)
    for rank, process in enumerate(ranks):
        log = folder / f"rank{rank}.log"
        assert finish(process, log) == 0, log.read_text()


def in_a_group(folder, train):
    """Free everything before the process group, whose end would wait for it."""
    train(torch.distributed.get_rank(), Path(folder))
    gc.collect()
    torch.distributed.barrier()


def train_on_a_rank(rank, folder):
    for name in ("wrapper", "student"):
        student, optimizer, distiller, batches = build(sam_loss=ce_loss)
        network = DistributedDataParallel(student)
        skd = distiller.attach(network if name == "wrapper" else student, optimizer)
        for batch in skd.watch([{"image": b["image"][rank::2], "label": b["label"][rank::2]} for b in batches]):
            optimizer.zero_grad()
            ce_loss(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
        torch.save((student.state_dict(), distiller.teacher.state_dict()), folder / f"{name}_{rank}.pt")


def test_two_ranks_train_as_one_process_with_the_whole_batch(tmp_path):
    train_on_two_ranks(tmp_path, train_on_a_rank)
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


def follow_with_another_seed(rank, folder):
    torch.manual_seed(rank)
    teacher = SAMTeacher(2, image_size=32, variant="stand_in", trainable="all").requires_grad_(False)
    teacher.prompt.requires_grad_(True)
    own = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in teacher.parameters() if p.requires_grad], lr=0.1)
    SAMDistiller(teacher, optimizer).follow(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    torch.save((own, teacher.state_dict()), folder / f"{rank}.pt")


def test_ranks_start_with_the_first_ones_whole_teacher_frozen_parts_and_buffers_too(tmp_path):
    train_on_two_ranks(tmp_path, follow_with_another_seed)
    (first, first_after), (second, second_after) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert sum(not torch.equal(value, second[name]) for name, value in first.items()) > 100
    for after in (first_after, second_after):
        torch.testing.assert_close(after, first, rtol=0, atol=0)


def train_with_labels_on_the_first_rank(rank, folder):
    student, optimizer, distiller, batches = build(sam_loss=ce_loss, gate="agreement")
    distiller.follow(optimizer)
    for i, batch in enumerate(batches):
        labeled = (rank == 0) == (i % 2 == 0)  # the ranks take turns: all rows have labels, or none
        label = torch.cat([batch["label"]] * 2)[: len(batch["image"])] if labeled else None
        distiller.measure_agreement(student, batch["image"], label)
        optimizer.zero_grad()
        distiller(batch["image"], student(batch["image"]), label, "all").loss.backward()
        optimizer.step()
    torch.save((distiller.teacher.state_dict(), distiller.gate.state_dict()), folder / f"{rank}.pt")


def test_rank_without_labels_or_without_unlabeled_rows_meets_the_other(tmp_path):
    train_on_two_ranks(tmp_path, train_with_labels_on_the_first_rank)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first[1]["num_measured"] > 1
    start = build(sam_loss=ce_loss)[2].teacher.state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in first[0].items())
