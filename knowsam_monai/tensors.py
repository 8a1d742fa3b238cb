"""Helpers for tensors and networks: class logits, views of a student, plain tensors, and eval mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError


def class_numbers(label: torch.Tensor) -> torch.Tensor:
    """
    A label without metadata; of unsigned numbers with more than 8 bits, for which torch lacks operations, as int64.

    Args:
        label: of any type and shape.

    Example::

        >>> class_numbers(torch.tensor([1, 2], dtype=torch.uint16)).dtype, class_numbers(torch.tensor([True])).dtype
        (torch.int64, torch.bool)
    """
    label = without_meta(label)
    return label.long() if label.dtype in (torch.uint16, torch.uint32, torch.uint64) else label


def class_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of at least two classes, in at least float32, without metadata.

    One channel z is a sigmoid network, which equals a softmax over the logits ``(0, z)``. Gradients pass through.
    TorchScript can compile this function.

    Args:
        logits: (B, C, *spatial), any floating dtype and memory format.

    Returns:
        (B, max(C, 2), *spatial), float64 if ``logits`` is, else float32.

    Example::

        >>> class_logits(torch.tensor([[1.5]])).tolist()
        [[0.0, 1.5]]
    """
    logits = at_least_float32(logits)
    if logits.shape[1] == 1:
        logits = torch.cat((torch.zeros_like(logits), logits), dim=1)
    return logits


def predicted_label(logits: torch.Tensor) -> torch.Tensor:
    """The class with the largest logit at each pixel, (B, 1, *spatial); of one channel, True where it is above 0.

    Example::

        >>> predicted_label(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])).tolist()
        [[[0, 1]]]
    """
    return logits > 0 if logits.shape[1] == 1 else logits.max(1, keepdim=True).indices  # argmax is slow on CPUs


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor, in float64 if it is float64, else in float32."""
    tensor = without_meta(tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError if an argument is not a tensor."""
    if not isinstance(value, torch.Tensor):
        raise KnowSAMTypeError(f"`{name}` must be a tensor but is a {type(value).__name__}.")


