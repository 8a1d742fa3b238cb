from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from functools import partial
from operator import itemgetter

import pytest
import torch
from torch import nn
from torch.nn import functional

from knowsam_monai.distillation.attachment import Attachment
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.watched_loader import WatchedLoader
from knowsam_monai.handlers import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from tests.attached import assert_same, build, host, loss_of, plain_loop
from tests.hosts import CASES
from tests.toys import region_batches, toy_batches, toy_trainer

WEIGHT = SigmoidRampUp(3)


# --- the three ways in ------------------------------------------------------------------------------------------------


def gradients_of_steps(optimizer):
    steps = []
    parameters = optimizer.param_groups[0]["params"]
    optimizer.register_step_post_hook(lambda *_: steps.append([p.grad.clone() for p in parameters]))
    return steps


@pytest.mark.parametrize(("num_classes", "size"), CASES)
def test_handler_loop_and_attachment_train_the_same(num_classes, size):
    ways = {name: build(num_classes, size) for name in ("handler", "loop", "attachment")}
    gradients = {name: gradients_of_steps(way[1]) for name, way in ways.items()}

    student, optimizer, distiller, batches = ways["handler"]
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes))
    handler = SAMDistillation(distiller, weight=WEIGHT, start=2)
    toy_trainer(student, batches, loss, [handler], optimizer=optimizer).run()
    plain_loop(*ways["loop"], weight=lambda t: WEIGHT(t) if t >= 2 else 0.0)
    student, optimizer, distiller, batches = ways["attachment"]
    before = copy.deepcopy(distiller.teacher.state_dict())
    skd = distiller.attach(student, optimizer, weight=WEIGHT, start=2)
    host(student, optimizer, skd.watch(batches))

    for way in ("loop", "attachment"):
        assert len(gradients[way]) == 3
        torch.testing.assert_close(gradients[way], gradients["handler"], rtol=1e-10, atol=1e-12)
        assert_same(ways[way], ways["handler"])
    weights = distiller.teacher.state_dict()
    assert not any(torch.equal(before[name], weights[name]) for name in before if "extra_state" not in name)
    assert set(skd.terms) == {"distillation_loss", "sam_loss", "gate_weight"}


@pytest.mark.parametrize("overlapping", [False, True])
def test_attachment_to_a_monai_trainer_with_start_every_and_gate_equals_the_handler(overlapping):
    options = dict(start=2, every=2, gate_interval=2)
    ours, expected = (build(gate="agreement", overlapping=overlapping) for _ in range(2))
    batches = region_batches(8) if overlapping else toy_batches(8)
    loss = PartiallyLabeledLoss(overlapping=overlapping)
    toy_trainer(expected[0], batches, loss, [SAMDistillation(expected[2], **options)], optimizer=expected[1]).run()
    skd = ours[2].attach(ours[0], ours[1], **options)
    toy_trainer(ours[0], skd.watch(batches), loss, [], optimizer=ours[1]).run()
    assert_same(ours, expected)
    assert ours[2].gate.num_measured == expected[2].gate.num_measured == 2
    assert torch.equal(ours[2].gate.agreement_scores, expected[2].gate.agreement_scores)


def test_plain_loop_that_measures_if_due_equals_the_handler():
    ours, expected = (build(num_batches=70, gate="agreement", num_labeled=2) for _ in range(2))
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    toy_trainer(expected[0], expected[3], loss, [SAMDistillation(expected[2])], optimizer=expected[1]).run()
    student, optimizer, distiller, batches = ours
    distiller.follow(optimizer)
    for step, batch in enumerate(batches, start=1):
        image, label = batch["image"], batch["label"]
        logits = student(image)
        distiller.measure_if_due(step, 50, student, image, label)
        optimizer.zero_grad()
        (loss(logits, label) + distiller(image, logits, label).loss).backward()
        optimizer.step()
    assert distiller.gate.num_measured == 2
    assert_same(ours, expected)


def test_frozen_teacher_needs_no_label_and_writes_no_sam_loss():
    student, optimizer, distiller, batches = build()
    distiller.teacher.requires_grad_(False)
    skd = distiller.attach(student, optimizer)
    for batch in skd.watch([{"image": batch["image"]} for batch in batches]):
        student(batch["image"]).sum().backward()
        optimizer.step()
    assert set(skd.terms) == {"distillation_loss", "gate_weight"} and skd.terms["distillation_loss"] > 0


