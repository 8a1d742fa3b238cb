"""Two nested states are the same bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def assert_same_bits(ours: Any, theirs: Any, name: str = "") -> None:
    assert type(ours) is type(theirs), name
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) or (ours.isnan().any() and ours.numpy().tobytes() == theirs.numpy().tobytes())
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same_bits(ours[key], theirs[key], f"{name}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), name
        for index, pair in enumerate(zip(ours, theirs)):
            assert_same_bits(*pair, f"{name}/{index}")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), name
