"""Weights files of several formats as plain state dicts, read without running code."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMImportError, KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.files import InvalidCheckpointError, expand_path, read_tensor_file
from knowsam_monai.texts import some

logger = logging.getLogger(__name__)

# keys under which trainers store the weights
WRAPPERS = ("model", "state_dict", "model_state_dict", "network", "net", "network_weights")
PREFIXES = {"module.": "saved from several GPUs", "_orig_mod.": "saved from a compiled model"}  # of all names
TRAINERS_PREFIXES = {"model.": "saved by a trainer", "sam.": "saved by a trainer"}  # no SAM's own names begin so
# changes of other weights: LoRA of peft, of diffusers and of SAMed; LoHa, LoKr, OFT, BOFT and IA3 of peft
CHANGES = ("lora_", "w_a_0", "w_b_0", "hada_w", "lokr_w", ".oft_", ".boft_", "ia3_l")
HEADS = {b"<": "a web page (HTML or XML)", b"version https://git-lfs": "a pointer of git-lfs"}
PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)


def checkpoint_path(checkpoint: str | os.PathLike[str]) -> str:
    """
    Expand the path of a checkpoint.

    Raises:
        TypeError: if it is not a path.
        ValueError: if it is empty.

    Example::

        >>> checkpoint_path("models/model.pt")
        'models/model.pt'
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise KnowSAMTypeError(f"`checkpoint` must be a path or None but is {checkpoint!r}; name the file of weights.")
    if not os.fspath(checkpoint):
        raise KnowSAMValueError("`checkpoint` must be a path or None but is ''; name the file of weights.")
    return expand_path(checkpoint, "checkpoint")


def refuse_changes(folder: Path, expectation: str) -> None:
    """
    Refuse a folder that peft wrote.

    Raises:
        ValueError: if it has peft's config.
    """
    if (folder / "adapter_config.json").is_file():
        raise _changes(expectation, ["adapter_config.json"])


def read_state_dict(
    path: str | os.PathLike[str],
    expectation: str,
    remedy: str = "copy it again",
    prefixes: Mapping[str, str] = MappingProxyType(PREFIXES),
    is_own: bool = False,
) -> dict[str, Tensor]:
    """
    Read a checkpoint's tensors by name.

    Other floating-point types are converted to float32, and prefixes of all names are removed; both are logged.

    Args:
        path: a file of ``torch.save`` or `safetensors`.
        expectation: beginning of error messages, "`checkpoint` must be ... but <path>".
        remedy: end of the message for a damaged file.
        prefixes: prefixes to remove, each with its explanation for the log.
        is_own: the weights are those of the user's own network, which may have any layers and types; they are not
            converted.

    Raises:
        OSError: if it cannot be opened.
        ImportError: if it is a `safetensors` file and that package is not installed.
        ValueError: if it is damaged or another file, if it has only changes (LoRA) of other weights, if a tensor is
            quantized, complex or sparse, or if it has NaN or infinite values.

    Example::

        state = read_state_dict("models/model.pt", "`path` must hold weights but models/model.pt")
    """
    with open(path, "rb") as file:
        head = file.read(512).lstrip()
    for start, found in HEADS.items():
        if head.startswith(start):
            raise KnowSAMValueError(f"{expectation} is {found}, saved in place of the download; {remedy}.")
    if os.fspath(path).endswith(".safetensors"):
        content: Any = _read_safetensors(path, expectation, remedy)
    else:
        try:
            content = read_tensor_file(path)
        except InvalidCheckpointError as error:
            if error.runs_code:
                remedy = f"if you trust the file, save its plain `state_dict()`; else {remedy}"
            raise KnowSAMValueError(f"{expectation} {error}; {remedy}.") from error
    while isinstance(content, dict) and (
        wrapped := next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    ):
        content = wrapped
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        kind = f"a dict of {some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise KnowSAMValueError(f"{expectation} holds {kind}; save the model's plain `state_dict()`.")
    changed = [name for name in content if any(part in name for part in CHANGES)]
    if changed and not is_own:
        raise _changes(expectation, changed)
    odd = {
        str(value.dtype if value.layout == torch.strided else value.layout)
        for value in content.values()
        if value.dtype not in PLAIN or value.layout != torch.strided or value.is_meta
    }
    if odd and not is_own:
        raise KnowSAMValueError(
            f"{expectation} holds tensors of {' and '.join(sorted(odd))}, quantized or of another unsupported type; "
            "use the file in float32 or half precision."
        )
    broken = [name for name, value in content.items() if not torch.isfinite(value).all()]
    if broken:
        raise KnowSAMValueError(f"{expectation} holds NaN or infinite values in {some(broken)}; {remedy}.")
    while prefix := next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in content)), None):
        logger.info("%s was %s: the prefix '%s' is removed from its names.", path, prefixes[prefix], prefix)
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    others = {x.dtype for x in content.values() if x.is_floating_point()} - {torch.float32}
    if others and not is_own:
        names = " and ".join(sorted(map(str, others)))
        rounded = "" if others == {torch.float64} else "; its values remain rounded"
        logger.warning("%s holds %s, which is converted to float32%s.", path, names, rounded)
        content = {name: value.float() if value.is_floating_point() else value for name, value in content.items()}
    return content


def load_strictly(module: nn.Module, state: dict[str, Tensor], expectation: str, remedy: str) -> None:
    """
    Load a state dict that must match the module exactly.

    Raises:
        ValueError: if a tensor is missing, unexpected, or has another shape or whole numbers for floats.

    Example::

        load_strictly(network, state, "`path` must hold the network's weights but model.pt", "use its own file")
    """
    expected = module.state_dict()
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    rounded = [
        name
        for name, value in expected.items()
        if value.is_floating_point() and name in state and not state[name].is_floating_point()
    ]
    problems = [
        ("lacks", [name for name in expected if name not in state]),
        ("has unexpected", [name for name in state if name not in expected]),
        ("has other shapes in", misshapen),
        ("has whole numbers in", rounded),
    ]
    found = [f"{verb} {some(names)}" for verb, names in problems if names]
    if found:
        raise KnowSAMValueError(f"{expectation} holds another model ({'; '.join(found)}); {remedy}.")
    module.load_state_dict(state)


def _changes(expectation: str, names: Iterable[str]) -> KnowSAMValueError:
    return KnowSAMValueError(
        f"{expectation} holds a LoRA or the like, changes of other weights ({some(names)}); merge it into its base "
        "model (`merge_and_unload` of peft) and use the merged file."
    )


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
