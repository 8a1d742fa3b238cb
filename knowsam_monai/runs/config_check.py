"""The first step of a bundle's `initialize`: check the config and expand the paths in it."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pydoc import ErrorDuringImport, locate
from typing import Any

import torch
from monai.bundle import ComponentLocator, ConfigComponent, ConfigExpression, ConfigParser, ReferenceResolver
from monai.bundle.utils import merge_kv

from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.errors import KnowSAMImportError, KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.files import VARIABLE, expand_path
from knowsam_monai.runs.config import literal, parts, plain_values, read_config, running_parser
from knowsam_monai.runs.messages import explain_errors, is_command_line
from knowsam_monai.runs.trained_student import warn_of_other_settings
from knowsam_monai.teachers.bundle_network import check_bundle

PATHS = (
    *("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "sam_checkpoint", "sam_cache_dir"),
    "teacher_bundle",
)


def check_config() -> None:
    """
    Check the settings of the running config, before anything is built, read or written.

    - ``~`` and environment variables in paths are expanded, in the config as well as on the command line.
    - A package that MONAI needs for one of the components must be installed.
    - The class of each component must exist and take the given arguments.
    - Types, ranges and the spelling of keys are checked, see :mod:`knowsam_monai.runs.values`. Without pydantic this is
      skipped: a Model Zoo bundle needs pydantic for training only.
    - Valid values in another form are converted: ``cuda:0`` to a device, 32.0 to 32.

    The config itself is changed, so that all its components see the same values. On the command line, errors of this
    package are shown as one sentence from now on, see :func:`knowsam_monai.runs.messages.explain_errors`.

    Raises:
        ImportError: if a package is missing, with the line that installs it.
        RuntimeError: if no config is running.
        ValueError: with one sentence for each mistake.

    Example::

        "initialize": ["$config_check.check_config()", ...]
    """
    if is_command_line():
        explain_errors()
    parser = running_parser()
    if parser is None:
        raise KnowSAMRuntimeError(
            "`check_config` must be called by a config but none is running; put it into a config's `initialize`."
        )
    _refuse_none_on_the_command_line(parser.config)
    _check_parts(parser)
    converted: dict[str, Any] = {}
    for key, value in (_given_paths(parser.config) | _paths_with_hash(parser.config)).items():
        path = expand_path(value, key)
        if path != value or "#" in path:
            converted[key] = literal(path) if "#" in path else path
    parser.config.update(converted)
    try:
        from knowsam_monai.runs.values import check_values
    except ModuleNotFoundError as error:
        if error.name != "pydantic":
            raise
    else:
        for key, value in check_values(parser.config).items():
            converted[key] = f"$torch.device({str(value)!r})" if isinstance(value, torch.device) else value
        parser.config.update(converted)
    values = plain_values(parser.config)
    if values.get("process_timeout") is not None and "start_run" not in str(parser.config.get("run")):
        raise KnowSAMValueError(
            "`process_timeout` must be None in an evaluation, which runs in one process, but is "
            f"{values['process_timeout']}; leave out multi_gpu_train.json, and start it without torchrun."
        )
    data, is_training = values.get("dataset_dir"), "train" in parser.config
    is_path = "load_datalist" in str(parser.config.get("datalist"))  # to another component, it may be anything
    if is_training and is_path and data is not None and not os.path.exists(data):
        load_datalist(data, "phantom")  # says what is missing
    if "ckpt_path" in values:
        warn_of_other_settings(values["ckpt_path"], values)
    if values.get("use_sam") and values.get("teacher_bundle") is not None:
        check_bundle(values["teacher_bundle"], "teacher_bundle")
    if converted:
        parser.parse(reset=True)


def check_command(configs: Sequence[str], words: Sequence[str]) -> None:
    """
    Check the files and the nested keys of a training's command line, which MONAI merges before it runs anything.

    Args:
        configs: the config files, each of which overrides those before it.
        words: the rest of the command line, keys and values.

    Raises:
        ValueError: if a file cannot be read, or if a key leads through a part that is not in the config.
    """
    from fire.parser import DefaultParseValue

    given = [(key.removeprefix("+"), value) for key, value in _options_of_command_line(words)]  # MONAI drops the +
    files = [("--with", file) for file in configs] + [(f"--{key}", file) for key, file in given if key == "args_file"]
    pairs = [pair for argument, file in files for pair in read_config(file, argument).items()]
    config = ConfigParser({})
    for key, value in (*pairs, *((key, DefaultParseValue(text)) for key, text in given)):
        try:
            merge_kv(config, key, value)
        except (KeyError, IndexError, TypeError, ValueError):
            raise _missing_part(key, config) from None


def _missing_part(key: str, config: ConfigParser) -> KnowSAMValueError:
    """The error for a nested key that does not lead to a part of the config."""
    path = ReferenceResolver.split_id(key.removeprefix("+"))
    depth = next((n for n in range(1, len(path)) if "::".join(path[:n]) not in config), len(path))
    outer, name, inner = path[: depth - 1], path[depth - 1], path[depth:]
    found = config["::".join(outer)]
    close = difflib.get_close_matches(name, found if isinstance(found, Mapping) else (), n=1)
    remedy = f"did you mean `{'#'.join([*outer, *close, *inner])}`?" if close else "correct it."
    where = f"`{'#'.join(outer)}`" if outer else "the config"
    return KnowSAMValueError(f"`{key}` must lead to a part of this config but {where} has no {name!r}; {remedy}")


def _check_parts(parser: ConfigParser) -> None:
    """
    Refuse what MONAI does not, or names only after the data is checked, above many lines of traceback.

    MONAI reads a dictionary on the command line as Python, where JSON's `true` and `false` are texts, both true.
    """
    for name, part in parts(parser.config):
        if isinstance(part, str) and part in ("true", "false", "null"):
            raise KnowSAMValueError(f"`{name}` must not be the text {part!r}; write {json.loads(part)}, as in Python.")
        if not ConfigComponent.is_instantiable(part):
            continue
        if str(part["_target_"]).endswith("MLFlowHandler") and not importlib.util.find_spec("mlflow"):
            raise KnowSAMImportError(
                "MLFlowHandler (`--tracking mlflow`) needs `mlflow`, which is not installed; get it with "
                "`pip install 'mlflow>=3'` (the extra `mlflow`)."
            )
        _refuse_unknown_arguments(name, part, parser.locator)


def _refuse_unknown_arguments(name: str, part: Mapping[str, Any], locator: ComponentLocator) -> None:
    """Python names a wrong argument of a component only when it is built, after the data is read."""
    if "_disabled_" in part:  # perhaps never built
        return
    target = ConfigComponent(part, locator=locator).resolve_module_name()
    is_name = isinstance(target, str) and not target.startswith(("$", "@", "%"))
    try:
        function = locate(target) if is_name else None
        if is_name and function is None and _is_on_the_command_line(name):
            raise _missing_component(name, target, locator)
        parameters = {} if function is None else _parameters_of(function)
    except KnowSAMValueError:
        raise
    except ErrorDuringImport as error:
        if not isinstance(error.value, Exception):  # a signal that came during the import
            raise error.value from None
        return
    except (TypeError, ValueError):  # not in Python
        return
    unknown = [key for key in part if key not in parameters and key not in ConfigComponent.non_arg_keys]
    if not parameters or not unknown or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    close = difflib.get_close_matches(unknown[0], list(parameters), n=1)
    remedy = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(parameters)}."
    raise KnowSAMValueError(f"`{name}#{unknown[0]}` must be an argument of {target} but is not; {remedy}")


def _is_on_the_command_line(name: str) -> bool:
    """Whether the class of a part is set there; other parts that do not exist are perhaps never built."""
    keys = [key.replace("::", "#") for key, _ in _options_of_command_line()]
    return any(f"{name}#_target_".startswith(f"{key}#") or key == f"{name}#_target_" for key in keys)


def _missing_component(name: str, target: str, locator: ComponentLocator) -> KnowSAMValueError:
    """The error for a class that does not exist, with the closest name of its module, or else of MONAI."""
    module, _, last = target.rpartition(".")
    known = dir(locate(module)) if module else locator._components_table  # MONAI lists its components nowhere else
    close = difflib.get_close_matches(last, sorted(key for key in known or () if not key.startswith("_")), n=1)
    remedy = (
        f"did you mean {'.'.join(filter(None, (module, *close)))}?" if close else "write it as package.module.Class."
    )
    return KnowSAMValueError(f"`{name}` must be a component that exists but {target} does not; {remedy}")


def _parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Those of a function or class; foreign decorators, such as MONAI's `deprecated_arg`, may take further names."""
    own = function.__init__ if inspect.isclass(function) else function
    is_decorated = hasattr(own, "__wrapped__") and not function.__module__.startswith("knowsam_monai.")
    return inspect.signature(own if is_decorated else function, follow_wrapped=not is_decorated).parameters


