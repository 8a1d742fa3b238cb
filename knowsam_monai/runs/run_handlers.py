"""The handlers of a bundle's run: the method's, MONAI's, and what logs, saves, resumes and checks beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Engine
from monai.handlers import (
    CheckpointSaver,
    LrScheduleHandler,
    TensorBoardImageHandler,
    TensorBoardStatsHandler,
    from_engine,
)

from knowsam_monai import ranks
from knowsam_monai.handlers.loss_terms import LossTerms
from knowsam_monai.runs.checkpoint_saver import WholeCheckpointSaver
from knowsam_monai.runs.last_iteration import LastIteration
from knowsam_monai.runs.preflight import Preflight
from knowsam_monai.runs.resume import Resume
from knowsam_monai.runs.run_record_handler import RunRecord
from knowsam_monai.runs.student_curves import StudentCurves
from knowsam_monai.runs.tracking import track_terms
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
    All handlers of a trainer, in the order in which they must act.

    The student's curves and the methods come first. Then the learning rates, the loss terms by name, the progress bar,
    TensorBoard, the last weights, `handlers`, and at the end :class:`Resume`, :class:`RunRecord`, :class:`Preflight`
    and :class:`LastIteration`. Only the first process draws, logs and saves weights.

    Args:
        methods: handlers that add terms to the loss; None is left out.
        handlers: MONAI's and the user's own, with the ``ValidationHandler``.
        state: all that a resumed run needs, by name: ``network``, ``optimizer``, ``lr_scheduler``, ``distiller``,
            ``sam_optimizer``, ``sam_lr_scheduler``, ``ema_student`` and whatever else has a ``state_dict``; None is
            left out.
        evaluator: the validation engine.
        best_saver: saver of the best weights; see :class:`Resume`.
        output_dir: folder of the run.
        max_iterations: iterations of the run.
        num_rows: numbers of labeled and unlabeled rows.
        data: of :func:`check_data`; compared when a run resumes.
        log_interval: iterations between two readings of the loss terms.
        seed: of the run, recorded.
        resume: whether to go on from the newest checkpoint.
        preflight: report what the run would do, write nothing, and stop.

    Example::

        handlers = training_handlers(
            [MeanTeacher(ema_student)], [ValidationHandler(1, evaluator)], {"network": network, "optimizer": optimizer},
            evaluator, best_saver, output_dir="output", max_iterations=1000, num_rows=(100, 1000),
        )
        trainer = SupervisedTrainer(..., train_handlers=handlers)
    """
    schedulers = (state.get(name) for name in ("lr_scheduler", "sam_lr_scheduler"))
    found = [StudentCurves(), *(method for method in methods if method is not None)]
    found += [LrScheduleHandler(s, print_lr=False, epoch_level=False) for s in schedulers if s is not None]
    found.append(LossTerms(log_interval=log_interval))
    if ranks.rank() == 0:
        found.append(TrainingProgress(evaluator, interval=log_interval))
        if not preflight:
            folder = os.path.join(output_dir, "tensorboard", "train")
            found.append(TensorBoardStatsHandler(log_dir=folder, iteration_log=log_interval))
        last = WholeCheckpointSaver(
            save_dir=str(output_dir),
            save_dict={"model": state["network"]},
            file_prefix="last",
            save_interval=1,
            n_saved=1,
        )
        found.append(last)
    else:
        best_saver = None
    found += handlers
    found += [
        Resume(state, output_dir, evaluator, best_saver, data, enabled=resume, save=not preflight),
        RunRecord(output_dir, seed, resume, enabled=not preflight),
        Preflight(
            state["network"],
            state["optimizer"],
            state.get("distiller"),
            num_rows,
            stop=preflight,
            ema_student=state.get("ema_student"),
        ),
        LastIteration(max_iterations),
    ]
    return track_terms(found, log_interval)


def validation_handlers(
    report: Any,
    best_saver: CheckpointSaver,
    handlers: Sequence[Any],
    output_dir: str | os.PathLike,
    class_names: Sequence[str],
    preflight: bool = False,
) -> list[Any]:
    """
    All handlers of an evaluator: the report, `handlers`, the history of Dice, TensorBoard and the best weights.

    Args:
        report: the run's :class:`ValidationReport`.
        best_saver: saver of the best weights, of which only the first process makes use.
        handlers: the user's own, with :class:`knowsam_monai.handlers.TeacherValidation`.
        output_dir: folder of the run.
        class_names: names of classes 1, 2, ... (no background).
        preflight: write nothing for TensorBoard.

    Example::

        handlers = validation_handlers(report, best_saver, [], "output", ["RV", "myocardium", "LV"])
        evaluator = SupervisedEvaluator(..., val_handlers=handlers)
    """
    history = ValidationHistory(output_dir, class_names)
    found = [report, *handlers, history]
    if ranks.rank() > 0:
        return found
    folder = os.path.join(output_dir, "tensorboard", "validation")
    if not preflight:
        found.append(
            TensorBoardStatsHandler(log_dir=folder, iteration_log=False, epoch_event_writer=history.write_scalars)
        )
    found.append(best_saver)
    if not preflight:
        images = TensorBoardImageHandler(
            log_dir=folder,
            batch_transform=from_engine(["image", "label"]),
            output_transform=from_engine(["pred"]),
            max_channels=1,
            frame_dim=-1,
        )
        found.append(images)
    return found
