from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn
from torch.nn import functional as F

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.wiring import UNMEASURED_CALLS
from knowsam_monai.handlers import SAMDistillation
from knowsam_monai.losses import DistillationLoss, PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.teachers import NetworkTeacher, SliceTeacher
from tests.toys import (
    RegionTeacher,
    ToyStudent,
    ToyTeacher,
    distiller_of,
    region_batches,
    region_of,
    toy_batches,
    toy_trainer,
    with_gradient,
)


def test_distillation_reaches_the_student_alone_and_only_the_taught_views(student, teacher):
    batch = toy_batches(1)[0]
    result = distiller_of(teacher)(batch["image"], student(batch["image"]), batch["label"])
    result.distillation_loss.backward()
    assert with_gradient(student) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert all(p.grad is None for p in teacher.parameters())


def test_fused_view_is_never_taught_by_default_of_the_paper(student, teacher):
    batch = toy_batches(1)[0]
    logits = student(batch["image"]).detach().requires_grad_()
    distiller_of(teacher)(batch["image"], logits, batch["label"]).distillation_loss.backward()
    assert logits.grad[:, 0].abs().sum() == 0 and (logits.grad[:, 1:].flatten(2).abs().sum(-1) > 0).all()


def test_sam_loss_reaches_the_teacher_alone(student, teacher):
    batch = toy_batches(1)[0]
    distiller_of(teacher)(batch["image"], student(batch["image"]), batch["label"]).sam_loss.backward()
    assert with_gradient(teacher) == {name for name, _ in teacher.named_parameters()}
    assert all(p.grad is None for p in student.parameters())


def test_no_loss_reaches_what_made_the_image(student, teacher):
    batch = toy_batches(1)[0]
    image = batch["image"].requires_grad_()  # of a learned augmentation
    distiller_of(teacher)(image, student(image.detach()), batch["label"]).loss.backward()
    assert image.grad is None


@pytest.mark.parametrize("prompt_view", [0, 2])
def test_terms_equal_hand_written_ones(student, teacher, prompt_view):
    batch = toy_batches(1)[0]
    image, label, logits = batch["image"], batch["label"], student(batch["image"])
    distiller = distiller_of(teacher, distillation_loss=DistillationLoss(2.0), prompt_view=prompt_view)
    distiller.gate.weight.fill_(0.25)
    result = distiller(image, logits, label, weight=0.5)
    target = teacher(image, logits[:, prompt_view])
    p, q = (target / 2).softmax(1), [(logits[:, v] / 2).softmax(1) for v in (1, 2)]
    expected = 0.25 * 0.5 * sum(4 * (p * (p.log() - v.log())).sum(1).mean() for v in q)
    torch.testing.assert_close(result.distillation_loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.sam_loss, dice_ce_loss(3)(target[:2], label), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.teacher_logits, target, rtol=1e-12, atol=0)
    assert not result.teacher_logits.requires_grad
    torch.testing.assert_close(result.loss, result.distillation_loss + result.sam_loss)


@pytest.mark.parametrize("rows", [2, slice(0, 2), slice(1, 4, 2)])
def test_labeled_rows_choose_what_sam_learns_from_when_all_rows_have_labels(student, teacher, rows):
    batch = toy_batches(1, num_labeled=4, num_unlabeled=0)[0]
    logits = student(batch["image"])
    result = distiller_of(teacher)(batch["image"], logits, batch["label"], labeled_rows=rows)
    chosen = rows if isinstance(rows, slice) else slice(rows)
    target = teacher(batch["image"], logits[:, 0])
    torch.testing.assert_close(result.sam_loss, dice_ce_loss(3)(target[chosen], batch["label"][chosen]))
    torch.testing.assert_close(result.teacher_logits, target)


@pytest.mark.parametrize(
    "rows,error,message",
    [
        ([0, 3], TypeError, "must be a number of rows, a slice or 'all' but is a list"),
        (True, TypeError, "must be a number of rows, a slice or 'all' but is True"),
        ("both", TypeError, "must be a number of rows, a slice or 'all' but is 'both'"),
        (torch.tensor([True, False, True, False]), TypeError, "is a Tensor; put the labeled rows next to each other"),
        (-2, ValueError, "must be 0 or more but is -2"),
        (slice(None, None, -1), ValueError, "must be a slice of whole numbers with a positive step but"),
        (slice("a"), ValueError, "must be a slice of whole numbers with a positive step but"),
        (slice(0, 2, 0), ValueError, "must be a slice of whole numbers with a positive step but"),
        (slice(0, 3), ValueError, r"as `labeled_rows` selects \(3\) or `image` has \(4\) but has 2"),
    ],
)
def test_rows_that_are_no_number_and_no_slice_are_one_clear_error(student, teacher, rows, error, message):
    batch = toy_batches(1)[0]
    with pytest.raises(error, match=message):
        distiller_of(teacher)(batch["image"], student(batch["image"]), batch["label"], labeled_rows=rows)


