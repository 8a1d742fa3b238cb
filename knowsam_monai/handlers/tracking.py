from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.handlers import MLFlowHandler

from knowsam_monai.handlers.loss_terms import scalar_terms


def track_terms(handlers: Sequence[Any], log_interval: int = 50) -> list[Any]:
    """
    Let MLflow log every term of the loss by name, where ``--tracking mlflow`` has put its handler into a list.

    The handler that MONAI adds reads the loss of a decollated output. A semi-supervised trainer does not decollate,
    since unlabelled rows have no label, and the handler would end the run with a TypeError.

    Args:
        handlers: of a trainer; those that are not MLflow's pass as they are.
        log_interval: iterations between two logs.

    Example::

        SupervisedTrainer(..., decollate=False, train_handlers=track_terms([MLFlowHandler(), *others]))
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            handler.output_transform = scalar_terms
            handler.iteration_log = lambda engine, iteration: iteration % log_interval == 0
    return list(handlers)
