"""The config that is running, and the plain values in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from monai.bundle import ConfigComponent, ConfigExpression, ConfigParser, ReferenceResolver

SECTIONS = ("imports", "initialize", "run", "finalize", ConfigParser.meta_key)  # hold no settings


def running_config() -> dict[str, Any] | None:
    """
    The config whose parser is building what this was called from, with overlays and command line; None outside of one.
    """
    parser = running_parser()
    if parser is None:
        return None
    return {key: value for key, value in parser.config.items() if key != parser.meta_key}


def running_parser() -> ConfigParser | None:
    """
    The parser that is building what this was called from; None outside of one.

    MONAI gives a component of a config what it refers to and never the config, so the parser is looked for among the
    callers.
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
    The top-level keys of a config that are numbers, texts, lists of these, or expressions of such keys; evaluated.

    Nothing is built: a key that holds a component, or refers to one, is left out. So is an expression that fails.

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
            except Exception:  # whatever an expression raises: the value it was given is at fault, and that is checked
                continue
    return values


def is_plain(key: str, config: Mapping[str, Any], around: tuple[str, ...] = ()) -> bool:
    """
    Whether a top-level key holds no component and refers to none.

    Args:
        key: of `config`.
        config: a merged config.
        around: keys that refer to this one, so that a circle ends.
    """
    if key in SECTIONS or key in around or key not in config:
        return False
    return not _holds_component(config[key]) and all(
        is_plain(name, config, (*around, key)) for name in referred_keys(config[key])
    )


def referred_keys(part: Any) -> set[str]:
    """
    The top-level keys that a part of a config refers to, as ``"@lr"`` does or ``"$2 * @lr"``.

    Args:
        part: any value in a config, nested ones included.

    Example:
        >>> sorted(referred_keys({"a": "@train#dataset", "b": ["$@lr * 2", "plain @text"]}))
        ['lr', 'train']
    """
    if isinstance(part, Mapping):
        return set().union(*map(referred_keys, part.values()))
    if isinstance(part, (list, tuple)):
        return set().union(*map(referred_keys, part))
    if not isinstance(part, str):
        return set()
    return {ReferenceResolver.split_id(found)[0] for found in ReferenceResolver.match_refs_pattern(part)}


def _holds_component(part: Any) -> bool:
    if isinstance(part, Mapping):
        return ConfigComponent.is_instantiable(part) or any(map(_holds_component, part.values()))
    if isinstance(part, (list, tuple)):
        return any(map(_holds_component, part))
    return ConfigExpression.is_import_statement(part)
