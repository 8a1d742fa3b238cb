"""Configs of the zip that need no package: evaluation and inference, with the sizes of the weights that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from zoo.scripts import PACKAGE

# the configs' choice between the published recipe and the phantom
CHOICE = " if @dataset_dir else "


def standalone_configs(configs: Path, phantom: bool) -> dict[str, dict[str, Any]]:
    """
    What of a bundle's configs runs on the copied code; the names in it are still the package's.

    ``train.json`` and the overlays of methods stay as they are: who trains has the package.

    Args:
        configs: the bundle's folder of configs.
        phantom: whether the weights are the phantom's, else of a data set: sizes that depend on it are written out.

    Returns:
        contents by file name: evaluation, inference, and the overlays of networks, which both take.
    """
    inference = ConfigParser.load_config_file(configs / "inference.json")
    return {
        "evaluate.json": _evaluation(configs, phantom),
        "inference.json": _initialized_in_run({**inference, **_sizes(inference, phantom)}),
        **{path.name: ConfigParser.load_config_file(path) for path in sorted(configs.glob("network_*.json"))},
    }


def _evaluation(configs: Path, phantom: bool) -> dict[str, Any]:
    """Evaluation over an unchanged ``train.json``: it brings itself whatever it needs of the package."""
    merged = ConfigParser.load_config_files([str(configs / name) for name in ("train.json", "evaluate.json")])
    own = ConfigParser.load_config_file(configs / "evaluate.json")
    own = {key: value for key, value in own.items() if not key.startswith("+")}
    needed = _needed(ConfigParser(merged), ["initialize", "run"])
    of_package = {name: value for name, value in needed.items() if PACKAGE in json.dumps(value)}
    parts = {*own, *of_package}
    brought = {k: v for k, v in of_package.items() if not any(k.startswith(f"{part}#") for part in parts)}
    used = set(re.findall(r"\w+", json.dumps([needed, own])))
    imports = [one for one in dict.fromkeys(merged["imports"]) if one.split()[-1] in used]
    sizes = _sizes({key: value for key, value in needed.items() if key in merged}, phantom)
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


def _sizes(config: dict[str, Any], phantom: bool) -> dict[str, Any]:
    """What the choices between data set and phantom come to."""
    choices = {key: value for key, value in config.items() if isinstance(value, str) and CHOICE in value}
    parser = ConfigParser({**choices, "dataset_dir": None if phantom else "a data set"})
    return {key: parser.get_parsed_content(key) for key in choices}


def _initialized_in_run(config: dict[str, Any]) -> dict[str, Any]:
    """MONAI puts a bundle's root on Python's path after `initialize`, when it runs: only then the copy is found."""
    return {**config, "initialize": [], "run": [*config["initialize"], *config["run"]]}