def test_shut_gate_computes_no_loss_but_the_same_parameters_have_a_gradient(student, teacher):
    batch, losses, trained = toy_batches(1)[0], [], []
    for gate_weight in (0.0, 1.0):
        distiller = SAMDistiller(
            teacher, distillation_loss=lambda view, _: losses.append(view) or view.sum(), taught_views=(1, 2)
        )
        distiller.gate.weight.fill_(gate_weight)
        student.zero_grad()
        loss = distiller(batch["image"], student(batch["image"])).distillation_loss
        loss.backward()
        trained.append([parameter.grad is not None for parameter in student.parameters()])
        if gate_weight == 0:
            assert losses == [] and loss == 0
            assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)
    assert trained[0] == trained[1] and len(losses) == 2


def test_shut_gate_adds_nothing_to_logits_that_are_not_finite(student, teacher):
    batch = toy_batches(1)[0]
    logits = torch.full_like(student(batch["image"]), torch.inf).requires_grad_()
    loss = SAMDistiller(teacher, taught_views=(1, 2))(batch["image"], logits).distillation_loss
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("shut_by", ["weight", "gate"])
def test_teacher_that_overflows_leaves_a_student_that_is_not_taught_alone(student, teacher, shut_by):
    batch = toy_batches(1)[0]
    logits = student(batch["image"])
    kwargs = {"gate": "validation"} if shut_by == "gate" else {}
    teacher.forward = lambda image, prompt: prompt / 0
    distiller = SAMDistiller(teacher, **kwargs)
    loss = distiller(batch["image"], logits, weight=float(shut_by == "gate")).distillation_loss
    (loss + 0 * logits.sum()).backward()
    assert loss == 0 and all(torch.all(p.grad == 0) for p in student.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_row_where_the_teacher_has_broken_down_teaches_nothing(student, teacher, value):
    batch = toy_batches(1)[0]
    image, logits = batch["image"], student(batch["image"]).detach().requires_grad_()
    target = teacher(image, logits[:, 0]).detach()
    broken = target.clone()
    broken[3, 1, 4, 4] = value  # one pixel is enough
    teacher.forward = lambda image, prompt_logits: broken
    loss = SAMDistiller(teacher.requires_grad_(False), gate="none", taught_views=(1, 2))(
        image, logits
    ).distillation_loss
    loss.backward()
    kl = DistillationLoss()
    expected = sum(kl(logits[:3, view], target[:3]) for view in (1, 2)) * 3 / 4  # a mean over 4 rows, one of which is 0
    torch.testing.assert_close(loss, expected)
    assert logits.grad[3].abs().max() < 1e-15 and logits.grad[2].abs().max() > 1e-4


@pytest.mark.parametrize("rows", [None, slice(1, 4, 2)])
def test_unlabeled_rows_alone_are_taught(student, teacher, rows):
    batch = toy_batches(1, num_labeled=4 if rows else 2, num_unlabeled=0 if rows else 2)[0]
    image, logits = batch["image"], student(batch["image"]).detach().requires_grad_()
    result = distiller_of(teacher, taught_rows="unlabeled")(image, logits, batch["label"], labeled_rows=rows)
    result.distillation_loss.backward()
    unlabeled = [0, 2] if rows else [2, 3]
    assert logits.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist() == unlabeled
    target = teacher(image, logits[:, 0].detach())
    expected = sum(DistillationLoss()(logits[unlabeled, v], target[unlabeled]) for v in (1, 2))
    torch.testing.assert_close(result.distillation_loss, expected, rtol=1e-10, atol=0)


def test_without_unlabeled_rows_nothing_is_distilled_and_a_warning_says_so_once(student, teacher, caplog):
    batch = toy_batches(1, num_labeled=2, num_unlabeled=0)[0]
    distiller = distiller_of(teacher, taught_rows="unlabeled", gate="agreement")
    for step in range(5):
        assert len(caplog.messages) == (0 if step < 3 else 2)  # some hosts have separate calls for unlabeled rows
        result = distiller(batch["image"], student(batch["image"]), batch["label"], "all")
        distiller.measure_agreement(student, batch["image"], batch["label"], "all")
    assert result.distillation_loss.item() == 0 and result.sam_loss.item() > 0 and distiller.gate.num_measured == 0
    assert len(caplog.messages) == 2 and "nothing is distilled: every row is labeled" in caplog.messages[0]
    assert "the gate 'agreement' was not measured" in caplog.messages[1]
    assert "Build the distiller with the gate none" in caplog.messages[1]


class OneChannel(nn.Module):
    """A sigmoid network as a teacher; it finds what its student finds."""

    def __init__(self, size=1):
        super().__init__()
        self.scale, self.size = nn.Parameter(torch.ones(())), size

    def forward(self, image, prompt_logits):
        logits = self.scale * (prompt_logits[:, 1:] - prompt_logits[:, :1])
        return logits[..., :: self.size]


@pytest.mark.parametrize("taught_rows", ["all", "unlabeled"])
@pytest.mark.parametrize("learns", [True, False])
def test_teacher_with_a_sigmoid_teaches_two_classes(learns, taught_rows):
    batch = toy_batches(1, num_classes=2)[0]
    teacher, logits = OneChannel(), torch.randn(4, 2, 8, 8, requires_grad=True)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1) if learns else None
    distiller = SAMDistiller(teacher, optimizer, taught_rows=taught_rows, gate="none")
    loss = distiller(batch["image"], logits, batch["label"]).distillation_loss
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("size, num_classes, overlapping", [(2, 2, False), (1, 3, False), (1, 2, True)])
def test_teacher_s_logits_of_another_shape_are_one_clear_error(learns, size, num_classes, overlapping):
    batch = toy_batches(1, num_classes=2)[0]
    teacher = OneChannel(size)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1) if learns else None
    distiller = SAMDistiller(teacher, optimizer, gate="none", taught_rows="unlabeled", overlapping=overlapping)
    logits, expected = torch.randn(4, num_classes, 8, 8), r"must return logits of the shape of its prompt, \(\d, "
    label = batch["label"].expand(-1, num_classes, -1, -1) if overlapping else batch["label"]
    with pytest.raises(ValueError, match=expected):
        distiller(batch["image"], logits, label)
    with pytest.raises(ValueError, match=expected):
        distiller.ask_teacher(batch["image"], logits)