class Pair(nn.Module):
    """A network around another one, whose output contains its logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        logits = self.network(image)
        return logits, logits.mean()


class Stacked(Pair):
    """A network with deep supervision, as MONAI's DynUNet: in training a stack of its output and of another head."""

    def forward(self, image):
        logits = self.network(image)
        return torch.stack([logits, 2 * logits], 1) if self.training else logits


def test_logits_may_be_kept_beside_the_output():
    class Softmax(Pair):
        def forward(self, image):
            self.logits = self.network(image)
            return self.logits.softmax(-3)

    (plain, optimizer, distiller, batches), (network, *ours, _) = build(), build()
    skd, student = distiller.attach(plain, optimizer), Softmax(network)
    theirs = ours[1].attach(student, ours[0], logits_of=lambda _: student.logits)
    for batch in skd.watch(batches):
        optimizer.zero_grad(), ours[0].zero_grad()
        theirs.next_batch(batch)
        plain(batch["image"]).softmax(-3).square().mean().backward()
        student(batch["image"]).square().mean().backward()
        optimizer.step(), ours[0].step()
    assert_same((network, *ours), (plain, optimizer, distiller))


@pytest.mark.parametrize("kind, pick", [(Pair, itemgetter(0)), (Stacked, lambda output: output[:, 0])])
def test_logits_may_be_a_part_of_what_the_student_returns(kind, pick):
    def loss(pred, label):
        return PartiallyLabeledLoss(dice_ce_loss(3))(pick(pred), label) + pred[1].mean()

    ours, expected = (build(gate="agreement") for _ in range(2))
    handler = SAMDistillation(expected[2], logits_of=pick, gate_interval=1)
    toy_trainer(kind(expected[0]), expected[3], loss, [handler], optimizer=expected[1]).run()
    student = kind(ours[0])
    skd = ours[2].attach(student, ours[1], logits_of=pick, gate_interval=1)
    toy_trainer(student, skd.watch(ours[3]), loss, [], optimizer=ours[1]).run()
    assert_same(ours, expected)
    assert ours[2].gate.num_measured == len(ours[3])


class Heads(Pair):
    """A network whose smaller logits come from several outputs."""

    def __init__(self, network, kind):
        super().__init__(network)
        self.kind = kind

    def forward(self, image):
        logits = self.network(image)
        if self.kind == "smaller":
            return {"logits": functional.avg_pool2d(logits.flatten(0, 1), 2), "name": "head"}
        first, second = logits.chunk(2, 2) if self.kind == "parts" else (logits, logits.square())
        return [first, (second, logits.mean())]


def upsampled(output):
    return functional.interpolate(output["logits"], scale_factor=2).unflatten(0, (-1, 3))