def _options_of_command_line(words: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """The keys and values on the command line, as they were typed."""
    words = sys.argv[1:] if words is None else words
    for word, next_word in zip(words, [*words[1:], ""]):
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            yield key.replace("-", "_"), value if equals else next_word


def _paths_with_hash(config: Mapping[str, Any]) -> dict[str, str]:
    """The paths on the command line that have a #, which MONAI has replaced by :: in the config; no expressions."""
    given = {key: value for key, value in _options_of_command_line() if key in PATHS and "#" in value and key in config}
    return {key: value for key, value in given.items() if not value.startswith(("$", "@", "%"))}


def _refuse_none_on_the_command_line(config: Mapping[str, Any]) -> None:
    """MONAI ignores an option whose value is None, so the run would use the config's own value."""
    for key, value in _options_of_command_line():
        if value == "None" and key.split("#")[0] in config:
            remedy = f"write --{key} '$None'" if _accepts_none(key) else "leave it out for the bundle's own value"
            raise KnowSAMValueError(f"`{key}` must not be None on the command line, where MONAI ignores it; {remedy}.")


def _accepts_none(key: str) -> bool:
    try:
        from knowsam_monai.runs.values import accepts_none
    except ModuleNotFoundError:  # without pydantic
        return True
    return accepts_none(key)


def _given_paths(config: Mapping[str, Any]) -> dict[str, str | os.PathLike]:
    """The paths in a config. MONAI reads ``$HOME/run`` as an expression; here it is a path if the variable is set."""
    values = plain_values(config)
    for key in PATHS:
        raw = config.get(key)
        if ConfigExpression.is_expression(raw):
            variable = VARIABLE.match(raw)
            if variable and (variable[1] or variable[2]) in os.environ:
                values[key] = raw
    return {key: values[key] for key in PATHS if isinstance(values.get(key), (str, os.PathLike))}