@pytest.mark.parametrize("way", ["handler", "attach"])
def test_student_cannot_be_its_own_teacher(way):
    student = nn.Conv2d(1, 3, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = SAMDistiller(NetworkTeacher(student, 3))
    with pytest.raises(ValueError, match="`teacher` must be a network of its own but shares"):
        if way == "attach":
            distiller.attach(student, optimizer)
        toy_trainer(student, toy_batches(1), None, [SAMDistillation(distiller)], optimizer=optimizer).run()


def test_what_is_no_module_is_no_teacher():
    with pytest.raises(TypeError, match="`teacher` must be a torch.nn.Module but is a function"):
        SAMDistiller(lambda image, prompt: prompt)
    with pytest.raises(TypeError, match="`distiller` must be a SAMDistiller but is a ToyTeacher"):
        SAMDistillation(ToyTeacher())


def test_rows_whose_labels_have_holes_are_taught_and_judge_the_teacher(student, teacher):
    """Bidirectional copy-paste has a label for every row, with pixels that nobody labeled."""
    batch = toy_batches(1, num_labeled=2, num_unlabeled=0)[0]
    loss = dice_ce_loss(3, ignore_index=255)
    distiller = distiller_of(teacher, taught_rows="unlabeled", gate="agreement", sam_loss=loss)
    distiller.measure_agreement(student, batch["image"], batch["label"])
    assert distiller.gate.num_measured == 0  # pre-training: every pixel has its label
    batch["label"][1, :, :4] = 255
    judged = []
    teacher.register_forward_hook(lambda module, arguments, output: judged.append(len(output)))
    distiller.measure_agreement(student, batch["image"], batch["label"])
    assert distiller.gate.num_measured == 1 and judged == [1, 1, 2]  # twice the row with holes, once both labels
    logits = student(batch["image"]).detach().requires_grad_()
    distiller.gate.weight.fill_(1)
    distiller(batch["image"], logits, batch["label"]).distillation_loss.backward()
    assert (logits.grad.flatten(1).abs().sum(1) > 0).all()


def test_no_graph_through_the_teacher_for_unlabeled_rows(student, teacher):
    seen = []
    teacher.register_forward_hook(lambda m, a, out: seen.append((len(out), out.requires_grad)))
    batch = toy_batches(1, num_labeled=1, num_unlabeled=3)[0]
    distiller_of(teacher)(batch["image"], student(batch["image"]), batch["label"])
    assert seen == [(1, True), (3, False)]


@pytest.mark.parametrize("rows", [None, slice(1, 4, 2)])
@pytest.mark.parametrize(
    ("options", "weight", "also_read", "read"),
    [
        ({}, 1.0, (), "all"),
        ({}, 0.0, (), "none"),
        ({"gate": "validation"}, 1.0, (), "none"),
        ({"taught_rows": "unlabeled"}, 1.0, (), "unlabeled"),
        ({}, 0.0, ("labeled",), "labeled"),
        ({"gate": "validation"}, 1.0, ("unlabeled",), "unlabeled"),
        ({"taught_rows": "unlabeled"}, 1.0, ("labeled",), "all"),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_rows_that_nothing_reads_are_nan_and_do_not_enter_the_teacher(
    student, teacher, rows, options, weight, also_read, read, learns
):
    batch = toy_batches(1, num_labeled=4 if rows else 2, num_unlabeled=0 if rows else 2)[0]
    image, logits = batch["image"], student(batch["image"])
    expected = teacher(image, logits[:, 0].detach())
    labeled = list(range(4)[rows or slice(2)])
    unlabeled = [row for row in range(4) if row not in labeled]
    read_rows = {"all": [0, 1, 2, 3], "none": [], "labeled": labeled, "unlabeled": unlabeled}[read]
    if learns:
        read_rows = sorted({*read_rows, *labeled})
    distiller = distiller_of(teacher, **options)
    if not learns:
        distiller.optimizer = None
    entered = []
    teacher.register_forward_pre_hook(lambda _, args: entered.extend(args[0]))
    result = distiller(image, logits, batch["label"], rows, weight, also_read=also_read)
    assert sorted(i for x in entered for i in range(4) if torch.equal(x, image[i])) == read_rows
    for row in range(4):
        found = result.teacher_logits[row]
        assert torch.allclose(found, expected[row], atol=1e-12) if row in read_rows else found.isnan().all()
    assert result.loss.isfinite()


def test_without_labels_or_without_optimizer_the_teacher_is_left_alone(student, teacher):
    batch = toy_batches(1)[0]
    image, logits = batch["image"], student(batch["image"])
    assert not distiller_of(teacher)(image, logits).sam_loss.requires_grad
    assert not SAMDistiller(teacher).train()(image, logits, batch["label"]).sam_loss.requires_grad


def test_plain_network_is_prompt_and_pupil_whatever_the_view_arguments_say(teacher):
    batch = toy_batches(1)[0]
    logits = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    result = distiller_of(teacher)(batch["image"], logits, batch["label"])
    expected = DistillationLoss()(logits, teacher(batch["image"], logits.detach()))
    torch.testing.assert_close(result.distillation_loss, expected)


def test_sigmoid_student_of_one_channel_learns(teacher):
    teacher = ToyTeacher(1).double()
    batch = toy_batches(1, num_classes=2)[0]
    logits = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    result = distiller_of(teacher)(batch["image"], logits, batch["label"])
    result.loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
    assert with_gradient(teacher) == {name for name, _ in teacher.named_parameters()}


def test_teacher_stays_in_eval_mode(teacher):
    distiller = SAMDistiller(teacher.train())
    assert not teacher.training
    assert distiller.train().training and not teacher.training


def test_output_of_several_heads_is_one_clear_error(student, teacher):
    batch = toy_batches(1)[0]
    logits = student(batch["image"])[:, 0]
    with pytest.raises(TypeError, match="`logits` must be a tensor of logits or stacked views but is a list; pick"):
        distiller_of(teacher)(batch["image"], [logits, logits], batch["label"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teachers_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_host_and_teacher_may_have_different_precision(dtype, teachers_dtype):
    batch = toy_batches(1)[0]
    image = batch["image"].to(dtype)
    logits = torch.zeros(4, 3, 8, 8, dtype=dtype, requires_grad=True)
    distiller = SAMDistiller(ToyTeacher().to(teachers_dtype), gate="none").train()
    result = distiller(image, logits, batch["label"])
    result.loss.backward()
    assert result.teacher_logits.dtype == teachers_dtype and logits.grad.abs().sum() > 0
    torch.testing.assert_close(result.teacher_logits, distiller.ask_teacher(image, logits.detach()))


def test_losses_of_each_pixel_count_by_their_mean(student, teacher):
    """A trainer takes the mean of its own loss too; a sum would be larger by the number of pixels."""
    batch = toy_batches(1)[0]
    results = []
    for reduction in ("none", "mean"):
        distiller = distiller_of(
            teacher,
            gate="none",
            distillation_loss=nn.MSELoss(reduction=reduction),
            sam_loss=lambda logits, label: F.cross_entropy(
                logits, label[:, 0].long(), reduction=reduction
            ),  # noqa: B023
        )
        result = distiller(batch["image"], student(batch["image"]), batch["label"])
        results.append((result.distillation_loss, result.sam_loss))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("capturable", [False, True])
def test_state_of_the_optimizer_moves_with_the_teacher(capturable):
    """A checkpoint may have been loaded into a distiller that was built on the CPU."""
    teacher = ToyTeacher().to("meta")
    optimizer = torch.optim.Adam(teacher.parameters(), capturable=capturable)
    groups = optimizer.param_groups
    for parameter in teacher.parameters():
        moments = {name: torch.zeros(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    distiller = SAMDistiller(teacher, optimizer).move(torch.device("meta"))
    for state in optimizer.state.values():
        assert state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta and state["step"].is_meta == capturable
    assert distiller.gate.weight.is_meta and optimizer.param_groups is groups  # schedulers hold them


def test_losses_of_one_s_own_get_float32_outside_of_autocast(student, teacher):
    seen = []

    def loss(student_logits, teacher_logits):
        seen.append((student_logits.dtype, teacher_logits.dtype, torch.is_autocast_enabled("cpu")))
        return F.mse_loss(student_logits, teacher_logits)

    def sam_loss(logits, label):
        seen.append((logits.dtype, torch.float32, torch.is_autocast_enabled("cpu")))
        return logits.mean()

    batch = toy_batches(1)[0]
    distiller = distiller_of(teacher.float(), gate="none", distillation_loss=loss, sam_loss=sam_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student.float()(batch["image"].float())
        assert logits.dtype == torch.bfloat16
        distiller(batch["image"].float(), logits, batch["label"])
    assert set(seen) == {(torch.float32, torch.float32, False)} and len(seen) == 3


def test_frozen_teacher_without_labels_takes_a_smaller_last_batch(student):
    image = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    distiller = SAMDistiller(ToyTeacher().double(), gate="none", taught_views=(1, 2))
    assert distiller(image, student(image), labeled_rows=4).distillation_loss > 0


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_long_unsigned_numbers_teach(student, teacher, dtype):
    batch = toy_batches(1)[0]
    label = batch["label"].long()
    distiller = distiller_of(teacher)
    logits = student(batch["image"])
    losses = [distiller(batch["image"], logits, given).sam_loss for given in (label, label.to(dtype))]
    torch.testing.assert_close(*losses)
    losses = [PartiallyLabeledLoss()(logits[:, 0], given) for given in (label, label.to(dtype))]
    torch.testing.assert_close(*losses)


def test_loss_that_one_channel_makes_zero_is_refused():
    image, label = torch.rand(2, 1, 8, 8), torch.randint(2, (1, 1, 8, 8))
    with pytest.raises(ValueError, match="must apply a sigmoid for a network with one channel"):
        PartiallyLabeledLoss(nn.CrossEntropyLoss())(torch.zeros(2, 1, 8, 8), label)
    teacher = ToyTeacher(1)
    distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), sam_loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="must apply a sigmoid for a network with one channel"):
        distiller(image, torch.zeros(2, 1, 8, 8), label)


def test_plain_loop_needs_no_move_of_the_teacher(teacher):
    """The device "meta" stands for a GPU; it computes no values, so the teacher is not asked here."""
    frozen = SAMDistiller(ToyTeacher()).eval()
    frozen(torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, 3, 8, 8, device="meta"), weight=0.0)
    assert all(p.is_meta for p in frozen.teacher.parameters()) and frozen.gate.weight.is_meta
    student_optimizer = torch.optim.SGD(nn.Conv2d(1, 3, 3, device="meta").parameters(), lr=0.1)
    distiller_of(teacher).follow(student_optimizer)
    assert all(p.is_meta for p in teacher.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=4), "`logits` must have 3 channels"),
        (dict(label_rows=5), "`label` must have as many rows"),
        (dict(label_value=3), "`label` must be in 0..2"),
        (dict(label_size=(8, 16)), "`label` must "),
        (dict(image_rows=1), "`image` must "),
        (dict(image_size=(8, 16)), "`image` must "),
        (dict(image_channel=False), r"`image`, of shape \(4, 8, 8\), a channel: `image\[:, None\]` if it has none"),
        (dict(weight="1"), "`weight` must be a number, 0 or more, but is '1'"),
        (dict(also_read=["unlabelled"]), "`also_read` must be 'labeled' or 'unlabeled' but is 'unlabelled'"),
    ],
)
def test_wrong_input_is_one_clear_error(teacher, change, message):
    image = torch.rand(change.get("image_rows", 4), 1, *change.get("image_size", (8, 8))).double()
    logits = torch.zeros(4, change.get("classes", 3), 8, 8, dtype=torch.float64)
    label_shape = (change.get("label_rows", 2), 1, *change.get("label_size", (8, 8)))
    label = torch.full(label_shape, change.get("label_value", 0)).double()
    image = image if change.get("image_channel", True) else image[:, 0]
    options = {name: change[name] for name in ("weight", "also_read") if name in change}
    with pytest.raises(ValueError, match=message):
        distiller_of(teacher)(image, logits, label, **options)


def test_views_of_one_class_are_no_volumes_without_channel():
    image = torch.rand(4, 1, 8, 8)
    logits = ToyStudent(1)(image).detach()
    assert logits.shape == (4, 3, 1, 8, 8)
    assert distiller_of(ToyTeacher(1))(image, logits, torch.zeros(2, 1, 8, 8)).distillation_loss > 0


def test_view_that_the_student_lacks_is_one_clear_error(student, teacher):
    batch = toy_batches(1)[0]
    distiller = SAMDistiller(teacher, taught_views=(3,))
    with pytest.raises(ValueError, match="must be below 3"):
        distiller(batch["image"], student(batch["image"]), batch["label"])


def test_bfloat16_autocast_reaches_the_teacher_and_losses_stay_float32():
    teacher, dtypes = ToyTeacher(), []
    teacher.image_conv.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    distiller = distiller_of(teacher, autocast_dtype=torch.bfloat16)
    image = torch.rand(4, 1, 8, 8)
    result = distiller(image, ToyStudent()(image), torch.zeros(2, 1, 8, 8))
    assert set(dtypes) == {torch.bfloat16}
    assert result.distillation_loss.dtype == result.sam_loss.dtype == torch.float32


@pytest.mark.parametrize("kind", [tuple, dict])
def test_output_in_the_place_of_its_logits_is_an_error_with_the_remedy_of_each_call(teacher, kind):
    distiller = distiller_of(teacher, gate="agreement")
    image, label = torch.rand(4, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    logits = torch.zeros(4, 3, 8, 8, requires_grad=True)
    output = (logits, logits.mean()) if kind is tuple else {"logits": logits}
    with pytest.raises(TypeError, match=rf"`logits` must be a tensor .* but is a {kind.__name__}; pick them from the "):
        distiller(image, output, label)
    with pytest.raises(
        TypeError, match=rf"`student\(image\)` must be .* a {kind.__name__}; .* with `logits_of`, as in"
    ):
        distiller.measure_agreement(lambda image: output, image, label)


def test_state_dict_holds_the_gate(teacher):
    distiller = distiller_of(teacher, gate="validation")
    distiller.gate.agreement_scores.fill_(0.5)  # equal
    distiller.gate.update(0.5, 0.45)
    other = distiller_of(copy.deepcopy(teacher), gate="validation")
    other.load_state_dict(distiller.state_dict())
    assert other.gate.weight.item() == pytest.approx(0.5) and other.gate.is_measured


def test_monai_network_of_a_user_is_taught():
    network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(4, 4, 4, 4, 4, 4))
    teacher = ToyTeacher()
    image = torch.rand(2, 1, 32, 32)
    result = distiller_of(teacher)(image, network(image), torch.zeros(1, 1, 32, 32))
    result.distillation_loss.backward()
    assert all(p.grad is not None for p in network.parameters())


# --- volumes, taught by their slices ----------------------------------------------------------------------------------


def volume_case(slices, **kwargs):
    torch.manual_seed(0)
    student, teacher = ToyStudent(spatial_dims=3).double(), SliceTeacher(ToyTeacher().double(), slices=slices, **kwargs)
    batch = toy_batches(1, size=(4, 5, 6))[0]
    return student, teacher, batch


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
@pytest.mark.parametrize("axis", [0, 2])
def test_both_losses_of_drawn_slices_equal_hand_written_ones(axis, sampling):
    student, teacher, batch = volume_case(2, axes=axis, sampling=sampling)
    image, label, logits = batch["image"], batch["label"], student(batch["image"])
    result = distiller_of(teacher)(image, logits, label, iteration=4)
    index = teacher.draw_slices(logits[:, 0], 4).index.tolist()

    pairs = [(row, i) for row in range(4) for i in index[row]]
    images, labels, fused, first, second = (
        torch.stack([volume[row].select(axis + 1, i) for row, i in pairs if row < len(volume)])
        for volume in (image, label, logits[:, 0], logits[:, 1], logits[:, 2])
    )
    target = teacher.sam_teacher(images, fused)
    expected = DistillationLoss()(first, target) + DistillationLoss()(second, target)
    torch.testing.assert_close(result.distillation_loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.sam_loss, dice_ce_loss(3)(target[:4], labels), rtol=1e-10, atol=0)
    assert result.slices.axis == axis and result.slices.index.tolist() == index
    stacked = result.teacher_logits.movedim(axis + 2, 1).flatten(0, 1)
    torch.testing.assert_close(stacked, target, rtol=0, atol=1e-12)


def test_student_learns_on_the_drawn_slices_alone():
    student, teacher, batch = volume_case(2)
    logits = student(batch["image"]).detach().requires_grad_()
    result = distiller_of(teacher)(batch["image"], logits, batch["label"], iteration=4)
    result.distillation_loss.backward()
    for row in range(4):
        touched = logits.grad[row, 1:].abs().sum(dim=(0, 1, 2, 3)).nonzero().flatten()
        assert torch.equal(touched, result.slices.index[row])


def test_drawn_slices_leave_who_learns_from_what_as_it_is():
    student, teacher, batch = volume_case(2)
    logits = student(batch["image"])
    result = distiller_of(teacher)(batch["image"], logits, batch["label"])
    result.distillation_loss.backward()
    assert with_gradient(student) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert with_gradient(teacher) == set()
    student.zero_grad()
    result.sam_loss.backward()
    assert with_gradient(teacher) == {name for name, _ in teacher.named_parameters()}
    assert with_gradient(student) == set()


def test_only_the_slices_of_labeled_rows_build_a_graph():
    student, teacher, batch = volume_case(3)
    seen = []
    teacher.sam_teacher.register_forward_hook(lambda m, a, out: seen.append((len(out), out.requires_grad)))
    distiller_of(teacher)(batch["image"], student(batch["image"]), batch["label"])
    assert seen == [(2 * 3, True), (2 * 3, False)]


@pytest.mark.parametrize("rows", [2, slice(1, 4, 2)])
def test_rows_draw_the_same_slices_whichever_of_them_are_labeled(rows):
    student, teacher, batch = volume_case(2)
    label = torch.cat([batch["label"]] * 2)
    logits = student(batch["image"])
    chosen = rows if isinstance(rows, slice) else slice(rows)
    result = distiller_of(teacher)(batch["image"], logits, label, labeled_rows=rows, iteration=4)
    reference = SAMDistiller(teacher, taught_views=(1, 2), gate="none")(batch["image"], logits, iteration=4)
    torch.testing.assert_close(result.teacher_logits, reference.teacher_logits, rtol=0, atol=1e-12)
    expected = dice_ce_loss(3)(reference.teacher_logits[chosen], reference.slices.take(label)[chosen])
    torch.testing.assert_close(result.sam_loss, expected, rtol=1e-10, atol=0)


def test_all_slices_are_a_whole_volume_and_no_selection():
    student, teacher, batch = volume_case(None)
    logits = student(batch["image"])
    result = distiller_of(teacher)(batch["image"], logits, batch["label"])
    assert result.slices is None
    torch.testing.assert_close(result.teacher_logits, teacher(batch["image"], logits[:, 0]), rtol=0, atol=1e-12)


def test_loop_without_iterations_draws_other_slices_at_each_call():
    student, teacher, batch = volume_case(2)
    distiller = distiller_of(teacher)
    drawn = [distiller(batch["image"], student(batch["image"]), batch["label"]).slices.index for _ in range(3)]
    assert len({tuple(index.flatten().tolist()) for index in drawn}) == 3


def test_label_of_another_depth_is_an_error_before_slices_are_taken():
    student, teacher, batch = volume_case(2)
    with pytest.raises(ValueError, match=r"`label` must have shape \(labeled rows, 1, 4, 5, 6\)"):
        distiller_of(teacher)(batch["image"], student(batch["image"]), torch.zeros(2, 1, 4, 5, 8).double())


@pytest.mark.parametrize("gate,is_warned", [("agreement", True), ("validation", True), ("none", False)])
def test_gate_that_nobody_measures_is_warned_of_once(student, teacher, monkeypatch, caplog, gate, is_warned):
    monkeypatch.setitem(UNMEASURED_CALLS, "validation", 3)
    monkeypatch.setitem(UNMEASURED_CALLS, "agreement", 3)
    batch = toy_batches(1)[0]
    image, label, logits = batch["image"], batch["label"], student(batch["image"]).detach()
    unmeasured, measured = (distiller_of(teacher, gate=gate) for _ in range(2))
    measured.measure_agreement(student.eval(), image, label)
    if gate == "validation":  # the labeled rows alone do not say that somebody validates
        measured.gate.update(0.5, 0.5)
    for distiller in (unmeasured, measured):
        for _ in range(5):
            distiller(image, logits, label)
    warnings = [line for line in caplog.messages if "was not measured in 3 steps" in line]
    assert len(warnings) == is_warned


@pytest.mark.parametrize("kept_by", ["no optimizer", "requires_grad"])
def test_teacher_that_does_not_learn_has_no_sam_loss_and_needs_no_graph_and_no_label(student, teacher, kept_by):
    batch = toy_batches(1)[0]
    optimizer = None if kept_by == "no optimizer" else torch.optim.Adam(teacher.parameters(), lr=0.01)
    if kept_by == "requires_grad":
        teacher.requires_grad_(False)
    has_graph = []
    teacher.register_forward_hook(lambda module, args, out: has_graph.append(out.requires_grad))
    distiller = SAMDistiller(
        teacher, optimizer, taught_views=(1, 2), sam_loss=lambda *_: pytest.fail("computed"), gate="none"
    )
    logits = student(batch["image"])
    results = [distiller.train()(batch["image"], logits, label) for label in (batch["label"], None)]
    for result in results:
        assert result.sam_loss == 0 and torch.equal(result.loss, results[0].distillation_loss) and result.loss > 0
    assert not distiller.learns and has_graph == [False, False]


def test_sam_loss_begins_when_a_frozen_teacher_is_thawed(student, teacher):
    batch = toy_batches(1)[0]
    distiller = distiller_of(teacher.requires_grad_(False))
    losses = []
    for requires_grad in (False, True):
        teacher.requires_grad_(requires_grad)
        losses.append(distiller(batch["image"], student(batch["image"]), batch["label"]).sam_loss)
    assert losses[0] == 0 and losses[1] > 0 and losses[1].requires_grad


@pytest.mark.parametrize("forgotten", ["nothing", "follow", "label", "parameters"])
def test_teacher_that_never_steps_is_warned_of_once(student, teacher, monkeypatch, caplog, forgotten):
    monkeypatch.setattr("knowsam_monai.distillation.wiring.UNTAUGHT_CALLS", 3)
    distiller = distiller_of(teacher)
    if forgotten == "parameters":
        teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    if forgotten != "follow":
        distiller.follow(optimizer)
    for batch in toy_batches(5):
        label = None if forgotten == "label" else batch["label"]
        distiller(batch["image"], student(batch["image"]), label).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    warnings = [line for line in caplog.messages if "SAM learns nothing" in line]
    remedies = {"nothing": [], "follow": ["call `distiller.follow"], "label": ["has not seen a label"]}
    remedies["parameters"] = ["has no parameter of the teacher that requires a gradient"]
    assert len(warnings) == len(remedies[forgotten])
    assert all(remedy in line for remedy, line in zip(remedies[forgotten], warnings))


def test_no_labeled_rows_are_no_label(student, teacher):
    batch = toy_batches(1)[0]
    logits = student(batch["image"])
    label = torch.zeros_like(batch["image"][:, :1])
    ours, expected = (distiller_of(teacher)(batch["image"], logits, *rest) for rest in ((label, 0), ()))
    assert ours.sam_loss == 0 and torch.equal(ours.distillation_loss, expected.distillation_loss)


REGION_CASES = {
    "images": {},
    "slices of volumes": {"size": (6, 5, 8)},
    "unlabeled rows": {"taught_rows": "unlabeled"},
    "dice term": {"distillation_loss": DistillationLoss(2.0, dice_weight=0.5)},
    "holes": {"sam_loss": dice_ce_loss(1, ignore_index=255)},
}


@pytest.mark.parametrize("case", REGION_CASES)
def test_overlapping_regions_are_as_many_students_of_one_channel(case):
    """Losses are the mean of theirs; gradients of logits and teacher are theirs, divided by the number of regions."""
    options = {"distillation_loss": DistillationLoss(2.0), **REGION_CASES[case]}
    size = options.pop("size", (8, 8))
    torch.manual_seed(0)
    teacher, batch = RegionTeacher(3).double(), region_batches(1, size=size)[0]
    if case == "holes":
        batch["label"][torch.rand(batch["label"].shape) < 0.3] = 255
    logits = torch.randn(4, 3, *size, dtype=torch.float64)

    def step(teacher, channels, **more):
        teacher = SliceTeacher(teacher, slices=3) if len(size) == 3 else teacher
        leaf = logits[:, channels].clone().requires_grad_()
        distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), 0.1), gate="none", **options, **more)
        result = distiller.train()(batch["image"], leaf, batch["label"][:, channels], weight=0.7, iteration=4)
        result.loss.backward()
        return result, leaf.grad, [p.grad for p in teacher.parameters()]

    together, gradient, teacher_gradients = step(teacher, slice(None), overlapping=True)
    assert with_gradient(teacher) == {
        f"{conv}.{part}" for conv in ("image_conv", "prompt_conv") for part in ("weight", "bias")
    }
    alone = [step(region_of(teacher, lambda: RegionTeacher(1), c), slice(c, c + 1)) for c in range(3)]
    close = {"rtol": 1e-10, "atol": 1e-14}
    for term in ("distillation_loss", "sam_loss"):
        expected = torch.stack([getattr(result, term) for result, _, _ in alone]).mean()
        torch.testing.assert_close(getattr(together, term), expected, **close)
        assert expected > 0
    torch.testing.assert_close(gradient, torch.cat([each for _, each, _ in alone], dim=1) / 3, **close)
    for ours, *theirs in zip(teacher_gradients, *(gradients for _, _, gradients in alone)):
        torch.testing.assert_close(ours, torch.cat(theirs) / 3, **close)


