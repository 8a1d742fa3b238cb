"""Gradient clipping, for students without normalization."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.wrappers import plain_optimizer, stepped_parameters


class GradientClipping:
    """
    Scale down the gradients of a step if their norm is above a limit.

    One step with large gradients can ruin a network without normalization, such as the V-Net of KnowSAM's student. The
    norm is taken over all parameters of the trainer's optimizer together, with a `GradScaler` after unscaling.

    Reference: Pascanu et al., ICML 2013, arXiv:1211.5063, algorithm 1.

    Args:
        max_norm: the Euclidean norm above which gradients are scaled down.

    Raises:
        ValueError: if `max_norm` is not positive.

    Example::

        SupervisedTrainer(..., train_handlers=[GradientClipping(max_norm=10)])
    """

    @check_types
    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise KnowSAMValueError(
                f"`max_norm` must be positive but is {max_norm}; to clip nothing, leave out GradientClipping."
            )
        self.max_norm = max_norm
        self._handle: Any = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer that has ``optimizer``."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Clip from now on, before each step."""
        self.completed(engine)
        self._handle = plain_optimizer(engine.optimizer).register_step_pre_hook(self._clip)

    def completed(self, engine: Engine) -> None:
        """Leave the trainer's optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _clip(self, optimizer: Optimizer, *_: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer removes the scale itself, during the step
        clip_grad_norm_(stepped_parameters(optimizer), self.max_norm if scale is None else self.max_norm * scale)
