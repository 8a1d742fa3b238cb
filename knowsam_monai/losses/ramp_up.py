"""The sigmoid-shaped ramp-up of a loss weight."""

from __future__ import annotations

import math

from knowsam_monai.errors import KnowSAMValueError


class SigmoidRampUp:
    """Weight that grows from almost nothing to its maximum, a function of the iteration alone.

    ``weight(t) = max * exp(-5 (1 - t / num_iterations)^2)`` up to ``num_iterations``, ``max`` from there on, and 0
    before iteration ``start``. There is nothing to save or restore.

    Args:
        num_iterations: the iteration at which the maximum is reached; the run's length gives eq. 12's lambda_m.
        max: the largest weight.
        start: first iteration with a weight, counted from 1; 0 and 1 both mean from the beginning. The curve is the
            same whatever it is.

    Raises:
        ValueError: when ``num_iterations`` is not positive.

    Example::

        >>> ramp_up = SigmoidRampUp(num_iterations=100, max=0.1)
        >>> [round(ramp_up(t), 4) for t in (0, 50, 100, 200)]
        [0.0007, 0.0287, 0.1, 0.1]

    Reference:
        Laine and Aila, "Temporal Ensembling", ICLR 2017, arXiv:1610.02242; Huang et al., arXiv:2412.13742, eq. 12.
    """

    def __init__(self, num_iterations: int, max: float = 1.0, start: int = 0) -> None:
        if num_iterations <= 0:
            raise KnowSAMValueError(
                f"`num_iterations` must be positive but is {num_iterations}. For a constant weight use a number."
            )
        self.num_iterations = num_iterations
        self.max = max
        self.start = start

    def __call__(self, iteration: int) -> float:
        if iteration < self.start:
            return 0.0
        remaining = 1.0 - min(iteration / self.num_iterations, 1.0)
        return self.max * math.exp(-5.0 * remaining**2)
