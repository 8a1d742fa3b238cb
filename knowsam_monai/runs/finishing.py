"""The end of a run: publish the student first, then write everything else, each on its own."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError, root_cause
from knowsam_monai.files import InvalidCheckpointError, read_tensor_file
from knowsam_monai.runs import ValidationReport
from knowsam_monai.runs.messages import log_traceback
from knowsam_monai.runs.next_steps import TITLES, next_steps
from knowsam_monai.runs.report import write_report
from knowsam_monai.runs.run_record import CONFIG, LOG, read_starts
from knowsam_monai.runs.starting import release
from knowsam_monai.runs.trained_student import MODEL, publish_student
from knowsam_monai.texts import command_line, printable

logger = logging.getLogger(__name__)


def finish_run(
    report: ValidationReport, output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike, enabled: bool = True
) -> None:
    """
    Publish the student that a run kept, then write its table, cases, pictures and page.

    Publishing needs only what the validations already wrote: ``model.pt``, ``config.json`` and ``results.csv``. If one
    of the steps fails, the others still run. Each failure is logged in one sentence with the command that repeats the
    step; its traceback is in ``log.txt``. Only a student that cannot be published is an error, raised at the end.
    Repeated after the run has finished, it leaves a newer student of another run in `ckpt_dir`.

    Args:
        report: report of the validations. If none has run, there is no student to publish.
        output_dir: the run's folder.
        ckpt_dir: the bundle's ``models``.
        enabled: False does nothing (a preflight). Of several processes, only the first does anything.

    Raises:
        RuntimeError: if the student cannot be published.

    Example::

        trainer.run()
        finish_run(report, "output", "models")
    """
    if not enabled or ranks.rank() != 0:
        return
    report_command = command_line(["python", "-m", "knowsam_monai", "report", os.fspath(output_dir)])
    page = ("report.html", partial(write_report, output_dir), report_command)
    if report.is_empty:
        logger.warning("No validation has run, so there is no student to publish and no validation report.")
        _try(*page)
        return
    run_command = command_line(sys.orig_argv)
    publish = partial(publish_student, output_dir, ckpt_dir, replace=not report.is_restored)
    is_published = _try("the published student", publish, run_command)
    _try("the table of Dice", report.log_table, run_command)
    _try("validation_cases.csv", report.write_cases, run_command)
    _try("validation_slices", report.write_slices, run_command)
    _try("validation.png", report.write_picture, run_command)
    _try(*page)
    _try("the next steps", partial(_log_next_steps, output_dir), report_command)
    if not is_published:
        release()
        student = Path(output_dir) / MODEL
        state = "It is intact in {}; run the same command again to publish it."
        try:
            read_tensor_file(student)
        except (OSError, InvalidCheckpointError):
            state = "{} is missing or damaged; restore it and run the same command again, or train with --resume False."
        raise KnowSAMRuntimeError(
            f"The student could not be published in {os.fspath(ckpt_dir)} (see above). {state.format(student)}"
        )


def _log_next_steps(output_dir: str | os.PathLike) -> None:
    starts, config = read_starts(output_dir), Path(output_dir) / CONFIG
    if not starts or not config.is_file():
        return
    steps = next_steps(output_dir, starts[-1], json.loads(config.read_text(encoding="utf-8")))
    for purpose, command in steps.items():
        logger.info("To %s: %s", TITLES[purpose], printable(command))


def _try(product: str, write: Callable[[], object], command: str) -> bool:
    """Write one product; if this fails, log one sentence, with the traceback in the log file only."""
    try:
        write()
    except Exception as error:  # every library fails in its own way, and none may prevent the other products
        root = root_cause(error)
        reason = printable(" ".join(f"{type(root).__name__}: {root}".rstrip(": ").split()))
        message = "%s could not be written (%s); the traceback is in %s. To write it again, run: %s"
        logger.error(message, product, reason, LOG, command)
        log_traceback(product, error)
        return False
    return True
