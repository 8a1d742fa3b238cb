"""What a run shows on the screen: errors as one sentence, and no warnings that users cannot act on."""

from __future__ import annotations

import logging
import sys
import warnings
from pydoc import ErrorDuringImport
from types import TracebackType

from knowsam_monai.errors import KnowSAMError, root_cause

logger = logging.getLogger(__name__)


def explain_errors() -> None:
    """
    End the program's output with the root cause of an error, in one line.

    MONAI's config parser wraps an exception several times: its last line names the expression that failed, and what was
    wrong is far above. An error of this package is shown as its sentence alone; the traceback goes to the log file,
    and to the screen under ``python -X dev``. All other errors keep their traceback. Ignite's own lines about an error
    go to the log file only. An error that a signal caused (MONAI turns the exit of a component's import into an error)
    ends the program as the signal would, without a line of its own.

    Example::

        explain_errors()     # once, before anything else
    """
    previous = sys.excepthook
    if getattr(previous, "explains", False):
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        stop = _stop_during_import(error)
        if stop is not None:
            raise stop
        root = root_cause(error)
        log_traceback(str(root), error)
        is_sentence = isinstance(root, KnowSAMError)
        if not is_sentence or sys.flags.dev_mode:
            previous(kind, error, trace)
        if is_sentence or root is not error:
            print(f"\n{type(root).__name__.removeprefix('KnowSAM')}: {root}", file=sys.stderr)

    explain.explains = True  # type: ignore[attr-defined]
    sys.excepthook = explain
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_is_said_once)


def _stop_during_import(error: BaseException | None) -> SystemExit | None:
    """The exit of a signal that pydoc, with which MONAI imports components, has turned into an error."""
    while error is not None:
        if isinstance(error, ErrorDuringImport) and isinstance(error.value, SystemExit):
            return error.value
        error = error.__cause__
    return None


def _is_said_once(record: logging.LogRecord) -> bool:
    """Ignite's engines log an error that ends them, each engine once more."""
    return "run is terminating due to exception" not in str(record.msg)


def log_traceback(message: str, error: BaseException) -> None:
    """Write an error with its traceback to the log files, but not to the screen."""
    trace = (type(error), error, error.__traceback__)
    record = logger.makeRecord(__name__, logging.ERROR, "", 0, "%s", (message,), trace)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def is_command_line() -> bool:
    """
    Whether this process is a command, such as ``python -m monai.bundle run``, and not a program that uses a bundle.

    Example:
        >>> is_command_line()
        False
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] in ("monai", "knowsam_monai")


def ignore_known_warnings() -> None:
    """
    Hide the warnings about MONAI's own calls that no user of a bundle can act on.

    Example::

        ignore_known_warnings()     # once, before training
    """
    known = (
        (FutureWarning, r".*torch\.cuda\.amp\.GradScaler"),  # monai.engines.Trainer.run
        (UserWarning, r"Detected call of `lr_scheduler\.step\(\)` before"),  # it steps in accumulated iterations too
    )
    for category, message in known:
        warnings.filterwarnings("ignore", message, category)