def in_precision_of(module: nn.Module, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the precision of a module's first weights, as convolutions need it."""
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others are quantized
    dtype = next((p.dtype for p in module.parameters() if p.dtype in usual), None)
    return [at_least_float32(tensor) if dtype is None else tensor.to(dtype) for tensor in tensors]


def without_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor; a MetaTensor runs extra Python code at every operation."""
    if not torch.jit.is_scripting():
        tensor = _as_tensor(tensor)
    return tensor


@torch.jit.unused
def _as_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def mapped_tensors(values: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """
    A batch or an output with a function applied to each of its tensors.

    Args:
        values: nested mappings, lists, tuples and named tuples; other values stay as they are.
        function: is called with each tensor; parts for which it returns the tensor itself are returned without a copy.

    Example::

        >>> batch = {"image": torch.zeros(2, 1, 8, 8), "name": ["a", "b"]}
        >>> mapped_tensors(batch, lambda tensor: tensor) is batch
        True
        >>> mapped_tensors((torch.zeros(1), "a"), lambda tensor: tensor + 1)
        (tensor([1.]), 'a')
    """
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, Mapping):
        items: Any = {key: mapped_tensors(value, function) for key, value in values.items()}
        if all(items[key] is value for key, value in values.items()):
            return values
        if not isinstance(values, MutableMapping):
            return items
        mapped = copy.copy(values)
        for key, item in items.items():
            mapped[key] = item
        return mapped
    if isinstance(values, (tuple, list)):
        items = [mapped_tensors(value, function) for value in values]
        if all(item is former for item, former in zip(items, values)):
            return values
        if isinstance(values, tuple):
            return values._make(items) if hasattr(values, "_make") else tuple(items)
        mapped = copy.copy(values)
        mapped[:] = items
        return mapped
    return values


def unstack_views(
    pred: torch.Tensor, reference: torch.Tensor, name: str = "pred", remedy: str = ""
) -> tuple[torch.Tensor, ...]:
    """Split a prediction into the logits of its views; a plain network has one view.

    In train mode a multi-view student stacks its views along dimension 1, as MONAI's ``DynUNet`` stacks its deep
    supervision heads, so ``pred`` has one dimension more than the image. The views share memory with ``pred``.

    Args:
        pred: logits (B, C, *spatial), or stacked views (B, V, C, *spatial).
        reference: the image (B, channels, *spatial) or the label (B_l, 1, *spatial) of ``pred``; only its number of
            dimensions matters.
        name: what errors call ``pred``.
        remedy: for a ``pred`` that is not a tensor; the default names `logits_of` and a wrapper.

    Returns:
        One tensor (B, C, *spatial) for each view, in the order of the stack.

    Raises:
        TypeError: if ``pred`` is not a tensor.
        ValueError: if ``pred`` has neither as many dimensions as ``reference`` nor one more.

    Example::

        >>> fused, unet, vnet = unstack_views(torch.zeros(2, 3, 4, 32, 32), torch.zeros(2, 1, 32, 32))
        >>> tuple(fused.shape)
        (2, 4, 32, 32)
    """
    if not isinstance(pred, torch.Tensor):
        remedy = remedy or (
            "pick the logits with `logits_of` if there is such an argument, or wrap the network in one that returns "
            "only its logits"
        )
        raise KnowSAMTypeError(
            f"`{name}` must be a tensor of logits or stacked views but is a {type(pred).__name__}; {remedy}."
        )
    if pred.ndim == reference.ndim:
        return (pred,)
    if pred.ndim == reference.ndim + 1:
        return tuple(pred.unbind(1))
    raise KnowSAMValueError(
        f"`{name}` must be logits (B, C, *spatial) or stacked views (B, V, C, *spatial) but has shape "
        f"{tuple(pred.shape)} with a reference of shape {tuple(reference.shape)}; give image and label a channel "
        "dimension, and return one tensor from the network."
    )


def are_probabilities(logits: torch.Tensor) -> bool:
    """
    Whether the values look like the output of a softmax, or of a sigmoid for one channel.

    Args:
        logits: (B, C, *spatial).

    Example::

        >>> are_probabilities(torch.randn(2, 3, 4, 4)), are_probabilities(torch.randn(2, 3, 4, 4).softmax(1))
        (False, True)
    """
    if logits.shape[1] > 1:
        sums = logits.float().sum(1)
        return bool((logits >= 0).all() and ((sums - 1).abs() < 0.02).all())
    return bool(((logits >= 0) & (logits <= 1)).all() and logits.max() > logits.min())


def eval_mode_logits(output: Any, logits_of: Callable[[Any], Any] | None, image: torch.Tensor) -> Any:
    """
    The logits in a network's output in eval mode, in which some networks return them alone, without other outputs.

    Args:
        output: the network's output.
        logits_of: picks the logits in train mode; None: the output is the logits. It must not cut channels from logits
            that the network returns alone in eval mode.
        image: (B, channels, *spatial), the network's input; only its shape matters.

    Example::

        >>> image, logits = torch.zeros(2, 1, 8, 8), torch.zeros(2, 4, 8, 8)
        >>> eval_mode_logits(logits, lambda output: output[0], image) is logits  # and not the first row
        True
    """
    if logits_of is None:
        return output
    if not (isinstance(output, torch.Tensor) and output.ndim == image.ndim):
        return logits_of(output)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an index that is a text
            picked = logits_of(output)  # such as some of the channels
    except Exception:  # it picks from a tuple, a dictionary or a data class, and each refuses in its own way
        return output
    return picked if isinstance(picked, torch.Tensor) and picked.ndim == image.ndim else output


@contextmanager
def all_in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode for a while, then restore the mode of each (a host may freeze its normalization)."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train(modes[0][1])  # a network may do more in `train`, such as taking merged weights apart
        for module, mode in modes:
            module.training = mode
