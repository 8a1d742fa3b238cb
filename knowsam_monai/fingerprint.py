"""What a run depends on, as plain data that two processes can compare."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

PLAIN = (str, int, float, bool, type(None))
NORMALISATIONS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")


def fingerprint(settings: Mapping[str, Any]) -> dict[str, str]:
    """
    One short text for each setting: itself where it is short, a hash of its description where it is long.

    Args:
        settings: plain values, networks, losses, transforms, handlers: objects are described by class and public
            attributes, networks by their layers and never by their weights.
    """
    return {name: _digest(describe(value)) for name, value in settings.items()}


def describe(value: Any, around: tuple[int, ...] = ()) -> Any:
    """JSON data that is equal for equal settings, in every process; what a run changes is left out."""
    if isinstance(value, PLAIN):
        return value
    if id(value) in around:
        return "itself"
    describe_part = functools.partial(describe, around=(*around, id(value)))
    if isinstance(value, Mapping):
        return {str(key): describe_part(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe_part(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return describe_part(value.tolist())
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, functools.partial):
        return [describe_part(value.func), describe_part(value.args), describe_part(value.keywords)]
    if isinstance(value, torch.optim.Optimizer):
        return [_name(type(value)), describe_part(value.defaults)]
    if isinstance(value, (torch.device, np.random.RandomState, torch.Generator)):
        return None  # where it runs, and where its generators stand
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _name(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    parts = {name: describe_part(part) for name, part in getattr(value, "__dict__", {}).items() if name[0] != "_"}
    if isinstance(value, nn.Module):
        parts.pop("training", None)
        parts.pop("process_group", None)
        parts.update({name: describe_part(child) for name, child in value.named_children()})
        parts.update({name: list(weight.shape) for name, weight in value.named_parameters(recurse=False)})
    kind = type(value).__name__
    return {"class": "BatchNorm" if kind in NORMALISATIONS else _name(type(value)), **parts}


def _digest(description: Any) -> str:
    text = json.dumps(description, sort_keys=True)
    return text if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