@pytest.mark.parametrize(
    ("kind", "pick"),
    [
        ("smaller", upsampled),
        ("two heads", lambda output: (output[0] + output[1][0]) / 2),
        ("parts", lambda output: torch.cat([output[0], output[1][0]], 2)),
    ],
)
def test_logits_may_be_computed_from_what_the_student_returns(kind, pick):
    ours, expected = build(num_classes=4 if kind == "parts" else 3), build(num_classes=4 if kind == "parts" else 3)
    for is_attached, (student, optimizer, distiller, batches) in ((True, ours), (False, expected)):
        student = Heads(student, kind)
        if is_attached:
            skd = distiller.attach(student, optimizer, logits_of=pick)
        else:
            distiller.follow(optimizer)
        for batch in skd.watch(batches) if is_attached else batches:
            logits = pick(student(batch["image"]))
            loss = loss_of(logits, batch)
            if not is_attached:
                loss = loss + distiller(batch["image"], logits, batch["label"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same(ours, expected)


def test_host_that_uses_one_of_the_outputs_that_logits_of_combines_gets_an_error():
    network, optimizer, distiller, batches = build()
    student = Heads(network, "two heads")
    skd = distiller.attach(student, optimizer, logits_of=lambda output: (output[0] + output[1][0]) / 2)
    batch = next(skd.watch(batches))
    loss_of(student(batch["image"])[0], batch).backward()
    with pytest.raises(RuntimeError, match="or not each output that `logits_of` combines"):
        optimizer.step()


def test_logits_of_another_size_than_the_image_get_a_remedy_that_can_be_followed():
    network, optimizer, distiller, batches = build()
    student = Heads(network, "smaller")
    pick = lambda output: output["logits"].unflatten(0, (-1, 3))  # noqa: E731
    skd = distiller.attach(student, optimizer, logits_of=pick)
    batch = next(skd.watch(batches))
    with pytest.raises(ValueError, match="interpolate logits that are smaller, with `attach` .* in `logits_of`"):
        student(batch["image"])


@pytest.mark.parametrize("attached", [False, True])
def test_output_that_is_no_tensor_is_an_error(attached):
    student, optimizer, distiller, batches = build()
    student, handlers = Pair(student), [] if attached else [SAMDistillation(distiller)]
    batches = distiller.attach(student, optimizer).watch(batches) if attached else batches
    with pytest.raises(TypeError, match="tuple; .*`logits_of`"):
        toy_trainer(student, batches, lambda pred, label: pred[1], handlers, optimizer=optimizer).run()


def test_loader_made_before_the_optimizer_is_given_to_attach():
    ours, expected = build(), build()
    loader = WatchedLoader(ours[3])
    skd = ours[2].attach(ours[0], ours[1], loader=loader)
    host(ours[0], ours[1], loader)
    plain_loop(*expected)
    assert_same(ours, expected)
    skd.remove()
    assert skd.iteration == 3 and loader.watched_by == []
    with pytest.raises(
        TypeError, match=r"`loader` must be a WatchedLoader but is a list; pass .*WatchedLoader\(loader"
    ):
        ours[2].attach(ours[0], ours[1], loader=ours[3])


def test_select_is_given_the_batch_itself_where_it_is_on_the_student_s_device():
    student, optimizer, distiller, batches = build()
    seen = []

    def select(batch, image):
        seen.append(batch)
        return (image, batch["label"], None) if torch.equal(image, batch["image"]) else None

    host(student, optimizer, distiller.attach(student, optimizer, select=select).watch(batches))
    assert all(given is batch for given, batch in zip(seen, batches, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_select_compares_images_where_the_loader_s_batch_is_on_another_device():
    student, optimizer, distiller, batches = build()
    student.cuda()
    seen = []

    def select(batch, image):
        seen.append(torch.equal(image, batch["image"]))
        return image, batch["label"], None

    for batch in distiller.attach(student, optimizer, select=select).watch(batches):
        host(student, optimizer, [{name: tensor.cuda() for name, tensor in batch.items()}])
    assert seen == [True] * 3


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


def test_distiller_in_eval_mode_learns_once_its_student_is_trained():
    student, optimizer, distiller, batches = build()
    before = copy.deepcopy(distiller.teacher.state_dict())
    skd = distiller.eval().attach(student, optimizer)
    host(student, optimizer, skd.watch(batches))
    assert not any(torch.equal(before[name], value) for name, value in distiller.teacher.state_dict().items())


def test_terms_are_those_of_the_step_whatever_the_gate_becomes():
    student, optimizer, distiller, batches = build(gate="validation")
    skd = distiller.attach(student, optimizer)
    host(student, optimizer, skd.watch(batches))
    distiller.gate.weight.fill_(1)
    assert skd.terms["gate_weight"] == 0 and not any(term.requires_grad for term in skd.terms.values())


def test_detaching_between_forward_and_backward_leaves_that_backward_alone():
    student, optimizer, distiller, batches = build()
    alone = copy.deepcopy(student)
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    loss = loss_of(student(batch["image"]), batch)
    skd.remove()
    loss.backward()
    loss_of(alone(batch["image"]), batch).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(student.parameters(), alone.parameters(), strict=True))
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_detaching_between_backward_and_step_leaves_no_gradient_for_another_attachment():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    loss_of(student(batch["image"]), batch).backward()
    assert any(p.grad is not None for p in distiller.teacher.parameters())
    skd.remove()
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_deep_copy_of_the_student_is_not_taught_and_copies_no_teacher():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    average = copy.deepcopy(student)
    loss_of(average(batch["image"]), batch).backward()
    assert skd.terms == {} and average._forward_hooks


def test_student_saved_whole_while_attached_is_loaded_and_needs_nothing_of_the_attachment(tmp_path):
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    torch.save(student, tmp_path / "student.pt")
    loaded = torch.load(tmp_path / "student.pt", weights_only=False)
    image = batches[0]["image"]
    assert torch.equal(loaded.eval()(image), student.eval()(image))
    (hook,) = student._forward_hooks.values()
    assert b"attachment" not in pickle.dumps(hook)
    skd.remove()


# --- what can't be right is one clear error ---------------------------------------------------------------------------


def test_optimizer_of_sam_in_the_place_of_the_student_s_is_an_error():
    student, optimizer, distiller, batches = build()
    together = torch.optim.SGD([*student.parameters(), *distiller.teacher.parameters()], lr=0.1)
    for mixed_up in (distiller.optimizer, together):
        for way in (distiller.follow, partial(distiller.attach, student)):
            with pytest.raises(ValueError, match="`optimizer` must (be the student's but is|not step parameters of)"):
                way(mixed_up)
    with pytest.raises(ValueError, match="`optimizer` must be the student's but is the distiller's own"):
        toy_trainer(student, batches, None, [SAMDistillation(distiller)], optimizer=distiller.optimizer).run()
    with pytest.raises(ValueError, match="`optimizer` must step parameters of `teacher` but has none"):
        SAMDistiller(distiller.teacher, optimizer)
    assert not student._forward_hooks and not optimizer._optimizer_step_post_hooks


def test_second_attachment_of_a_teacher_is_an_error_until_the_first_is_removed():
    student, optimizer, distiller, _ = build()
    skd = distiller.attach(student, optimizer)
    with pytest.raises(RuntimeError, match=r"is already attached to `student`; call `remove\(\)`"):
        distiller.attach(student, optimizer)
    skd.remove()
    distiller.attach(student, optimizer).remove()


@pytest.mark.parametrize(
    ("selected", "returned"), [(lambda batch, image: (image, batch["label"]), "2 values"), (lambda *_: [], "a list")]
)
def test_select_of_other_than_three_values_is_an_error(selected, returned):
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=selected)
    batch = next(skd.watch(batches))
    with pytest.raises(TypeError, match=rf"`select` must return \(sam_image, .* but returns {returned}"):
        student(batch["image"])


def test_second_call_for_a_batch_without_select_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    student(batch["image"])
    with pytest.raises(RuntimeError, match="must be called once for each batch but is called again; pass `select`"):
        student(batch["image"])


def test_second_backward_through_the_same_logits_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    loss = loss_of(student(batch["image"]), batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="logits were backpropagated twice"):
        loss.backward()


def test_step_without_a_backward_through_the_logits_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    student(batch["image"])
    student.first.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="The optimizer stepped, but no gradient reached the student's logits"):
        optimizer.step()


def test_step_of_a_student_in_eval_mode_is_an_error_that_says_so():
    student, optimizer, distiller, (batch, other, _) = build()
    skd = distiller.attach(student, optimizer)
    host(student, optimizer, skd.watch([batch]))
    skd.next_batch(other)
    student.eval()(other["image"]).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"in train mode but was called in eval mode; call `student.train\(\)`"):
        optimizer.step()


