"""Configs of the zip that need no package: evaluation and inference, with the sizes of the weights that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from zoo.scripts import PACKAGE


def standalone_configs(configs: Path, student: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    What of a bundle's configs runs on the copied code; the names in it are still the package's.

    ``train.json`` and all overlays stay as they are: who trains has the package.

    Args:
        configs: the bundle's folder of configs.
        student: network, classes and sizes that the weights were trained with, which both then have.

    Returns:
        contents by file name: evaluation and inference.
    """
    inference = ConfigParser.load_config_file(configs / "inference.json")
    sizes = {key: value for key, value in student.items() if key in inference}
    return {
        "evaluate.json": _evaluation(configs, student),
        "inference.json": _initialized_in_run({**inference, **sizes}),
    }


def _evaluation(configs: Path, student: dict[str, Any]) -> dict[str, Any]:
    """Evaluation over an unchanged ``train.json``: it brings itself whatever it needs of the package."""
    merged = ConfigParser.load_config_files([str(configs / name) for name in ("train.json", "evaluate.json")])
    merged |= student
    own = ConfigParser.load_config_file(configs / "evaluate.json")
    own = {key: value for key, value in own.items() if not key.startswith("+")}
    needed = _needed(ConfigParser(merged), ["initialize", "run"])
    of_package = {name: value for name, value in needed.items() if PACKAGE in json.dumps(value)}
    parts = {*own, *of_package}
    brought = {k: v for k, v in of_package.items() if not any(k.startswith(f"{part}#") for part in parts)}
    used = set(re.findall(r"\w+", json.dumps([needed, own])))
    imports = [one for one in dict.fromkeys(merged["imports"]) if one.split()[-1] in used]
    sizes = {key: value for key, value in student.items() if key in needed}
    return _initialized_in_run({"imports": imports, **brought, **own, **sizes})


def _needed(parser: ConfigParser, names: list[str]) -> dict[str, Any]:
    """What some ids refer to, in turn, by id."""
    waiting, found = list(names), {}
    while waiting:
        for reference in sorted(_references(parser[waiting.pop()])):
            if reference not in found:
                found[reference] = parser[reference]
                waiting.append(reference)
    return found


def _references(value: Any) -> set[str]:
    if isinstance(value, str):
        return {name.replace(ReferenceResolver.sep, "#") for name in ReferenceResolver.match_refs_pattern(value)}
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {reference for one in values for reference in _references(one)}


def _initialized_in_run(config: dict[str, Any]) -> dict[str, Any]:
    """MONAI puts a bundle's root on Python's path after `initialize`, when it runs: only then the copy is found."""
    return {**config, "initialize": [], "run": [*config["initialize"], *config["run"]]}
