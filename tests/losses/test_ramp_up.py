from __future__ import annotations

import math

import pytest

from knowsam_monai.losses import SigmoidRampUp
from knowsam_monai.losses.ramp_up import weight_at


@pytest.mark.parametrize("iteration", [0, 1, 17, 50, 99, 100])
def test_equals_the_formula_up_to_the_end(iteration):
    expected = 0.5 * math.exp(-5 * (1 - iteration / 100) ** 2)
    assert SigmoidRampUp(num_iterations=100, max=0.5)(iteration) == pytest.approx(expected, rel=1e-12)


def test_values_checked_by_hand():
    ramp_up = SigmoidRampUp(num_iterations=10)
    assert ramp_up(0) == pytest.approx(math.exp(-5))
    assert ramp_up(5) == pytest.approx(math.exp(-1.25))
    assert ramp_up(10) == 1.0


def test_stays_at_the_maximum_after_the_end():
    ramp_up = SigmoidRampUp(num_iterations=10, max=0.1)
    assert ramp_up(11) == ramp_up(10_000) == 0.1


def test_is_zero_before_the_start_and_on_the_same_curve_from_there():
    late, early = SigmoidRampUp(num_iterations=100, start=20), SigmoidRampUp(num_iterations=100)
    assert [late(t) for t in (0, 19)] == [0.0, 0.0]
    assert [late(t) for t in (20, 60, 100)] == [early(t) for t in (20, 60, 100)]


def test_never_falls():
    values = [SigmoidRampUp(num_iterations=30, start=5)(t) for t in range(50)]
    assert values == sorted(values) and values[0] < values[-1]


@pytest.mark.parametrize("num_iterations", [0, -5])
def test_no_iterations_are_an_error(num_iterations):
    with pytest.raises(ValueError, match=f"`num_iterations` must be positive but is {num_iterations}"):
        SigmoidRampUp(num_iterations)


@pytest.mark.parametrize("max", [-1.0, float("inf")])
def test_maximum_that_is_negative_or_infinite_is_an_error(max):
    with pytest.raises(ValueError, match="`max` must be 0 or more"):
        SigmoidRampUp(3, max=max)


def test_weight_is_zero_before_the_start_and_where_it_is_negative_by_rounding():
    assert [weight_at(0.5, iteration, start=3) for iteration in (2, 3)] == [0.0, 0.5]
    assert weight_at(lambda iteration: -1e-9, 3) == 0.0


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_function_that_returns_no_weight_is_an_error_that_names_the_iteration(value):
    with pytest.raises(ValueError, match=f"`weight` must be 0 or more but is {value} at iteration 7; correct the func"):
        weight_at(lambda iteration: value, 7)
