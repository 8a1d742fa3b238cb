"""The errors of this package; each message says what is wrong and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral


class KnowSAMError(Exception):
    """
    Base class of all errors of this package, so that the command line can show the message alone.

    Each subclass is also the built-in error of its kind: ``except ValueError`` catches a :class:`KnowSAMValueError`.

    Example::

        >>> isinstance(KnowSAMValueError("`lr` must be above 0 but is 0."), (KnowSAMError, ValueError))
        True
    """


class KnowSAMValueError(KnowSAMError, ValueError):
    """A wrong value."""


class KnowSAMTypeError(KnowSAMError, TypeError):
    """A wrong type."""


class KnowSAMRuntimeError(KnowSAMError, RuntimeError):
    """A wrong order of calls, or a failure during a run."""


class KnowSAMFileNotFoundError(KnowSAMError, FileNotFoundError):
    """A missing file or folder."""


class KnowSAMPermissionError(KnowSAMError, PermissionError):
    """A folder or file that cannot be created or written."""


class KnowSAMImportError(KnowSAMError, ImportError):
    """A package that is not installed."""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """
    Raise a ValueError if an argument is not one of its choices.

    Args:
        name: the argument.
        value: its value.
        choices: the values that it may have.

    Example::

        >>> check_choice("rows", "all", ("all", "unlabeled"))
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise KnowSAMValueError(f"`{name}` must be {', '.join(others)} or {last} but is {value!r}.")


def check_counts(**counts: int) -> None:
    """
    Raise a ValueError if an argument is not a whole number or is below 1.

    Args:
        counts: the arguments by name.

    Example::

        >>> check_counts(every=1, log_interval=50)
    """
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise KnowSAMValueError(f"`{name}` must be a whole number but is {count!r}.")
        if count < 1:
            raise KnowSAMValueError(f"`{name}` must be at least 1 but is {count}.")


@contextmanager
def named_as_set(keys: Mapping[str, str]) -> Iterator[None]:
    """
    Call arguments by the keys of a config that set them, in the errors of this package.

    Args:
        keys: the key by argument.

    Example::

        >>> with named_as_set({"checkpoint": "sam_checkpoint"}):
        ...     raise KnowSAMValueError("`checkpoint` must be a file.")
        Traceback (most recent call last):
        knowsam_monai.errors.KnowSAMValueError: `sam_checkpoint` must be a file.
    """
    try:
        yield
    except Exception as error:
        root = root_cause(error)
        if isinstance(root, KnowSAMError):
            root.args = (re.sub(r"`(\w+)`", lambda name: f"`{keys.get(name[1], name[1])}`", str(root)),)
        raise


def error_line(error: BaseException) -> str:
    """
    The line of a foreign error that says the most: the last of TorchScript's, the first of others.

    Example::

        >>> error_line(ValueError("no such norm.")), error_line(KeyError())
        ('no such norm', 'KeyError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if "TorchScript" in str(error) else 0].rstrip(".")


def root_cause(error: BaseException) -> BaseException:
    """
    The first error of this package in the chain of causes, or else the last cause.

    The causes of an error of this package, such as one of the operating system, say less than the error itself.

    Args:
        error: the error as it was caught, the start of the chain.

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
