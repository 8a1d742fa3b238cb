"""The handlers of a bundle's run: the method's own, MONAI's, and those that log, save, resume and check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.handlers import (
    CheckpointSaver,
    LrScheduleHandler,
    MLFlowHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
)
from monai.utils import CommonKeys as Keys

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.handlers.loss_terms import LossTerms, scalar_terms
from knowsam_monai.runs.checkpoint_saver import WholeCheckpointSaver
from knowsam_monai.runs.last_iteration import LastIteration
from knowsam_monai.runs.preflight import Preflight
from knowsam_monai.runs.resume import Resume
from knowsam_monai.runs.run_record import RunRecord
from knowsam_monai.runs.training_progress import TrainingProgress
from knowsam_monai.runs.validation_history import ValidationHistory


def training_handlers(
    methods: Sequence[Any],
    handlers: Sequence[Any],
    state: Mapping[str, Any],
    evaluator: Engine,
    best_saver: CheckpointSaver,
    output_dir: str | os.PathLike,
    max_iterations: int,
    num_rows: tuple[int, int],
    data: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    log_interval: int = 10,
    seed: int | None = None,
    resume: bool = True,
    preflight: bool = False,
) -> list[Any]:
    """
    All handlers of a trainer, in the order in which they must run.

    1. ``StudentCurves`` reads the student's own loss, `methods` add their terms to it, then the learning rates step.
    2. :class:`~knowsam_monai.handlers.LossTerms` stops the run before any checkpoint if a term is not finite.
    3. The first process alone shows progress, writes TensorBoard and saves the last weights.
    4. `handlers`, with the validation.
    5. :class:`Resume` saves or restores all of this, :class:`RunRecord` notes a start that it accepted,
       :class:`Preflight` tries that start, and :class:`LastIteration` ends the run.

    Args:
        methods: handlers that add terms to the loss; None is skipped.
        handlers: MONAI's and the user's own, including the ``ValidationHandler``.
        state: everything that a resumed run needs, by name: ``network``, ``optimizer``, ``lr_scheduler``,
            ``distiller``, ``sam_optimizer``, ``sam_lr_scheduler``, ``ema_student`` and anything else with a
            ``state_dict``; None is skipped.
        evaluator: the validation engine.
        best_saver: saver of the best weights; see :class:`Resume`.
        output_dir: folder of the run.
        max_iterations: iterations of the run.
        num_rows: numbers of labeled and unlabeled rows.
        data: the result of :func:`check_data`, compared when a run resumes.
        log_interval: iterations between two readings of the loss terms.
        seed: seed of the run, recorded.
        resume: whether to continue from the newest checkpoint.
        preflight: report what the run would do, write nothing, and stop.

    Raises:
        ValueError: if a ``ValidationHandler`` of `evaluator` is not at the level of epochs.

    Example::

        handlers = training_handlers(
            [MeanTeacher(ema_student)], [ValidationHandler(1, evaluator)], {"network": network, "optimizer": optimizer},
            evaluator, best_saver, output_dir="output", max_iterations=1000, num_rows=(100, 1000),
        )
        trainer = SupervisedTrainer(..., train_handlers=handlers)
    """
    for number, handler in enumerate(handlers):
        validates = isinstance(handler, ValidationHandler) and handler.validator is evaluator
        if validates and not handler.epoch_level:
            raise KnowSAMValueError(
                f"`train#handlers#{number}#epoch_level` must be True, since results.csv has one validation an epoch, "
                "but is False; to validate every n iterations, set `epoch_length` to n."
            )
    is_first, network, distiller = ranks.rank() == 0, state["network"], state.get("distiller")
    built = [StudentCurves(), *(method for method in methods if method is not None)]
    for name in ("lr_scheduler", "sam_lr_scheduler"):
        if state.get(name) is not None:
            built.append(LrScheduleHandler(state[name], print_lr=False, epoch_level=False))
    built.append(LossTerms(log_interval=log_interval))
    if is_first:
        built.append(TrainingProgress(evaluator, interval=log_interval))
    if is_first and not preflight:
        log_dir = os.path.join(output_dir, "tensorboard", "train")
        last = {"save_dict": {"model": network}, "file_prefix": "last", "save_interval": 1, "n_saved": 1}
        built += [
            TensorBoardStatsHandler(log_dir=log_dir, iteration_log=log_interval),
            WholeCheckpointSaver(save_dir=str(output_dir), **last),
        ]
    saver = best_saver if is_first else None
    built += [
        *handlers,
        Resume(state, output_dir, evaluator, saver, data, enabled=resume, save=not preflight),
        *([] if preflight else [RunRecord(output_dir, seed, resume, getattr(distiller, "teacher", None), data)]),
        Preflight(network, state["optimizer"], distiller, num_rows, preflight, state.get("ema_student")),
        LastIteration(max_iterations),
    ]
    return track_terms(built, log_interval)


def validation_handlers(
    report: Any,
    best_saver: CheckpointSaver,
    handlers: Sequence[Any],
    output_dir: str | os.PathLike,
    class_names: Sequence[str],
    preflight: bool = False,
) -> list[Any]:
    """
    All handlers of an evaluator: the report, `handlers`, the history of Dice, the best weights and TensorBoard.

    The first process alone saves weights and writes TensorBoard.

    Args:
        report: the run's :class:`ValidationReport`.
        best_saver: saver of the best weights.
        handlers: the user's own, including :class:`knowsam_monai.handlers.TeacherValidation`.
        output_dir: folder of the run.
        class_names: names of classes 1, 2, ... (no background).
        preflight: do not write TensorBoard.

    Example::

        handlers = validation_handlers(report, best_saver, [], "output", ["RV", "myocardium", "LV"])
        evaluator = SupervisedEvaluator(..., val_handlers=handlers)
    """
    history = ValidationHistory(output_dir, class_names)
    built = [report, *handlers, history]
    if ranks.rank() == 0:
        built.append(best_saver)
        if not preflight:
            log_dir = os.path.join(output_dir, "tensorboard", "validation")
            writer = history.write_scalars
            built.append(TensorBoardStatsHandler(log_dir=log_dir, iteration_log=False, epoch_event_writer=writer))
    return built


def track_terms(handlers: Sequence[Any], log_interval: int = 50) -> list[Any]:
    """
    Make MONAI's logging handlers log every term of the loss by name: on screen, in TensorBoard and in MLflow.

    By default these handlers read the loss from a decollated output. A semi-supervised trainer does not decollate,
    because unlabeled rows have no label: ``MLFlowHandler`` would end the run with a TypeError, and the others would log
    nothing.

    Args:
        handlers: a trainer's handlers; those of other kinds are returned unchanged.
        log_interval: iterations between two entries in MLflow.

    Example::

        SupervisedTrainer(..., decollate=False, train_handlers=track_terms([MLFlowHandler(), *others]))
    """
    for handler in handlers:
        if isinstance(handler, (MLFlowHandler, StatsHandler, TensorBoardStatsHandler)):
            handler.output_transform = scalar_terms
        if isinstance(handler, MLFlowHandler):
            handler.iteration_log = lambda engine, iteration: iteration % log_interval == 0
    return list(handlers)


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
