"""Weights files of several formats as plain state dicts, read without running code."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMImportError, KnowSAMValueError
from knowsam_monai.files import InvalidCheckpointError, read_tensor_file

logger = logging.getLogger(__name__)

WRAPPERS = ("model", "state_dict", "network", "net", "network_weights")  # keys under which trainers store the weights
PREFIXES = {"module.": "saved from several GPUs", "_orig_mod.": "saved from a compiled model"}  # of all names
LORA = ("lora_A", "lora_B", "lora_down", "lora_up", "w_a_0", "w_b_0")  # of peft, of diffusers, of SAMed


def read_state_dict(path: str | os.PathLike[str], expectation: str, remedy: str = "copy it again") -> dict[str, Tensor]:
    """
    Read a checkpoint's tensors by name.

    Tensors in half precision are converted to float32, and the prefixes "module." and "_orig_mod." of all names are
    removed; both are logged.

    Args:
        path: a file of ``torch.save`` or `safetensors`.
        expectation: beginning of error messages, "`checkpoint` must be ... but <path>".
        remedy: end of the message for a damaged file.

    Raises:
        ImportError: if it is a `safetensors` file and that package is not installed.
        ValueError: if it is damaged or another file, if it has only low-rank changes (LoRA) of other weights, or if a
            tensor has NaN or infinite values.

    Example::

        state = read_state_dict("models/model.pt", "`path` must hold weights but models/model.pt")
    """
    if os.fspath(path).endswith(".safetensors"):
        content: Any = _read_safetensors(path, expectation, remedy)
    else:
        try:
            content = read_tensor_file(path)
        except InvalidCheckpointError as error:
            if error.runs_code:
                remedy = f"if you trust the file, save its plain `state_dict()`; else {remedy}"
            raise KnowSAMValueError(f"{expectation} {error}; {remedy}.") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        kind = f"a dict of {some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise KnowSAMValueError(f"{expectation} holds {kind}; save the model's plain `state_dict()`.")
    low_rank = [name for name in content if any(part in name for part in LORA)]
    if low_rank:
        raise KnowSAMValueError(
            f"{expectation} holds a LoRA, low-rank changes of other weights ({some(low_rank)}); merge it into its base "
            "model (`merge_and_unload` of peft) and use the merged file."
        )
    broken = [name for name, value in content.items() if not torch.isfinite(value).all()]
    if broken:
        raise KnowSAMValueError(f"{expectation} holds NaN or infinite values in {some(broken)}; {remedy}.")
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in content)), None):
        logger.info("%s was %s: the prefix '%s' is removed from its names.", path, PREFIXES[prefix], prefix)
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    half = {str(x.dtype) for x in content.values() if x.is_floating_point() and x.element_size() < 4}
    if half:
        logger.warning(
            "%s holds %s, which is converted to float32; its values remain rounded.", path, " and ".join(half)
        )
        content = {name: value.float() if value.is_floating_point() else value for name, value in content.items()}
    return content


def load_strictly(module: nn.Module, state: dict[str, Tensor], expectation: str, remedy: str) -> None:
    """
    Load a state dict that must match the module exactly.

    Raises:
        ValueError: if a tensor is missing, unexpected, or has another shape.

    Example::

        load_strictly(network, state, "`path` must hold the network's weights but model.pt", "use its own file")
    """
    expected = module.state_dict()
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        ("lacks", [name for name in expected if name not in state]),
        ("has unexpected", [name for name in state if name not in expected]),
        ("has other shapes in", misshapen),
    ]
    found = [f"{verb} {some(names)}" for verb, names in problems if names]
    if found:
        raise KnowSAMValueError(f"{expectation} holds another model ({'; '.join(found)}); {remedy}.")
    module.load_state_dict(state)


def some(names: Iterable[str], limit: int = 3) -> str:
    """List the first names and the number of the others.

    Example::

        >>> some(["a", "b", "c", "d"])
        '`a`, `b`, `c` and 1 more'
    """
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + rest or "nothing"


def _read_safetensors(path: str | os.PathLike[str], expectation: str, remedy: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise KnowSAMImportError(
            f"{expectation} cannot be read without `safetensors`, which is not installed; install it with "
            "`pip install 'safetensors>=0.4'` (the extra `sam2`)."
        ) from error

    try:
        return load_file(path)
    except SafetensorError as error:
        raise KnowSAMValueError(f"{expectation} is truncated or not a safetensors file; {remedy}.") from error
