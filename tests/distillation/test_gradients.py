from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.distillation.gradients import SAMGradients, output_gradients


def added(gradients, *amounts):
    """A parameter of one value to which each (owner, gradient) was added in turn."""
    parameter = nn.Parameter(torch.zeros(1))
    for owner, amount in amounts:
        gradients.add(owner, parameter, torch.tensor([float(amount)]))
    return parameter


FIRST, SECOND = object(), object()


def test_gradients_of_all_owners_are_added_up_and_each_owner_takes_back_its_own():
    gradients = SAMGradients()
    parameter = added(gradients, (FIRST, 1), (SECOND, 2), (FIRST, 4), (SECOND, 8))
    assert parameter.grad == 15
    gradients.withdraw(FIRST)
    assert parameter.grad == 10
    gradients.withdraw(FIRST)
    assert parameter.grad == 10
    gradients.withdraw(SECOND)
    assert parameter.grad is None  # and not 0, with which an optimizer would step


def test_only_owner_takes_back_all_it_added():
    gradients = SAMGradients()
    parameter = added(gradients, (FIRST, 1), (FIRST, 2))
    assert parameter.grad == 3
    gradients.withdraw(FIRST)
    assert parameter.grad is None


def test_what_was_added_before_a_step_or_a_zero_grad_is_not_taken_back():
    gradients = SAMGradients()
    parameter = added(gradients, (FIRST, 1), (SECOND, 2))
    gradients.settle(FIRST)
    gradients.withdraw(FIRST)
    assert parameter.grad == 3
    parameter.grad = None
    gradients.add(FIRST, parameter, torch.tensor([4.0]))
    gradients.withdraw(SECOND)
    assert parameter.grad == 4
    parameter.grad = None
    gradients.withdraw(FIRST)
    assert parameter.grad is None


def pairs_of(logits_of, output, gradient):
    logits = logits_of(output)
    given = None if gradient is None else torch.full_like(logits, gradient)
    found = output_gradients(logits_of, output, logits, given)
    return [(source, None if part is None else part.flatten().tolist()) for source, part in found]


def test_each_output_gets_the_gradient_by_the_chain_rule():
    first, second = torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True) * 1
    pairs = pairs_of(lambda output: 2 * output[0] - 3 * output["b"] + output[0], {0: first, "b": second}, 10.0)
    assert pairs[0][0] is first and pairs[1][0] is second
    assert [part for _, part in pairs] == [[30.0, 30.0], [-30.0, -30.0]]
    pairs = pairs_of(lambda output: output[0] + output[1], (first, second), None)
    assert [part for _, part in pairs] == [None, None]


def test_output_that_is_given_twice_is_one_source_with_both_gradients():
    tensor = torch.ones(2, requires_grad=True) * 1
    ((source, part),) = pairs_of(lambda output: output[0] + 2 * output[1], (tensor, tensor), 1.0)
    assert source is tensor and part == [3.0, 3.0]


def test_outputs_that_the_logits_do_not_need_or_that_are_constant_are_no_sources():
    tensor, other = torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True) * 1
    constant = torch.full((2,), 5.0)
    ((source, part),) = pairs_of(lambda output: output[0] * output[2], (tensor, other, constant), 1.0)
    assert source is tensor and part == [5.0, 5.0]


@pytest.mark.parametrize("gradient", [1.0, None])
def test_logits_that_are_kept_beside_the_output_are_their_own_source(gradient):
    kept = torch.ones(2, requires_grad=True) * 1
    ((source, part),) = pairs_of(lambda output: kept, {"loss": torch.zeros(1)}, gradient)
    assert source is kept and part == (None if gradient is None else [1.0, 1.0])
