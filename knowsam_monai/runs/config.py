"""The config that is being run, and its plain values."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigComponent, ConfigExpression, ConfigParser, ReferenceResolver
from yaml import YAMLError

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError, error_line

SECTIONS = ("imports", "initialize", "run", "finalize", ConfigParser.meta_key)  # they hold no settings


def read_config(file: str | Path, argument: str) -> dict[str, Any]:
    """
    Read one JSON or YAML file. An error is one sentence, not MONAI's traceback.

    Args:
        file: a config, or the file of `--args_file`.
        argument: name of the argument, for the error.

    Raises:
        ValueError: if it cannot be read or has no keys, with the line if its syntax is wrong.
    """
    try:
        config = ConfigParser.load_config_file(file)
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "msg", None) or getattr(error, "problem", None)
        mark = getattr(error, "problem_mark", None)
        line = getattr(error, "lineno", mark and mark.line + 1)
        found = f"{'' if line is None else f'line {line}: '}{reason or error_line(error)}"
    else:
        if isinstance(config, dict):
            return config
        found = "it has no keys"
    raise KnowSAMValueError(
        f"`{argument}` must lead to a config with keys and values but {file} is not one ({found}); correct the file."
    )


def running_config() -> dict[str, Any] | None:
    """
    The config that is being built, including overlays and the command line; None outside of a config.
    """
    parser = running_parser()
    if parser is None:
        return None
    return {key: value for key, value in parser.config.items() if key != parser.meta_key}


def running_parser() -> ConfigParser | None:
    """
    The parser of the config that is being built; None outside of a config.

    MONAI never passes the config to a component, so the parser is searched for among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            return parser
        frame = frame.f_back
    return None


def plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of all top-level keys that are numbers, text, lists of these, or expressions of such keys.

    Nothing is built: keys that hold a component or refer to one are skipped, and so are expressions that fail.

    Args:
        config: a merged config, see :func:`running_config`.

    Example:
        >>> plain_values({"size": 64, "half": "$@size // 2", "net": {"_target_": "UNet"}, "same": "@net"})
        {'size': 64, 'half': 32}
    """
    parser = ConfigParser(dict(config))
    values = {}
    for key in config:
        if is_plain(key, config):
            try:
                values[key] = parser.get_parsed_content(key)
            except Exception:  # an expression can raise anything; the value it uses is checked elsewhere
                continue
    return values


def check_bundle_root() -> None:
    """
    Check that the `bundle_root` of the running config, if anything uses it, is the folder of the config's own bundle.

    Its default is the working folder. In another one, students, runs or a phantom would be looked for and written.

    Raises:
        FileNotFoundError: if it is the folder of another bundle or of none.
    """
    config = running_config() or {}
    values = plain_values(config)
    without_phantom = {"datalist"} if values.get("dataset_dir") is not None else set()
    users = {key for key, part in config.items() if "bundle_root" in referred_keys(part)}
    if "bundle_root" not in values or not users - without_phantom:
        return
    root, problem = os.path.abspath(values["bundle_root"]), ""
    own = (running_parser().config.get(ConfigParser.meta_key) or {}).get("name")
    try:
        with open(os.path.join(root, "configs", "metadata.json"), encoding="utf-8") as file:
            name = json.load(file)["name"]
        if own is not None and name != own:
            problem = f"is that of {name!r}"
    except OSError:
        problem = "has no configs/metadata.json"
    except (ValueError, KeyError, TypeError):  # of a bundle that cannot be told
        pass
    if problem:
        raise KnowSAMFileNotFoundError(
            f"`bundle_root` must be the folder of this config's bundle but {root} {problem}; pass --bundle_root FOLDER."
        )


def literal(value: Any) -> Any:
    """
    An expression for a text, so that the config's parser neither splits it at `#` nor looks up `@`.

    Example:
        >>> literal("run #3"), literal(3)
        ("$'run \\\\x233'", 3)
    """
    if not isinstance(value, str):
        return value
    return "$" + repr(value).replace("@", "\\x40").replace("#", "\\x23")


def is_plain(key: str, config: Mapping[str, Any], referrers: tuple[str, ...] = ()) -> bool:
    """
    Whether a top-level key neither holds nor refers to a component.

    Args:
        key: a key of `config`.
        config: a merged config.
        referrers: keys that refer to this one, to detect circular references.
    """
    if key in SECTIONS or key in referrers or key not in config:
        return False
    for _, part in parts(config[key]):
        if ConfigComponent.is_instantiable(part) or ConfigExpression.is_import_statement(part):
            return False
    return all(is_plain(name, config, (*referrers, key)) for name in referred_keys(config[key]))


def parts(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each part of a config with its name, as in ``train#handlers#0``; a part comes before what it contains."""
    yield name, part
    if isinstance(part, (list, tuple, set)):
        part = dict(enumerate(part))
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from parts(value, f"{name}#{key}" if name else str(key))


def referred_keys(part: Any) -> set[str]:
    """
    The top-level keys that a part of a config refers to, for example with ``"@lr"`` or ``"$2 * @lr"``.

    Args:
        part: any value in a config, nested or not.

    Example:
        >>> sorted(referred_keys({"a": "@train#dataset", "b": ["$@lr * 2", "plain @text"]}))
        ['lr', 'train']
    """
    texts = (inner for _, inner in parts(part) if isinstance(inner, str))
    references = (reference for text in texts for reference in ReferenceResolver.match_refs_pattern(text))
    return {ReferenceResolver.split_id(reference)[0] for reference in references}


def keys_of_arguments(part: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """
    The top-level key that each argument of a component is, and of the components that it is made of.

    Args:
        part: a component of a config.
        config: the config.

    Example:
        >>> teacher = {"_target_": "SAMTeacher", "checkpoint": "@sam_checkpoint"}
        >>> config = {"teacher": teacher, "sam_checkpoint": "sam.pth"}
        >>> keys_of_arguments({"_target_": "SAMDistiller", "teacher": "@teacher", "gate": "none"}, config)
        {'checkpoint': 'sam_checkpoint', 'teacher': 'teacher'}
    """
    of_parts: dict[str, str] = {}
    own = {}
    for argument, value in part.items():
        if isinstance(value, str) and value.startswith("@") and value[1:] in config:
            own[argument] = value[1:]
            value = config[value[1:]]
        if ConfigComponent.is_instantiable(value):
            of_parts |= keys_of_arguments(value, config)
    return of_parts | own
