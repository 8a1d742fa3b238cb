"""What a bundle's `initialize` does first: check the config, and give every path in it its full form."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from monai.bundle import ConfigExpression

from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.runs.config import plain_values, running_parser
from knowsam_monai.runs.messages import explain_errors, is_command_line

PATHS = ("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "sam_checkpoint", "sam_cache_dir")
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def check_config() -> None:
    """
    Check the settings of the config that is running, before anything is built, read or written.

    - In paths ``~`` and environment variables are expanded, wherever the config has them from.
    - Types, ranges and the spelling of keys are checked, see :mod:`knowsam_monai.runs.values`. Without pydantic this is
      left out: a bundle of the Model Zoo needs it for training only.
    - What is right in another form is turned into the config's own: ``cuda:0`` into a device, 32.0 into 32.

    The config itself is changed, so that all its components see the same values. On the command line, an error that
    this package found is one sentence from here on, see :func:`knowsam_monai.runs.messages.explain_errors`.

    Raises:
        RuntimeError: when no config is running.
        ValueError: with a sentence for each mistake.

    Example::

        "initialize": ["$config_check.check_config()", ...]
    """
    if is_command_line():
        explain_errors()
    parser = running_parser()
    if parser is None:
        raise KnowSAMRuntimeError(
            "`check_config` must be called by a config but none is running; put it into the `initialize` of one."
        )
    _refuse_none_on_the_command_line(parser.config)
    settled = {}
    for key, value in _given_paths(parser.config).items():
        path = expand_path(value, key)
        if path != value:
            settled[key] = path
    parser.config.update(settled)
    try:
        from knowsam_monai.runs.values import check_values
    except ModuleNotFoundError as error:
        if error.name != "pydantic":
            raise
    else:
        settled |= check_values(parser.config)
    for key, value in settled.items():
        parser.config[key] = f"$torch.device({str(value)!r})" if isinstance(value, torch.device) else value
    if settled:
        parser.parse(reset=True)


def _refuse_none_on_the_command_line(config: Mapping[str, Any]) -> None:
    """MONAI leaves an option out whose value is None, and the run would have the config's own value."""
    words = sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""]):
        key, _, value = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--") and (value or following) == "None" and key.split("#")[0] in config:
            raise KnowSAMValueError(
                f"`{key}` must not be None on the command line, where MONAI leaves such an option out; write "
                f"--{key} '$None'."
            )


def expand_path(path: str | os.PathLike, argument: str) -> str:
    """
    Expand ``~``, ``~user`` and environment variables in a path.

    Args:
        path: to expand. One that exists as it is written keeps its dollar signs.
        argument: what names it, for the error.

    Raises:
        ValueError: when there is no such user, or no such variable is set.

    Example:
        >>> expand_path("/data/run", "output_dir")
        '/data/run'
    """
    path = os.path.expanduser(os.fspath(path))
    if path.startswith("~"):
        user = path.split("/")[0]
        raise KnowSAMValueError(
            f"`{argument}` must be a path of this machine but begins with {user!r}, the home folder of nobody here; "
            f"write the path in full, or ./{user} for a folder of that name."
        )
    if os.path.exists(path):
        return path
    path = os.path.expandvars(path)
    unknown = VARIABLE.search(path)
    if unknown:
        raise KnowSAMValueError(
            f"`{argument}` must name environment variables that are set but {unknown.group()} of {path} is not; set "
            "it, or write the path in full."
        )
    return path


def _given_paths(config: Mapping[str, Any]) -> dict[str, str | os.PathLike]:
    """The paths in a config. MONAI takes ``$HOME/run`` for an expression: it is one only if no such variable is set."""
    values = plain_values(config)
    for key in PATHS:
        raw = config.get(key)
        if ConfigExpression.is_expression(raw):
            variable = VARIABLE.match(raw)
            if variable and (variable[1] or variable[2]) in os.environ:
                values[key] = raw
    return {key: values[key] for key in PATHS if isinstance(values.get(key), (str, os.PathLike))}
