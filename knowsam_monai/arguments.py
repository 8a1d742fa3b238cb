"""Checks of arguments against the types in their signature."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError

Function = TypeVar("Function", bound=Callable[..., Any])
WORDS = {
    **{"bool": "True or False", "int": "a whole number", "float": "a number", "str": "a string", "NoneType": "None"},
    **{"Module": "a torch.nn.Module", "dtype": "a torch.dtype"},
    **{"PathLike": "a path", "Callable": "a function"},
}


def check_types(function: Function) -> Function:
    """
    Make a function refuse arguments that are not of the types in its signature; a decorator.

    A bool is no number, NaN is none either, 3.0 is a whole one, and a string is no sequence. Items of sequences are
    checked; calls and results of functions are not, nor are optimizers, which other libraries wrap.

    Args:
        function: with type hints; a hint of another kind than those used in this package accepts everything.

    Raises:
        TypeError: at a call, with the name of the argument and what it must be; a ValueError for a wrong number.

    Example::

        >>> @check_types
        ... def scaled(x, factor: float = 1.0):
        ...     return factor * x
        >>> scaled(3, 2)
        6
        >>> scaled(3, "2")
        Traceback (most recent call last):
        knowsam_monai.errors.KnowSAMTypeError: `factor` must be a number but is '2'.
    """
    signature = inspect.signature(function)
    hints = functools.cache(functools.partial(get_type_hints, function))  # later: some names are defined below it

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # Python's own error says it better
            return function(*args, **kwargs)
        for name, value in given.items():
            if name in hints() and not _is_of(value, hints()[name]):
                kinds = (hints()[name], *get_args(hints()[name]))
                is_wrong_number = isinstance(value, float) and (int in kinds or float in kinds)
                kind = KnowSAMValueError if is_wrong_number else KnowSAMTypeError
                raise kind(f"`{name}` must be {_words(hints()[name])} but is {_shown(value)}.")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _is_of(value: Any, hint: Any) -> bool:
    kind, items = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_is_of(value, one) for one in items)
    if kind is Literal:
        return any(value is one or value == one for one in items)
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind in (int, float):
        if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
            value = value.item()
        is_number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
        return is_number and (kind is float or value % 1 == 0)
    if kind is Callable:
        return callable(value)
    if kind is Sequence:
        is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) == 1
        is_sequence &= not isinstance(value, (str, bytes, Mapping))
        return is_sequence and all(_is_of(item, items[0]) for item in value)
    if kind.__name__ == "Optimizer":  # wrappers are found in `knowsam_monai.wrappers`
        return True
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> str:
    kind, items = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        words = dict.fromkeys(_words(one) for one in items)
        return " or ".join(word for word in words if word != WORDS["str"] or WORDS["PathLike"] not in words)
    if kind is Literal:
        return " or ".join(map(repr, items))
    if kind is Sequence:
        return "a list of " + {int: "whole numbers", float: "numbers", str: "strings"}.get(items[0], "networks")
    return WORDS.get(kind.__name__, _a(kind))


def _shown(value: Any) -> str:
    is_plain = value is None or isinstance(value, (bool, str, Real, list, tuple))
    return repr(value) if is_plain and len(repr(value)) < 100 else _a(type(value))


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiouAEIOU' else 'a'} {kind.__name__}"
