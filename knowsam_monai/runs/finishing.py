"""The end of a run: the student first, then whatever else it leaves, each by itself."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError, root_cause
from knowsam_monai.runs import ValidationReport
from knowsam_monai.runs.report import write_report
from knowsam_monai.runs.run_record import LOG, RunLog
from knowsam_monai.runs.trained_student import MODEL, publish_student
from knowsam_monai.texts import printable

logger = logging.getLogger(__name__)


def finish_run(
    report: ValidationReport, output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike, enabled: bool = True
) -> None:
    """
    Publish the student that a run kept, then write its table, cases, pictures and page; for a bundle's `run`.

    The student comes first, from what the validations have written: ``model.pt``, ``config.json``, ``results.csv``.
    Whatever fails, all else is still made. Each failure is one sentence in the log, with the command that makes the
    thing again; its traceback is in ``log.txt``.

    The program's exit code is that of the student: an error when it could not be published, after all else was tried.
    A run whose student is published has succeeded, though a picture of it is missing: that is an error in the log.

    Args:
        report: of the validations. Where none has run there is no student, and nothing is published.
        output_dir: the run's folder.
        ckpt_dir: the bundle's ``models``.
        enabled: False does nothing (a preflight). Under several processes all but the first do nothing either.

    Raises:
        RuntimeError: when the student could not be published.

    Example::

        trainer.run()
        finish_run(report, "output", "models")
    """
    if not enabled or ranks.rank() != 0:
        return
    page = ("report.html", partial(write_report, output_dir), shlex.join(_REPORT + [os.fspath(output_dir)]))
    if report.is_empty:
        logger.warning("No validation has run, so there is no student to publish and no validation report.")
        _try(*page)
        return
    again = shlex.join(sys.orig_argv)
    is_published = _try("the published student", partial(publish_student, output_dir, ckpt_dir), again)
    _try("the table of Dice", report.log_table, again)
    _try("validation_cases.csv", report.write_cases, again)
    _try("validation_slices", report.write_slices, again)
    _try("validation.png", report.write_picture, again)
    _try(*page)
    if not is_published:
        raise KnowSAMRuntimeError(
            f"The student could not be published in {os.fspath(ckpt_dir)} (see above). It is whole in "
            f"{Path(output_dir) / MODEL}; to publish it start the same command again."
        )


_REPORT = ["python", "-m", "knowsam_monai", "report"]


def _try(product: str, make: Callable[[], object], command: str) -> bool:
    """Make one thing; where that fails, say so in one sentence, its traceback in the run's log alone."""
    try:
        make()
    except Exception as error:  # each library fails in its own way, and none may take the others along
        root = root_cause(error)
        reason = f"{type(root).__name__}: {root}".rstrip(": ")
        message = "%s could not be made (%s); its traceback is in %s. This makes it again: %s"
        logger.error(message, product, printable(" ".join(reason.split())), LOG, command)
        trace = (type(error), error, error.__traceback__)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, RunLog):
                handler.handle(logger.makeRecord(__name__, logging.ERROR, "", 0, "%s", (product,), trace))
        return False
    return True
