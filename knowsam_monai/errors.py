"""The errors of this package: each says in one sentence what was wrong and what to do."""

from __future__ import annotations


class KnowSAMError(Exception):
    """
    Base of every error that this package raises, so that a command line can show the sentence alone.

    Each is also the built-in error of its kind: ``except ValueError`` catches a :class:`KnowSAMValueError`.

    Example::

        >>> isinstance(KnowSAMValueError("`lr` must be above 0 but is 0."), (KnowSAMError, ValueError))
        True
    """


class KnowSAMValueError(KnowSAMError, ValueError):
    """A wrong value."""


class KnowSAMTypeError(KnowSAMError, TypeError):
    """A wrong type."""


class KnowSAMRuntimeError(KnowSAMError, RuntimeError):
    """A wrong order of calls, or something that went wrong in a run."""


class KnowSAMFileNotFoundError(KnowSAMError, FileNotFoundError):
    """A file or folder that is not there."""


class KnowSAMNotADirectoryError(KnowSAMError, NotADirectoryError):
    """A file where a folder must be."""


class KnowSAMPermissionError(KnowSAMError, PermissionError):
    """A folder or file that cannot be written."""


class KnowSAMImportError(KnowSAMError, ImportError):
    """A package that is not installed."""


def root_cause(error: BaseException) -> BaseException:
    """
    What was wrong: of an error and its causes the first of this package, else the last cause of all.

    An error of this package may have a cause of its own, such as the operating system's, but says more than that.

    Args:
        error: the last of the chain, as it was caught.

    Example::

        try:
            transform(case)
        except RuntimeError as error:
            logger.error("%s", root_cause(error))
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return next((cause for cause in chain if isinstance(cause, KnowSAMError)), chain[-1])
