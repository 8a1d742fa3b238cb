"""What a run's `initialize` does before anything is computed: errors in one sentence, folders that can be written."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType


def explain_errors() -> None:
    """
    Let an error that ends the program close with its root cause in one line.

    MONAI's config parser wraps an exception several times and says last which expression failed; what was wrong stands
    far above. The traceback stays as it is.
    """
    previous = sys.excepthook
    if getattr(previous, "explains", False):
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        if root is not error:
            print(f"\n{type(root).__name__}: {root}", file=sys.stderr)

    explain.explains = True  # type: ignore[attr-defined]
    sys.excepthook = explain


def check_writable(*folders: str | os.PathLike) -> None:
    """
    Make the folders a run will write to and try to write, before the hours of training and not after.

    Args:
        folders: made where they are missing.

    Raises:
        PermissionError: naming the folder that cannot be written and the remedy.
    """
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise PermissionError(
                f"`output_dir` and `ckpt_dir` must be folders that can be written but {os.fspath(folder)!r} cannot "
                f"({error.strerror}); name others, as in --output_dir /somewhere/else."
            ) from error
