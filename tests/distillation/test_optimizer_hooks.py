from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.distillation.optimizer_hooks import ScalerCheck, follow
from tests.processes import finish, start_ranks
from tests.toys import ToyTeacher, distiller_of, toy_batches


@pytest.mark.parametrize("accumulation", [1, 2])
def test_following_teacher_steps_exactly_when_the_student_steps(student, teacher, accumulation):
    distiller = distiller_of(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    handle = distiller.follow(optimizer)
    reference = copy.deepcopy(teacher)
    reference_optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    reference_distiller = SAMDistiller(reference, reference_optimizer, taught_views=(1, 2), gate="none").train()
    for i, batch in enumerate(toy_batches(4)):
        if i % accumulation == 0:
            optimizer.zero_grad()
            reference_optimizer.zero_grad()
        logits = student(batch["image"])
        distiller(batch["image"], logits, batch["label"]).loss.backward()
        reference_distiller(batch["image"], logits.detach(), batch["label"]).sam_loss.backward()
        if (i + 1) % accumulation == 0:
            reference_optimizer.step()
            optimizer.step()
        for ours, expected in zip(teacher.parameters(), reference.parameters()):
            assert torch.equal(ours, expected)
    handle.remove()
    assert "zero_grad" not in vars(optimizer) and not optimizer._optimizer_step_post_hooks


def test_gradients_of_a_skipped_step_do_not_reach_the_teachers_next_one(student, teacher):
    distiller = distiller_of(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.follow(optimizer)
    batches = toy_batches(2)
    distiller(batches[0]["image"], student(batches[0]["image"]), batches[0]["label"]).loss.backward()
    optimizer.zero_grad()  # the host skips its step
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_of_a_step_do_not_reach_the_next_one_of_a_host_that_clears_only_its_student():
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    follow(torch.optim.SGD(teacher.parameters(), lr=1.0), optimizer)
    nn.init.zeros_(teacher.weight)
    for steps in (1, 2):
        student.zero_grad()
        teacher(torch.ones(1, 1)).sum().backward()  # a gradient of 1
        optimizer.step()
        assert teacher.weight.item() == -steps and teacher.weight.grad is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("student_alone", [False, True])
def test_scaler_that_overflows_skips_the_teachers_step_too(student, teacher, fused, student_alone):
    student, teacher = student.float(), teacher.float()
    distiller = distiller_of(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=fused)  # a fused one skips inside its step
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    distiller.follow(optimizer, scaler)
    before = copy.deepcopy(teacher.state_dict())
    steps = []
    for i, batch in enumerate(toy_batches(3)):
        image, label = batch["image"].float(), batch["label"].float()
        optimizer.zero_grad()
        logits = student(image)
        loss = distiller(image, logits, label).loss
        if i == 1:
            loss = loss + float("inf") * logits.sum() if student_alone else float("inf") * loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(not all(torch.equal(before[k], v) for k, v in teacher.state_dict().items()))
        before = copy.deepcopy(teacher.state_dict())
    assert steps == [True, False, True]
    assert all(torch.isfinite(p).all() for p in teacher.parameters())


def test_teacher_of_two_students_cannot_step_twice_before_the_scaler_is_updated(teacher):
    students, scaler = [nn.Conv2d(1, 3, 3).double() for _ in range(2)], torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1) for student in students]
    teacher_optimizer = torch.optim.Adam(teacher.parameters())
    for optimizer in optimizers:
        follow(teacher_optimizer, optimizer, scaler)

    def backward_and_step(student, optimizer):
        losses = [
            network(torch.ones(1, 1, 4, 4, dtype=torch.float64)).sum() for network in (student, teacher.image_conv)
        ]
        scaler.scale(sum(losses)).backward()
        scaler.step(optimizer)

    backward_and_step(students[0], optimizers[0])
    scaler.update()
    backward_and_step(students[1], optimizers[1])
    with pytest.raises(RuntimeError, match="`scaler` must be updated between two steps of students with the same"):
        backward_and_step(students[0], optimizers[0])