def test_evaluation_with_gradients_leaves_the_error_of_a_step_without_one_as_it_is():
    student, optimizer, distiller, (batch, *_) = build()
    skd = distiller.attach(student, optimizer)
    student.eval()(batch["image"])
    skd.next_batch(batch)
    student.train()(batch["image"])
    student.first.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="The optimizer stepped, but no gradient reached the student's logits"):
        optimizer.step()


@pytest.mark.parametrize("learns", [True, False])
def test_step_without_a_gradient_for_the_taught_call_is_an_error_even_if_another_call_is_skipped(learns):
    """The weak view only gives the pseudo label of the strong one."""
    student, optimizer, distiller, batches = build()
    distiller.teacher.requires_grad_(learns)
    skd = distiller.attach(student, optimizer, select=lambda b, x: all_labels(b, x) if x is b["image"] else None)
    batch = next(skd.watch(batches))
    weak, strong = student(batch["image"]), student(batch["image"] + 0.1)
    (strong - weak.detach()).square().mean().backward()
    with pytest.raises(RuntimeError, match="The optimizer stepped, but no gradient reached the student's logits"):
        optimizer.step()


def test_step_without_a_gradient_for_the_taught_call_is_let_be_before_the_start():
    """A host that warms up uses the taught call only later, too."""
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(
        student, optimizer, start=3, select=lambda b, x: all_labels(b, x) if x is b["image"] else None
    )
    for step, batch in enumerate(skd.watch(batches), start=1):
        weak, strong = student(batch["image"]), student(batch["image"] + 0.1)
        optimizer.zero_grad()
        (strong.square().mean() + (weak.square().mean() if step >= 3 else 0)).backward()
        optimizer.step()
    assert skd.iteration == len(batches) == 3


