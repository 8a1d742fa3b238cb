"""The zip's standalone configs: evaluation and inference, with the sizes of its weights."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver

from zoo.scripts import PACKAGE, rename


def standalone_configs(configs: Path, student: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Return the configs that will run on the copied code; their names are still the package's.

    All overlays are those of the bundle, since training needs the package.

    Args:
        configs: the bundle's folder of configs.
        student: network, classes and sizes of the weights.

    Returns:
        the contents of both configs by file name.
    """
    inference = ConfigParser.load_config_file(configs / "inference.json")
    sizes = {key: value for key, value in student.items() if key in inference}
    return {
        "evaluate.json": _evaluation(configs, student),
        "inference.json": _initialized_in_run({**inference, **sizes}),
    }


def training_config(configs: Path, student: dict[str, Any]) -> dict[str, Any]:
    """
    ``train.json`` with the copied network in the sizes of the weights, which ``monai.bundle.load`` builds without the
    package.

    A size that is the config's own without a data set, as the phantom's are, stays an expression, so that a training on
    a data set has the published one.

    Args:
        configs: the bundle's folder of configs.
        student: network, classes and sizes of the weights.
    """
    config = ConfigParser.load_config_file(configs / "train.json")
    config["network_def"] = student.get("network_def", config["network_def"])
    sizes = (_needed(ConfigParser(config), ["network_def"]).keys() & student.keys()) - {"is_phantom"}
    for key in sorted(sizes, key=lambda key: (key != "class_names", key)):  # the number of classes follows from them
        parser = ConfigParser(copy.deepcopy(config))  # which changes its config
        if parser.get_parsed_content(key) != student[key]:
            config[key] = student[key]
    config["network_def"] = json.loads(rename(json.dumps(config["network_def"])))
    return _initialized_in_run(config)


def _evaluation(configs: Path, student: dict[str, Any]) -> dict[str, Any]:
    """The evaluation overlay of an unchanged ``train.json``, with all parts that name the package."""
    merged = ConfigParser.load_config_files([str(configs / name) for name in ("train.json", "evaluate.json")])
    merged |= student
    own = ConfigParser.load_config_file(configs / "evaluate.json")
    own = {key: value for key, value in own.items() if not key.startswith("+")}
    needed = _needed(ConfigParser(merged), ["initialize", "run"])
    package_parts = {name: value for name, value in needed.items() if PACKAGE in json.dumps(value)}
    parts = {*own, *package_parts}
    copied = {k: v for k, v in package_parts.items() if not any(k.startswith(f"{part}#") for part in parts)}
    used = set(re.findall(r"\w+", json.dumps([needed, own])))
    imports = [line for line in dict.fromkeys(merged["imports"]) if line.split()[-1] in used]
    sizes = {key: value for key, value in student.items() if key in needed}
    return _initialized_in_run({"imports": imports, **copied, **own, **sizes})


def _needed(parser: ConfigParser, names: list[str]) -> dict[str, Any]:
    """The parts that some ids refer to, directly or indirectly, by id."""
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
    return {reference for element in values for reference in _references(element)}


def _initialized_in_run(config: dict[str, Any]) -> dict[str, Any]:
    """Move `initialize` to `run`: MONAI adds a bundle's root to Python's path in between."""
    return {**config, "initialize": [], "run": [*config["initialize"], *config["run"]]}
