from __future__ import annotations

from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.utils import CommonKeys as Keys


class StudentCurves:
    """
    Two more curves beside the terms of the loss: the student's own supervised loss, and its learning rate.

    They are `supervised_loss` and `learning_rate` in ``engine.state.output``.

    Example::

        SupervisedTrainer(..., train_handlers=[StudentCurves(), *methods, TensorBoardStatsHandler(...)])
    """

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer, before the handlers that add terms to its loss."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output[Keys.LOSS].detach()
        engine.state.output["supervised_loss"] = loss
        engine.state.output["learning_rate"] = loss.new_full((), engine.optimizer.param_groups[0]["lr"])