def test_step_on_a_skipped_call_is_let_be_after_a_batch_whose_taught_call_got_no_backward():
    student, optimizer, distiller, (first, second, _) = build()
    skd = distiller.attach(student, optimizer, select=lambda b, x: all_labels(b, x) if b is first else None)
    skd.next_batch(first)
    student(first["image"])
    skd.next_batch(second)
    student(second["image"]).sum().backward()
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
        assert "Attach to the module that the host calls" in str(error)
    else:
        expected = build()
        plain_loop(*expected)
        assert_same((student, optimizer, distiller), expected)


def test_call_without_a_batch_is_an_error_and_in_eval_mode_or_without_gradient_none():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    with torch.no_grad():
        student(batches[0]["image"])
    student.eval()(batches[0]["image"])
    with pytest.raises(RuntimeError, match=r"must be called on a batch of `watch\(loader\)` but no batch was taken"):
        student.train()(batches[0]["image"])
    assert skd.iteration == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[:3], r"of shape \(3, 1, 8, 8\), must be the image of the watched batch, of shape \(4, 1"),
        (lambda image: image + 0.01, "but differs; pass `select` if the step changes the image"),
    ],
)
def test_input_that_is_not_the_batch_s_image_is_an_error(change, message):
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    with pytest.raises(ValueError, match=message):
        student(change(batch["image"])).sum().backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def all_labels(batch, image):
    """Batches with a label for every row."""
    return image, batch["label"], len(batch["label"])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("select", [None, all_labels])
def test_batches_fetched_ahead_are_an_error(select, depth):
    student, optimizer, distiller, batches = build(num_batches=4)
    skd = distiller.attach(student, optimizer, select=select)
    iterator = iter(skd.watch(batches))
    fetched = [next(iterator) for _ in range(depth + 1)]
    with pytest.raises(RuntimeError, match="on the batch taken last but is called on an earlier one"):
        host(student, optimizer, fetched[:1])


def test_batches_that_are_left_out_are_none():
    student, optimizer, distiller, batches = build(num_batches=4)
    skd = distiller.attach(student, optimizer, select=all_labels)
    host(student, optimizer, list(skd.watch(batches))[3:])
    assert set(skd.terms) == {"distillation_loss", "sam_loss", "gate_weight"}


def test_batch_that_comes_again_past_the_watched_loader_is_an_error():
    student, optimizer, distiller, batches = build(num_batches=2)
    skd = distiller.attach(student, optimizer, select=all_labels)
    with pytest.raises(RuntimeError, match="on a new batch after its step .* not from `itertools.cycle`"):
        host(student, optimizer, itertools.islice(itertools.cycle(skd.watch(batches)), 3))
    assert skd.iteration == 2


def test_call_after_the_step_that_is_not_taught_is_let_be():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda b, x: all_labels(b, x) if x is b["image"] else None)
    for batch in skd.watch(batches):
        host(student, optimizer, [batch])
        student(batch["image"] + 0)


def test_batch_of_batches_is_an_error():
    student, optimizer, distiller, batches = build()
    pairs = [(list(batches[0].values()), list(batches[1].values()))]
    skd = distiller.attach(student, optimizer)
    (pair,) = skd.watch(pairs)
    with pytest.raises(ValueError, match="image of a watched batch must be a tensor but is a list; .* pass `select`"):
        student(pair[0][0])


def test_batch_that_is_neither_mapping_nor_pair_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    image = next(skd.watch([batches[0]["image"]]))
    with pytest.raises(ValueError, match="a mapping with 'image' and 'label' or a pair .* but is a Tensor"):
        student(image)


def test_image_for_sam_of_other_rows_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda batch, image: (image[:3], batch["label"], None))
    batch = next(skd.watch(batches))
    with pytest.raises(ValueError, match="`sam_image` must have the rows and the size of the image"):
        student(batch["image"])