def test_views_of_overlapping_regions_reach_student_and_teacher_apart(student, teacher):
    batch = region_batches(1)[0]
    distiller = distiller_of(teacher, overlapping=True)
    result = distiller(batch["image"], student(batch["image"]), batch["label"])
    result.distillation_loss.backward()
    assert with_gradient(student) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert with_gradient(teacher) == set()
    result.sam_loss.backward()
    assert with_gradient(teacher) == {name for name, _ in teacher.named_parameters()}


def test_regions_and_classes_are_not_taken_for_each_other(student, teacher):
    regions, classes = region_batches(1)[0], toy_batches(1)[0]
    with pytest.raises(
        ValueError, match="`label` must have shape .*, 3, 8, 8.* but has .*; load it with 0 and 1 for each"
    ):
        distiller_of(teacher, overlapping=True)(classes["image"], student(classes["image"]), classes["label"])
    with pytest.raises(ValueError, match="or set `overlapping` if regions may overlap"):
        distiller_of(teacher)(regions["image"], student(regions["image"]), regions["label"])


@pytest.mark.parametrize("fixed", [True, False])
def test_teacher_of_fixed_logits_teaches_its_own_kind_only(teacher, fixed):
    teacher.overlapping = fixed
    distiller_of(teacher, overlapping=fixed)
    with pytest.raises(ValueError, match=f"`overlapping` must be {fixed}, as in `teacher`, but is {not fixed}"):
        distiller_of(teacher, overlapping=not fixed)


