"""
Load the network of a MONAI bundle and its weights without running the bundle's code.

A bundle's config is code: expressions after "$" are evaluated, and "_target_" can name any function. This module reads
only `network_def` of the ``inference`` config. It builds network classes with plain values, which is all that most
bundles have, and refuses anything else.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser
from torch import nn

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError, error_line
from knowsam_monai.files import expand_path
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.weights import load_strictly, read_state_dict
from knowsam_monai.texts import some

CONFIGS = tuple(f"configs/inference.{ending}" for ending in ("json", "yaml", "yml"))
MODEL, TORCHSCRIPT, METADATA = "models/model.pt", "models/model.ts", "configs/metadata.json"
PACKAGES = ("monai.networks", "knowsam_monai.networks", "torch.nn")  # a network may consist of their classes
BY_NAME = "monai.networks.nets"  # package of a class that is named without one


class BundleFacts(NamedTuple):
    """What a bundle states about its network; None or empty if it states nothing."""

    channel_names: dict[str, int]
    patch_size: tuple[int, ...] | None
    data_source: str | None
    license: str | None


@kept_random_state()
def build_bundle_network(folder: Path) -> nn.Module:
    """
    Build `network_def` of a bundle's inference config and load ``models/model.pt`` into it strictly.

    Raises:
        FileNotFoundError: if the config or the weights are missing.
        ValueError: if `network_def` is missing or has more than network classes and plain values, or if the weights
            belong to another network.

    Example::

        network = build_bundle_network(Path("ventricular_short_axis_3label"))
    """
    config_file = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if config_file is None:
        raise KnowSAMFileNotFoundError(f"`path` must be a bundle's folder but {folder} has no {CONFIGS[0]}.")
    try:
        config = ConfigParser.load_config_file(str(config_file))
        definition = config["network_def"]
    except KeyError:
        raise KnowSAMValueError(
            f"`path` must be a bundle with a network definition but {config_file} has no `network_def`; build "
            "the network yourself and pass it to `NetworkTeacher`."
        ) from None
    except Exception as error:  # the errors of JSON and YAML
        raise KnowSAMValueError(f"`path` must be a bundle but {config_file} cannot be read; copy it again.") from error
    network = _built(_resolved(definition, ConfigParser(config, globals=False), config_file), config_file)
    if not isinstance(network, nn.Module):
        raise KnowSAMValueError(f"`network_def` of {config_file} must be a network but is {definition!r}.")
    expectation = f"`path` must be a bundle with its network's weights but {folder / MODEL}"
    load_strictly(
        network, read_state_dict(folder / MODEL, expectation), expectation, "copy the config and weights again"
    )
    return network


def check_bundle(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """
    Return the path of a bundle's folder after checking that it has weights.

    Args:
        path: the folder.
        argument: name of the argument or key, for the error.

    Raises:
        FileNotFoundError: if it is not a folder or has no weights.

    Example::

        folder = check_bundle("ventricular_short_axis_3label")
    """
    folder = Path(expand_path(path, argument))
    if not folder.is_dir():
        raise KnowSAMFileNotFoundError(
            f"`{argument}` must be a bundle's folder but {folder} is not; unpack zip files first."
        )
    if not any((folder / name).is_file() for name in (MODEL, TORCHSCRIPT)):
        raise KnowSAMFileNotFoundError(
            f"`{argument}` must be a bundle with weights but {folder} has neither {MODEL} nor {TORCHSCRIPT}; download "
            f"it with `python -m monai.bundle download --name {folder.name} --bundle_dir {folder.parent}`."
        )
    return folder


def read_bundle_facts(folder: Path) -> BundleFacts:
    """
    Read ``metadata.json`` and LICENSE. Missing entries are None or empty.

    Raises:
        ValueError: if an entry of ``metadata.json`` is not in the Model Zoo's format.

    Example::

        names = read_bundle_facts(Path("ventricular_short_axis_3label")).channel_names     # {'background': 0, ...
    """
    file, license_file = folder / METADATA, folder / "LICENSE"
    try:
        metadata = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        formats = metadata.get("network_data_format", {})
        image = next(iter(formats.get("inputs", {}).values()), {})
        output = next(iter(formats.get("outputs", {}).values()), {})
        shape, names = image.get("spatial_shape", []), output.get("channel_def", {})
        is_patch = bool(image.get("is_patch_data") and shape and all(type(side) is int for side in shape))
        source = metadata.get("data_source") or None
        facts = BundleFacts(
            channel_names={str(name): int(index) for index, name in names.items()},
            patch_size=tuple(shape) if is_patch else None,
            data_source=source if source is None else ", ".join([source] if isinstance(source, str) else source),
            license=None,
        )
        if len(facts.channel_names) < len(names):
            raise KnowSAMValueError("two channels have one name")
    except Exception as error:  # of JSON, or of an entry of another type
        reason = f" ({error_line(error)})" if isinstance(error, ValueError) else ""
        raise KnowSAMValueError(
            f"`path` must be a bundle whose {METADATA} has the Model Zoo's format but {file} does not{reason}; correct "
            "it, or remove it and give `channels` as numbers."
        ) from error
    text = license_file.read_text(encoding="utf-8", errors="replace") if license_file.is_file() else ""
    return facts._replace(license=next((line.strip() for line in text.splitlines() if line.strip()), None))


def _resolved(value: Any, config: ConfigParser, file: Path, seen: tuple[str, ...] = ()) -> Any:
    """A value with its references to other plain values resolved."""
    if isinstance(value, dict):
        return {key: _resolved(item, config, file, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, config, file, seen) for item in value]
    if isinstance(value, str) and value.startswith("@"):
        found = config.get(value[1:])  # as the file has it: nothing is evaluated
        if value in seen or found is None:
            raise _refused(file, f"the reference {value}, which has no plain value")
        return _resolved(found, config, file, (*seen, value))
    if isinstance(value, str) and value.startswith(("$", "%")):
        raise _refused(file, f"the expression {value}")
    return value


def _built(value: Any, file: Path) -> Any:
    if isinstance(value, list):
        return [_built(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _built(item, file) for key, item in value.items()}
    arguments = {key: _built(item, file) for key, item in value.items() if key not in ("_target_", "_desc_")}
    special = [key for key in arguments if key.startswith("_")]
    if special:
        raise _refused(file, some(special))
    if arguments.get("pretrained"):
        raise _refused(file, "`pretrained`, which would download weights")
    network_class = _network_class(value["_target_"], file)
    try:
        return network_class(**arguments)
    except Exception as error:  # every network refuses in its own way
        raise KnowSAMValueError(
            f"`network_def` of {file} must have valid arguments but {network_class.__name__} refuses them "
            f"({error_line(error)}); correct it, or build the network yourself and pass it to `NetworkTeacher`."
        ) from error


def _network_class(target: Any, file: Path) -> type[nn.Module]:
    package, _, name = str(target).rpartition(".")
    package = package or BY_NAME
    if any(package == allowed or package.startswith(f"{allowed}.") for allowed in PACKAGES):
        try:
            found = getattr(importlib.import_module(package), name, None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise _refused(file, f"the target {target}, which is not a class of {', '.join(PACKAGES)}")


def _refused(file: Path, what: str) -> KnowSAMValueError:
    return KnowSAMValueError(
        f"`network_def` of {file} must have only network classes and plain values but has {what}. A config is code, "
        "and this package does not run the code of downloaded files; build the network yourself and pass it to "
        "`NetworkTeacher`, or use its TorchScript file (`from_torchscript`)."
    )
