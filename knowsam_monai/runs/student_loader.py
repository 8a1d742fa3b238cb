from __future__ import annotations

import logging
import os

from ignite.engine import Engine, Events
from torch import nn

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import expand_path
from knowsam_monai.teachers.weights import load_strictly, read_state_dict
from knowsam_monai.wrappers import plain_network

logger = logging.getLogger(__name__)


class StudentCheckpointLoader:
    """
    Load the weights of one network when a run starts, with an error that explains what is wrong.

    MONAI's ``MonaiAlgo`` switches off every validation handler with "CheckpointLoader" in its name, since it evaluates
    the weights of a server.

    Args:
        ckpt_path: file with a state dict, alone or as trainers, torch.compile and DistributedDataParallel wrap it.
        network: the student to load the weights into, strictly; it may be wrapped in DistributedDataParallel.
        num_classes: class count of `network`, for an error in terms of classes.

    Raises:
        ValueError: when the run starts, if the file is missing, is no state dict, belongs to another network or another
            number of classes, or has weights that are not finite.

    Example::

        SupervisedEvaluator(..., val_handlers=[StudentCheckpointLoader("models/model.pt", network)])
    """

    def __init__(self, ckpt_path: str | os.PathLike, network: nn.Module, num_classes: int | None = None) -> None:
        self.ckpt_path = expand_path(ckpt_path, "ckpt_path")
        self.network = network
        self.num_classes = num_classes

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer or evaluator."""
        engine.add_event_handler(Events.STARTED, self.load)

    def load(self) -> None:
        """Load the file."""
        network = plain_network(self.network)
        expectation = f"`ckpt_path` must hold the weights of {type(network).__name__} but {self.ckpt_path}"
        try:
            state = read_state_dict(self.ckpt_path, expectation, "train again, or use another checkpoint", is_own=True)
        except OSError as error:
            raise KnowSAMValueError(
                f"`ckpt_path` must be a student but {self.ckpt_path} cannot be read ({error.strerror or error}); "
                "train one with configs/train.json, or pass its path (--ckpt_path)."
            ) from error
        own = network.state_dict()
        remedy = (
            "use the `network_def` of its training; if an overlay had it, such as network_plain.json, add that after "
            "inference.json or evaluate.json"
        )
        different = [name for name in own if name in state and state[name].shape != own[name].shape]
        if different and own.keys() == state.keys():
            theirs, ours = state[different[-1]].shape, own[different[-1]].shape  # of the output layer, most likely
            if theirs[1:] == ours[1:] and ours[:1] == (self.num_classes,):
                remedy = (
                    f"it has {theirs[0]} classes, not {ours[0]}: set the class count (`class_names` or `num_classes`) "
                    "it was trained with"
                )
        load_strictly(network, state, expectation, remedy)
        logger.info("The weights are those of %s.", self.ckpt_path)