def test_regions_do_not_draw_slices_by_the_entropy_of_a_softmax(teacher):
    slices = SliceTeacher(teacher, slices=2, sampling="entropy")
    with pytest.raises(ValueError, match="`sampling` 'uniform' for overlapping regions but has 'entropy'"):
        distiller_of(slices, overlapping=True)


def test_torchs_cross_entropy_teaches_sam(teacher, student):
    batch = toy_batches(1)[0]
    result = distiller_of(teacher, sam_loss=nn.CrossEntropyLoss())(
        batch["image"], student(batch["image"]), batch["label"]
    )
    logits = teacher(batch["image"], student(batch["image"])[:, 0])[:2]
    torch.testing.assert_close(result.sam_loss, nn.functional.cross_entropy(logits, batch["label"][:, 0].long()))


def test_convolutions_in_half_precision_beside_norms_in_float32_teach(student):
    teacher = ToyTeacher().bfloat16()
    teacher.norm = nn.GroupNorm(1, 3)
    image = torch.rand(4, 1, 8, 8)
    assert distiller_of(teacher)(image, student.float()(image)).distillation_loss > 0


class ListTeacher(ToyTeacher):
    def forward(self, image, prompt_logits):
        return [super().forward(image, prompt_logits)]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (nn.Conv2d(1, 3, 1), "must take an image and the student's logits .* wrap a network in `NetworkTeacher`"),
        (ListTeacher(), "`teacher` must return logits but returns a list"),
    ],
)
def test_network_that_is_no_teacher_is_one_clear_error(teacher, message, student):
    image = torch.rand(4, 1, 8, 8)
    with pytest.raises(TypeError, match=message):
        SAMDistiller(teacher, gate="none")(image, student.float()(image))
