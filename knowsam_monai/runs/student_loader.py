from __future__ import annotations

import logging
import os

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import InvalidCheckpointError, expand_path, read_tensor_file

logger = logging.getLogger(__name__)


class StudentLoader(CheckpointLoader):
    """
    MONAI's ``CheckpointLoader`` for the weights of one network, with an error that explains what is wrong.

    Args:
        load_path: file with a plain state dict, or with one under the key "model".
        network: the student to load the weights into, strictly; it may be wrapped in DistributedDataParallel.
        num_classes: class count of `network`, for an error in terms of classes.

    Raises:
        ValueError: when the run starts, if the file is missing, is no state dict, belongs to another network or another
            number of classes, or has weights that are not finite.

    Example::

        SupervisedEvaluator(..., val_handlers=[StudentLoader("models/model.pt", network)])
    """

    def __init__(self, load_path: str | os.PathLike, network: nn.Module, num_classes: int | None = None) -> None:
        load_path = expand_path(load_path, "load_path")
        super().__init__(load_path=load_path, load_dict={"model": network}, map_location="cpu")
        self.network = network
        self.num_classes = num_classes

    def __call__(self, engine: Engine) -> None:
        self.check()
        super().__call__(engine)

    def check(self) -> None:
        """Compare the file with the network without loading it."""
        loaded = _state_dict(self.load_path)
        network = getattr(self.network, "module", self.network)
        own = network.state_dict()
        kind = type(network).__name__
        missing = [name for name in own if name not in loaded]
        unknown = [name for name in loaded if name not in own]
        if missing or unknown:
            raise KnowSAMValueError(
                f"`load_path` must hold the weights of {kind} but {self.load_path} belongs to another network: "
                f"{_count(missing, 'missing')}, {_count(unknown, 'unknown')}; use the `network_def` of its training. "
                "If an overlay had it, such as network_plain.json, add that after inference.json or evaluate.json."
            )
        broken = [name for name in own if not torch.isfinite(loaded[name]).all()]
        if broken:
            raise KnowSAMValueError(
                f"`load_path` must hold finite weights but in {self.load_path} "
                f"{_count(broken, 'have NaN or infinite values')}; train again, or use another checkpoint."
            )
        different = [name for name in own if own[name].shape != loaded[name].shape]
        if not different:
            return
        name = different[-1]  # the output layer, if the class count differs
        theirs, ours = tuple(loaded[name].shape), tuple(own[name].shape)
        if theirs[1:] == ours[1:] and ours[0] == self.num_classes:
            raise KnowSAMValueError(
                f"`load_path` must hold the weights of a network with {ours[0]} classes but {self.load_path} has "
                f"{theirs[0]} ({name}); set the class count (`class_names` or `num_classes`) it was trained with."
            )
        raise KnowSAMValueError(
            f"`load_path` must hold the weights of this {kind} but in {self.load_path} {name} has shape {theirs}, "
            f"not {ours}; use the `network_def` it was trained with."
        )


def _state_dict(path: str) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        raise KnowSAMValueError(
            f"`load_path` must be a trained student but {path} does not exist; train one with configs/train.json, "
            "or pass its path (--ckpt_path)."
        )
    try:
        content = read_tensor_file(path)
    except InvalidCheckpointError as error:
        raise KnowSAMValueError(
            f"`load_path` must be a PyTorch state dict but {path} {error}; save `state_dict()`."
        ) from error
    except OSError as error:
        raise KnowSAMValueError(
            f"`load_path` must be a PyTorch state dict but {path} cannot be read: {error}."
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise KnowSAMValueError(f"`load_path` must be a PyTorch state dict but {path} holds something else.")
    return state


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} weights {what}" + (f" ({names[0]} ...)" if names else "")