def test_label_without_a_channel_is_an_error():
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer, select=lambda batch, image: (image, batch["label"][:, 0], 2))
    batch = next(skd.watch(batches))
    with pytest.raises(ValueError, match=r"\(2, 8, 8\); pass `label\[:, None\]`, or return it so from `select`"):
        student(batch["image"])
    skd.remove()
    with pytest.raises(ValueError, match=r"\(labeled rows, 1, 8, 8\) but has \(2, 8, 8\); pass `label\[:, None\]`\.$"):
        distiller(batch["image"], student(batch["image"]), batch["label"][:, 0])


def test_sam_sees_the_batch_s_own_image_and_a_cached_teacher_needs_it():
    student, optimizer, distiller, batches = build()
    seen = []
    distiller.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    distiller.teacher.encoder = "cached"
    own = {**batches[0], "sam_image": batches[0]["image"] + 1}
    loader = iter(distiller.attach(student, optimizer).watch([own, batches[1]]))
    student(next(loader)["image"])
    assert torch.equal(torch.cat(seen), own["sam_image"])
    with pytest.raises(ValueError, match="`batch` must have a 'sam_image' for a teacher with encoder 'cached'"):
        student(next(loader)["image"])


def test_student_that_is_not_called_on_a_tensor_is_an_error():
    class OfBatches(Pair):
        def forward(self, batch):
            return self.network(batch["image"])

    student, optimizer, distiller, batches = build()
    student = OfBatches(student)
    skd = distiller.attach(student, optimizer)
    batch = next(skd.watch(batches))
    with pytest.raises(TypeError, match="`student` must be called with an image tensor"):
        student(batch)


@pytest.mark.parametrize("name", ["accumulation_steps", "every", "gate_interval"])
def test_intervals_below_one_are_errors(name):
    student, optimizer, distiller, _ = build()
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1 but is 0"):
        Attachment(distiller, student, optimizer, **{name: 0})
    assert not student._forward_hooks


