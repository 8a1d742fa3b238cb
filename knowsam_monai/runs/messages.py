"""What a run shows on the screen: errors as one sentence, and no warnings that users cannot act on."""

from __future__ import annotations

import logging
import sys
import warnings
from types import TracebackType

from knowsam_monai.errors import KnowSAMError, root_cause

logger = logging.getLogger(__name__)


def explain_errors() -> None:
    """
    Let an error that ends the program close with its root cause in one line.

    MONAI's config parser wraps an exception several times and says last which expression failed; what was wrong stands
    far above. A mistake that this package found and says in a sentence is that sentence alone, without a traceback:
    that is in the run's log, and on the screen under ``python -X dev``. All other errors keep their traceback.

    Example::

        explain_errors()     # once, before anything else
    """
    previous = sys.excepthook
    if getattr(previous, "explains", False):
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        root = root_cause(error)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                record = logger.makeRecord(__name__, logging.ERROR, "", 0, "%s", (root,), (kind, error, trace))
                handler.handle(record)
        is_sentence = isinstance(root, KnowSAMError)
        if not is_sentence or sys.flags.dev_mode:
            previous(kind, error, trace)
        if is_sentence or root is not error:
            print(f"\n{type(root).__name__.removeprefix('KnowSAM')}: {root}", file=sys.stderr)

    explain.explains = True  # type: ignore[attr-defined]
    sys.excepthook = explain


def is_command_line() -> bool:
    """
    Is this process a command, such as ``python -m monai.bundle run``, and not a program that only uses a bundle?

    Example:
        >>> is_command_line()
        False
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] in ("monai", "knowsam_monai")


def ignore_known_warnings() -> None:
    """
    Leave out warnings about MONAI's own calls, which nobody who runs a bundle can change, one by one.

    Example::

        ignore_known_warnings()     # once, before training
    """
    known = (
        (FutureWarning, r".*torch\.cuda\.amp\.GradScaler"),  # monai.engines.Trainer.run
        (UserWarning, r"Detected call of `lr_scheduler\.step\(\)` before"),  # its scheduler counts what it accumulates
    )
    for category, message in known:
        warnings.filterwarnings("ignore", message, category)
