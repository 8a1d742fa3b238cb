from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from knowsam_monai.wrappers import plain_network, plain_optimizer
from tests.attached import build, host


class Wrapped(torch.optim.Optimizer):
    """Like Accelerate's: a subclass that never calls its base class."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile, lambda n: DataParallel(torch.compile(DataParallel(n)))])
def test_network_is_taken_out_of_whatever_is_around_it(wrap):
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert plain_network(wrap(network)) is network


def test_teacher_follows_the_optimizer_inside_of_a_wrapper():
    trained = []
    for wrap in (lambda optimizer: optimizer, Wrapped, lambda optimizer: Wrapped(Wrapped(optimizer))):
        student, optimizer, distiller, batches = build()
        optimizer = wrap(optimizer)
        skd = distiller.attach(student, optimizer)
        host(student, optimizer, skd.watch(batches))
        skd.remove()
        assert "zero_grad" not in vars(plain_optimizer(optimizer))
        trained.append([*student.parameters(), *distiller.teacher.parameters()])
    assert all(torch.equal(a, b) for other in trained[1:] for a, b in zip(trained[0], other, strict=True))


class SharedHooks(Wrapped):
    """Like Lightning's: the wrapper has the attributes of the optimizer."""

    def __init__(self, optimizer):
        self.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
        self.optimizer = optimizer


def test_optimizer_built_on_another_is_taken_as_it_is():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    outer = torch.optim.SGD(inner.param_groups[0]["params"], lr=0.1)
    outer.optimizer = inner
    assert plain_optimizer(outer) is outer and plain_optimizer(SharedHooks(inner)) is inner


@pytest.mark.parametrize("optimizer", [object(), Wrapped(None)])
def test_what_has_no_optimizer_inside_is_an_error(optimizer):
    student, _, distiller, _ = build()
    with pytest.raises(TypeError, match="`optimizer` must be a torch.optim.Optimizer but is a (object|Wrapped); pass"):
        distiller.attach(student, optimizer)
    with pytest.raises(TypeError, match="`optimizer` must be a torch.optim.Optimizer"):
        distiller.follow(optimizer)