def test_optimizer_of_another_network_is_an_error():
    student, optimizer, distiller, _ = build()
    with pytest.raises(ValueError, match="`optimizer` must step parameters of `student` .*, not to an averaged copy"):
        distiller.attach(copy.deepcopy(student), optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_teacher_that_does_not_learn_only_teaches():
    student, optimizer, distiller, batches = build()
    fixed = SAMDistiller(distiller.teacher, taught_views=(1, 2), gate="none")
    before = copy.deepcopy((student.state_dict(), fixed.teacher.state_dict()))
    host(student, optimizer, fixed.attach(student, optimizer).watch(batches))
    assert all(torch.equal(before[1][name], tensor) for name, tensor in fixed.teacher.state_dict().items())
    assert not any(torch.equal(before[0][name], tensor) for name, tensor in student.state_dict().items())


# --- the gate calls the student as the host does ---------------------------------------------------------------------


class Called(nn.Module):
    """A student with other arguments or outputs than a plain network's."""

    def __init__(self, student, kind):
        super().__init__()
        self.student, self.kind = student, kind

    def forward(self, x=None, need_features=False, *, image=None):
        logits = self.student(x if image is None else image)
        if self.kind == "pair":
            assert need_features
            return logits, "features"
        return {"logits": logits} if self.kind == "dictionary in training" and self.training else logits


@pytest.mark.parametrize(
    ("kind", "call", "pick"),
    [
        ("pair", lambda student, x: student(x, need_features=True)[0], itemgetter(0)),
        ("dictionary in training", lambda student, x: student(x)["logits"], itemgetter("logits")),
        ("keyword", lambda student, x: student(image=x), None),
    ],
)
def test_gate_calls_the_student_as_the_host_does(kind, call, pick):
    states = []
    for is_plain in (True, False):
        plain, optimizer, distiller, batches = build(num_batches=12, gate="agreement")
        student = plain if is_plain else Called(plain, kind)
        skd = distiller.attach(student, optimizer, logits_of=None if is_plain else pick)
        host(partial(call, student) if not is_plain else student, optimizer, skd.watch(batches))
        states.append(distiller.gate.state_dict())
    assert states[0]["num_measured"] == 1
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_gate_of_a_student_that_takes_other_tensors_is_one_clear_error():
    student, optimizer, distiller, (batch, *_) = build(gate="agreement")
    called = Called(student, "two tensors")
    skd = distiller.attach(called, optimizer, gate_interval=1)
    skd.next_batch(batch)
    with pytest.raises(TypeError, match="is called with other tensors too. Build the distiller with `gate='none'`"):
        called(batch["image"], torch.zeros(4, 2))


@pytest.mark.parametrize("gate", ["labeled rows first", "unlabeled rows first"])
def test_gate_is_measured_if_labeled_and_unlabeled_rows_alternate(gate, caplog):
    student, optimizer, distiller, batches = build(num_batches=24, gate="agreement")
    skd = distiller.attach(student, optimizer, labeled_rows=lambda batch: len(batch["label"]))
    parts = [{"image": batch["image"][:2], "label": batch["label"]} for batch in batches]
    parts[gate == "labeled rows first" :: 2] = [
        {"image": batch["image"][2:], "label": batch["label"][:0]} for batch in batches[::2]
    ]
    for batch in skd.watch(parts):
        optimizer.zero_grad()
        (student(batch["image"]).square().mean()).backward()
        optimizer.step()
    assert distiller.gate.num_measured == 1 and not caplog.messages
    assert (distiller.gate.labeled_scores >= 0).all()


def alternating(batches):
    """Unlabeled and labeled rows in turns."""
    for number, batch in enumerate(batches):
        rows = slice(2) if number % 2 else slice(2, None)
        yield {"image": batch["image"][rows], "label": batch["label"] if number % 2 else batch["label"][:0]}


def host_of_parts(student, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        student(batch["image"]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [9, 10, 11])
def test_resumed_host_of_alternating_parts_measures_the_same(stop):
    states = []
    for is_resumed in (False, True):
        student, optimizer, distiller, batches = build(num_batches=24, gate="agreement")
        parts = list(alternating(batches))
        options = dict(labeled_rows=lambda batch: len(batch["label"]), gate_interval=12)
        skd = distiller.attach(student, optimizer, **options)
        if is_resumed:
            host_of_parts(student, optimizer, skd.watch(parts[:stop]))
            skd.remove()
            parts, saved = parts[stop:], copy.deepcopy((distiller.state_dict(), distiller.optimizer.state_dict()))
            distiller = build(gate="agreement")[2]
            distiller.load_state_dict(saved[0])
            distiller.optimizer.load_state_dict(saved[1])
            skd = distiller.attach(student, optimizer, **options)
            skd.iteration = stop
        host_of_parts(student, optimizer, skd.watch(parts))
        states.append(distiller.state_dict())
    assert (states[0]["gate.labeled_scores"] >= 0).all()
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_measurement_for_labels_that_no_longer_come_is_given_up():
    student, optimizer, distiller, batches = build(num_batches=40, gate="agreement")
    skd = distiller.attach(student, optimizer, labeled_rows=lambda batch: len(batch["label"]))
    modes = []
    student.register_forward_hook(lambda module, *_: modes.append(module.training))
    parts = [batches[0], *({**batch, "label": batch["label"][:0]} for batch in batches[1:])]
    host_of_parts(student, optimizer, skd.watch(parts))
    assert modes.count(False) == 2 and modes.count(True) == 40  # once as it is, once turned


@pytest.mark.parametrize("when", ["before the first batch", "after the last one"])
def test_step_without_gradients_is_let_be(when):
    """As to silence a scheduler's warning, or to flush accumulated gradients that happen to be none."""
    student, optimizer, distiller, batches = build()
    skd = distiller.attach(student, optimizer)
    if when == "before the first batch":
        optimizer.zero_grad()
        optimizer.step()
    host(student, optimizer, skd.watch(batches))
    optimizer.zero_grad()
    optimizer.step()
    assert skd.iteration == 3


def test_sams_gradients_do_not_live_as_long_as_the_hosts_logits():
    student, optimizer, distiller, batches = build(num_batches=1)
    skd = distiller.attach(student, optimizer)
    for batch in skd.watch(batches):
        logits = student(batch["image"])
        loss_of(logits, batch).backward()
        gradients = [weakref.ref(parameter.grad) for parameter in distiller.teacher.parameters()]
        optimizer.step()
    assert logits is not None and not any(gradient() is not None for gradient in gradients)


def test_torchscript_takes_no_hooks_which_is_one_clear_error():
    student, optimizer, distiller, (batch, *_) = build()
    scripted = torch.jit.trace(student.eval(), batch["image"])
    with pytest.raises(TypeError, match="is TorchScript; attach to it before it is scripted"):
        distiller.attach(scripted, optimizer)
