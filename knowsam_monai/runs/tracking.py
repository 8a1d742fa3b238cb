from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.handlers import MLFlowHandler, StatsHandler, TensorBoardStatsHandler

from knowsam_monai.handlers.loss_terms import scalar_terms


def track_terms(handlers: Sequence[Any], log_interval: int = 50) -> list[Any]:
    """
    Let MONAI's logging handlers log every term of the loss by name: on the screen, in TensorBoard, in MLflow.

    They read the loss of a decollated output, MLflow's where ``--tracking mlflow`` puts it into a list, the others as a
    bundle of the Model Zoo writes them. A semi-supervised trainer does not decollate, since unlabelled rows have no
    label: MLflow's would end the run with a TypeError, the others log nothing.

    Args:
        handlers: of a trainer; all others pass as they are.
        log_interval: iterations between two logs of MLflow's.

    Example::

        SupervisedTrainer(..., decollate=False, train_handlers=track_terms([MLFlowHandler(), *others]))
    """
    for handler in handlers:
        if isinstance(handler, (MLFlowHandler, StatsHandler, TensorBoardStatsHandler)):
            handler.output_transform = scalar_terms
        if isinstance(handler, MLFlowHandler):
            handler.iteration_log = lambda engine, iteration: iteration % log_interval == 0
    return list(handlers)
