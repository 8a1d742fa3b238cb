"""Weights of loss terms: constants, functions of the iteration, and the sigmoid-shaped ramp-up."""

from __future__ import annotations

import math
from collections.abc import Callable

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError

Weight = float | Callable[[int], float]


def weight_at(weight: Weight, iteration: int, start: int = 0) -> float:
    """The weight of a loss term at an iteration, 0 before its start.

    Args:
        weight: a number, or a function of the iteration such as :class:`SigmoidRampUp`.
        iteration: counted from 1.
        start: first iteration with the term.

    Raises:
        ValueError: if the function returns something other than a finite number, 0 or more.

    Example::

        >>> weight_at(0.5, iteration=3), weight_at(lambda iteration: iteration / 10, iteration=3)
        (0.5, 0.3)
    """
    if iteration < start:
        return 0.0
    if not callable(weight):
        return weight
    value = weight(iteration)
    value = 0.0 if -1e-6 < value < 0 else value  # rounded, such as at the end of a cosine
    if not 0 <= value < math.inf:
        raise KnowSAMValueError(
            f"`weight` must be 0 or more but is {value} at iteration {iteration}; correct the function that returns it."
        )
    return value


def check_weights(**weights: Weight) -> None:
    """Raise a ValueError if a weight is a negative or infinite number.

    Args:
        weights: the arguments by name; functions are not called.

    Example::

        >>> check_weights(weight=0.1, mutual_weight=SigmoidRampUp(100))
    """
    for name, weight in weights.items():
        if not callable(weight) and not 0 <= weight < math.inf:
            raise KnowSAMValueError(f"`{name}` must be 0 or more, or a function of the iteration, but is {weight}.")


class SigmoidRampUp:
    """A weight that grows from almost 0 to its maximum.

    ``weight(t) = max * exp(-5 (1 - t / num_iterations)^2)`` up to ``num_iterations``, then ``max``; 0 before iteration
    ``start``. It depends on the iteration alone, so there is nothing to save or restore.

    Args:
        num_iterations: the iteration at which the weight reaches its maximum; the length of the run for lambda_m of
            eq. 14.
        max: the largest weight.
        start: first iteration with a weight, counted from 1; 0 and 1 both mean from the beginning. `start` does not
            shift the curve.

    Raises:
        ValueError: if ``num_iterations`` is not positive, or ``max`` is negative or infinite.

    Example::

        >>> ramp_up = SigmoidRampUp(num_iterations=100, max=0.1)
        >>> [round(ramp_up(t), 4) for t in (0, 50, 100, 200)]
        [0.0007, 0.0287, 0.1, 0.1]

    Reference:
        Laine and Aila, "Temporal Ensembling", ICLR 2017, arXiv:1610.02242; Huang et al., arXiv:2412.13742, eq. 14.
    """

    @check_types
    def __init__(self, num_iterations: int, max: float = 1.0, start: int = 0) -> None:
        if num_iterations <= 0:
            raise KnowSAMValueError(
                f"`num_iterations` must be positive but is {num_iterations}; for a constant weight use a number."
            )
        check_weights(max=max)
        self.num_iterations = num_iterations
        self.max = max
        self.start = start

    def __call__(self, iteration: int) -> float:
        if iteration < self.start:
            return 0.0
        remaining = 1.0 - min(iteration / self.num_iterations, 1.0)
        return self.max * math.exp(-5.0 * remaining**2)