def test_two_teachers_of_one_optimizer_leave_it_one_by_one(student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller, other = distiller_of(teacher), distiller_of(copy.deepcopy(teacher))
    for removed_first in (0, 1):
        handles = [d.follow(optimizer) for d in (distiller, other)]
        handles[removed_first].remove()
        parameter = (other if removed_first == 0 else distiller).optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        optimizer.zero_grad()
        assert parameter.grad is None  # the remaining one still clears its teacher
        handles[1 - removed_first].remove()
        assert not optimizer._optimizer_step_post_hooks and "zero_grad" not in vars(optimizer)


def test_zero_grad_clears_all_teachers(student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teachers = [teacher, copy.deepcopy(teacher)]
    for each in teachers:
        follow(torch.optim.SGD(each.parameters(), lr=0.1), optimizer)
        each.image_conv.bias.grad = torch.ones(3).double()
    optimizer.zero_grad()
    assert all(each.image_conv.bias.grad is None for each in teachers)


def test_host_that_wraps_zero_grad_afterwards_is_rid_of_the_teacher_too(student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = distiller_of(teacher)
    handle = distiller.follow(optimizer)
    ours, calls = optimizer.zero_grad, []
    optimizer.zero_grad = lambda *args, **kwargs: (calls.append("host"), ours(*args, **kwargs))
    handle.remove()
    for parameter in (*student.parameters(), *teacher.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.zero_grad()
    assert calls == ["host"] and all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in teacher.parameters())


def test_host_s_own_zero_grad_is_put_back(student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    calls = []
    own = optimizer.zero_grad = lambda **kwargs: calls.append(kwargs)
    distiller = distiller_of(teacher)
    handle = distiller.follow(optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert calls == [{"set_to_none": False}] and optimizer.zero_grad is not own
    handle.remove()
    handle.remove()
    assert optimizer.zero_grad is own


def test_follow_without_a_teacher_optimizer_is_an_error(student, teacher):
    with pytest.raises(RuntimeError, match="SAMDistiller has no optimizer; pass the teacher's"):
        SAMDistiller(teacher).follow(torch.optim.SGD(student.parameters(), lr=0.1))


def test_scaler_that_was_not_passed_is_an_error_of_the_backward_pass(student, teacher):
    """However the host would clip its gradients afterwards."""
    student, teacher = student.float(), teacher.float()
    distiller = distiller_of(teacher)
    distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    image, label = (toy_batches(1)[0][key].float() for key in ("image", "label"))
    loss = scaler.scale(distiller(image, student(image), label).loss)
    with pytest.raises(
        RuntimeError, match="`scaler` must be the GradScaler that steps the student's .* is None; pass it to `follow`"
    ):
        loss.backward()


def test_teacher_steps_after_a_step_that_the_host_left_out_because_its_loss_was_not_finite(student, teacher, caplog):
    student, teacher = student.float(), teacher.float()
    distiller = distiller_of(teacher)
    optimizer, scaler = torch.optim.SGD(student.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    distiller.follow(optimizer, scaler)
    image, label = (toy_batches(1)[0][key].float() for key in ("image", "label"))
    for scale in (torch.inf, 1.0):
        before = copy.deepcopy(teacher.state_dict())
        loss = distiller(scale * image, student(scale * image), label).loss
        if not torch.isfinite(loss):
            continue
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not caplog.messages


@pytest.mark.parametrize("host", ["weights its loss", "has a scaler for one of two students", "steps SAM itself"])
def test_hosts_whose_losses_have_a_factor_of_their_own(student, teacher, host):
    distiller = distiller_of(teacher)
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu")
    if host.startswith("has"):
        distiller.follow(optimizers[0], scaler)
    handle = distiller.follow(optimizers[1])
    if host.startswith("steps"):
        handle.remove()
    image, label = (toy_batches(1)[0][key] for key in ("image", "label"))
    loss = distiller(image, student(image), label).loss
    (256 * loss if host.startswith("weights") else scaler.scale(loss)).backward()


@pytest.mark.parametrize("backwards", [1, 3])  # 3 times a gradient is no power of two of the first
@pytest.mark.parametrize("fused", [False, True])
def test_scaler_that_was_not_passed_is_an_error_without_a_distiller_too(student, teacher, fused, backwards):
    student.float().register_parameter("unused", nn.Parameter(torch.zeros(())))  # the smallest one
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=fused)
    follow(torch.optim.SGD(teacher.parameters(), lr=0.1), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(backwards):
        scaler.scale(student(toy_batches(1)[0]["image"].float()).square().mean()).backward()
    with pytest.raises(RuntimeError, match="`scaler` must be the GradScaler that steps the student's .* is None"):
        scaler.step(optimizer)


@pytest.mark.parametrize("host", ["clips", "accumulates", "halves", "gives a disabled scaler"])
def test_gradients_that_the_host_changes_itself_are_no_scaler(student, teacher, host):
    distiller = distiller_of(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.follow(optimizer, torch.amp.GradScaler(enabled=False) if host.startswith("gives") else None)
    factors = {"accumulates": 1 / 100, "halves": 1 / 64, "gives a disabled scaler": 1 / 1024}
    for batch in toy_batches(3):
        optimizer.zero_grad()
        distiller(batch["image"], student(batch["image"]), batch["label"]).loss.backward()
        for parameter in student.parameters():
            parameter.grad *= factors.get(host, 1.0)
        if host == "clips":
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1e-4)
        optimizer.step()
    assert all(parameter._post_accumulate_grad_hooks in (None, {}) for parameter in student.parameters())


def checked_parameter(init_scale=2.0**8):
    """A parameter of two values whose optimizer's steps are checked, the optimizer, and a scaler."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    ScalerCheck(optimizer)
    return parameter, optimizer, torch.amp.GradScaler("cpu", init_scale=init_scale)


@pytest.mark.parametrize("scale", [64, 128])
def test_scales_of_128_and_more_are_found_in_a_gradient_that_is_zero_in_places(scale):
    parameter, optimizer, scaler = checked_parameter(float(scale))
    scaler.scale((parameter * torch.tensor([0.0, 3.0])).sum()).backward()
    if scale < 128:
        scaler.step(optimizer)
    else:
        with pytest.raises(RuntimeError, match="`scaler` must be the GradScaler that steps"):
            scaler.step(optimizer)


@pytest.mark.parametrize("first_step", ["without a gradient", "with a gradient of zeros"])
def test_scaler_is_found_in_the_first_step_that_can_show_it(first_step):
    parameter, optimizer, scaler = checked_parameter()
    if first_step.endswith("zeros"):
        scaler.scale(0 * parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match="`scaler` must be the GradScaler that steps"):
        scaler.step(optimizer)


def test_host_that_divides_each_value_of_a_gradient_by_its_own_power_of_two_has_no_scaler():
    parameter, optimizer, _ = checked_parameter()
    parameter.sum().backward()
    parameter.grad.div_(torch.tensor([2.0**8, 2.0**9]))
    optimizer.step()


def test_frozen_parameter_of_the_student_is_let_be(student, teacher):
    student.first.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    follow(torch.optim.SGD(teacher.parameters(), lr=0.1), optimizer)
    student.second.bias.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler(enabled=False)])
def test_gradients_are_not_looked_at_without_a_scaler_that_scales(scaler, student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    asked = []
    follow(torch.optim.SGD(teacher.parameters(), lr=0.1), optimizer, scaler, is_broken=asked.append)
    teacher.image_conv.bias.grad = torch.ones(3).double()
    optimizer.step()
    assert asked == [] and teacher.image_conv.bias.grad is None


def test_error_of_the_teachers_own_step_stays_as_it_is(student, teacher):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("of the optimizer itself")

    optimizer = torch.optim.SGD(student.float().parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    follow(Failing(teacher.float().parameters(), lr=0.1), optimizer, scaler)
    scaler.scale(student.first.bias.sum() + teacher.image_conv.bias.sum()).backward()
    with pytest.raises(RuntimeError, match="^of the optimizer itself$"):
        scaler.step(optimizer)


def step_with_gradients_of_one_rank(folder):
    """Rank 1 has no gradient of the first two parameters, no rank one of the fourth, and the last one is frozen."""
    rank = torch.distributed.get_rank()
    shapes = [(2, 3, 4, 4), (5,), (3, 2), (1,), (7,)]
    dtypes = [torch.float32, torch.bfloat16, *[torch.float32] * 3]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes)]
    parameters[0].data = parameters[0].data.to(memory_format=torch.channels_last)
    parameters[4].requires_grad_(False)
    teacher_optimizer = torch.optim.SGD(parameters, lr=1.0)
    student = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    follow(teacher_optimizer, optimizer)
    for index in (0, 1, 2) if rank == 0 else (2,):
        values = torch.arange(parameters[index].numel(), dtype=torch.float32) + 10 * rank
        parameters[index].grad = torch.empty_like(parameters[index]).copy_(values.view(shapes[index]))
    calls = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor):
        calls.append((tensor.dtype, tensor.numel()))
        all_reduce(tensor)

    torch.distributed.all_reduce = counted
    optimizer.step()
    optimizer.step()  # as at steps without the teacher
    torch.distributed.all_reduce = all_reduce
    torch.save({"parameters": parameters, "calls": calls}, f"{folder}/rank{rank}.pt")


def test_ranks_step_with_the_mean_gradient_and_exchange_only_what_some_rank_has(tmp_path):
    processes = start_ranks(tmp_path, 2, step_with_gradients_of_one_rank, str(tmp_path))
    first, second, third = (-torch.arange(count, dtype=torch.float32) for count in (96, 5, 6))
    for rank, process in enumerate(processes):
        log = tmp_path / f"rank{rank}.log"
        assert finish(process, log) == 0, log.read_text()
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        flags = (torch.int32, 4)
        assert found["calls"] == [flags, (torch.float32, 96 + 6), (torch.bfloat16, 5), flags]
        stepped = [parameter.detach() for parameter in found["parameters"]]
        assert torch.equal(stepped[0], first.view(2, 3, 4, 4) / 2)
        assert torch.equal(stepped[1], (second / 2).bfloat16())
        assert torch.equal(stepped[2], third.view(3, 2) - 5)
        assert torch.equal(stepped[3], torch.zeros(1)) and found["parameters"][3].grad is None


def test_parameters_added_later_are_stepped_too():
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    teacher_optimizer = torch.optim.SGD([teacher.weight], lr=0.1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    handle = follow(teacher_optimizer, optimizer)
    teacher_optimizer.add_param_group({"params": [teacher.bias]})
    before = teacher.bias.detach().clone()
    teacher.bias.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(teacher.bias.detach(), before - 0.1)
    handle.remove()


def test_wrapped_optimizer_of_the_teacher_steps():
    """As Accelerate's, after `prepare`."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

    teacher = ToyTeacher()
    inner = torch.optim.SGD(teacher.parameters(), lr=0.1)
    distiller = SAMDistiller(teacher, Wrapper(inner))
    assert distiller.optimizer is inner and distiller.learns
