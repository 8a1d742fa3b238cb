"""The averaged student: the part that Mean Teacher and the methods that grew from it share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.networks.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import unstack_views
from knowsam_monai.wrappers import plain_network, plain_optimizer

logger = logging.getLogger(__name__)

BUFFERS = ("copy", "average")
MODES = ("eval", "dropout", "train")


class EMAStudent:
    """
    A copy of the student whose weights are the exponential moving average of the student's.

    .. math::
        \\theta'_t = \\alpha_t \\theta'_{t-1} + (1 - \\alpha_t) \\theta_t, \\qquad
        \\alpha_t = \\min(1 - 1/t, \\alpha)

    t counts the steps of the student's optimiser from 1, so the first step copies the student. The average moves only
    when the student has stepped: it hangs on the optimizer's step, not on iterations, and is right under gradient
    accumulation and where GradScaler skips a step. It shares no memory with the student and has no gradient. In a
    distributed run its batch statistics are the first process's.
    ``network`` is the averaged network, in eval mode, for validation and checkpoints; ``state_dict`` also holds t.

    Ignite's EMAHandler warms up otherwise (linearly over given iterations), and copies buffers by making both
    networks share them; the averaging here is torch's ``AveragedModel``.

    Args:
        network: the student. DistributedDataParallel, DataParallel and torch.compile around it are taken off.
        optimizer: the student's.
        decay: alpha, 0..1; SSL4MIS and BCP have 0.99.
        warm_up: whether alpha starts low (the equation; Mean Teacher). False: alpha throughout (BCP).
        buffers: what becomes of batch normalisation's statistics: "copy" the student's after each step (SSL4MIS
            averages parameters alone), or "average" them like the parameters (BCP). Counts are copied anyway.

    Raises:
        ValueError: when `decay` or `buffers` is none of these, or `optimizer` steps no parameter of `network`.

    Example::

        ema_student = EMAStudent(network, optimizer)
        SupervisedTrainer(..., train_handlers=[MeanTeacher(ema_student)])         # attaches it
        SupervisedTrainer(..., train_handlers=[ema_student])                      # averages, for validation alone
        SupervisedEvaluator(..., network=ema_student.network)
        CheckpointSaver(..., save_dict={"model": ema_student.network, "ema_student": ema_student})

    Reference: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, decay: float = 0.99, warm_up: bool = True, buffers: str = "copy"
    ) -> None:
        if not 0 <= decay <= 1:
            raise KnowSAMValueError(f"`decay` must be between 0 and 1 but is {decay}; the published one is 0.99.")
        if buffers not in BUFFERS:
            raise KnowSAMValueError(f"`buffers` must be one of {', '.join(BUFFERS)} but is {buffers!r}.")
        student, optimizer = plain_network(network), plain_optimizer(optimizer)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in stepped for parameter in student.parameters()):
            raise KnowSAMValueError(
                "`optimizer` must step parameters of `network` but has none of them; give the student's."
            )
        self.decay = decay
        self.warm_up = warm_up
        self.optimizer = optimizer
        self.average = AveragedModel(student, multi_avg_fn=self._average, use_buffers=buffers == "average")
        self.average.requires_grad_(False).eval()
        self._student = student
        self._handle: RemovableHandle | None = None
        self._said_no_dropout = False

    @property
    def network(self) -> nn.Module:
        """The averaged network, in eval mode."""
        return self.average.module

    def attach(self, engine: Engine) -> None:
        """Follow the student from the start of each run to its end. Several handlers may attach the same one."""
        engine.add_event_handler(Events.STARTED, self.follow)
        engine.add_event_handler(Events.COMPLETED, self.unfollow)

    @property
    def is_followed(self) -> bool:
        """Whether the average moves with the student's steps."""
        return self._handle is not None

    def follow(self) -> None:
        """Let the average move with each step of the student's optimiser, once however often this is called."""
        if self._handle is not None:
            return
        self.network.to(next(self._student.parameters()).device)
        if self.average.n_averaged == 0:  # nothing averaged or loaded yet: begin with the student as it is now
            self.average.update_parameters(self._student)
        self._handle = self.optimizer.register_step_post_hook(self._student_stepped)

    def restart(self) -> None:
        """Forget the average: it begins with the student as it is when it is followed next."""
        self.unfollow()
        self.average.n_averaged.zero_()

    def unfollow(self) -> None:
        """Leave the student's optimiser as it was; the average stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check_mode(self, mode: str) -> None:
        """
        Warn, once, when `mode` is "dropout" and the network has no dropout layers, so that nothing is drawn.

        Raises:
            ValueError: when `mode` is none of those of :meth:`logits`.
        """
        if mode not in MODES:
            raise KnowSAMValueError(f"`ema_mode` must be one of {', '.join(MODES)} but is {mode!r}.")
        if mode == "dropout" and not self._said_no_dropout and not any(map(_draws, self.network.modules())):
            self._said_no_dropout = True
            logger.warning(
                "%s has no dropout layers, so ema_mode='dropout' draws nothing and is the same as 'eval'. Give the "
                "network dropout, or set ema_mode='eval' if noise on the image is enough.",
                type(self.network).__name__,
            )

    @torch.no_grad()
    def logits(
        self, image: Tensor, mode: str = "eval", inferer: Callable[[Tensor, nn.Module], Tensor] | None = None
    ) -> Tensor:
        """
        What the averaged student says of an image; nothing in it changes, whatever the mode.

        Args:
            image: (B, channels, *spatial).
            mode: "eval"; "dropout", where dropout and drop-path layers alone are in train mode, so that normalization
                uses its running statistics and leaves them as they are (a network without such layers is named in a
                warning); or "train", the whole network (batch statistics, as SSL4MIS has it), after which the buffers
                are put back.
            inferer: how the network is called, a trainer's own as a rule; None calls it.

        Returns:
            (B, C, *spatial), of a multi-view student view 0.
        """
        with self._in_mode(mode):
            pred = self.network(image) if inferer is None else inferer(image, self.network)
        return unstack_views(pred, image)[0]

    def state_dict(self) -> dict[str, Any]:
        """Averaged parameters and buffers, and the number of steps."""
        return self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average.load_state_dict(state_dict)

    def _student_stepped(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser skips GradScaler's overflows inside
        if found_inf is None or not found_inf:
            self.average.update_parameters(self._student)
            self._take_statistics_of_first_rank()

    def _take_statistics_of_first_rank(self) -> None:
        """Batch statistics are each process's own; all of them ask the average that validation and checkpoints have."""
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        if ranks.is_distributed() and buffers:
            together = torch.cat([buffer.flatten() for buffer in buffers])
            torch.distributed.broadcast(together, src=0)
            for buffer, part in zip(buffers, together.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(part.view_as(buffer))

    def _average(self, averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            for target, source in zip(averaged, current):
                target.copy_(source)
            return
        step = int(self.average.n_averaged)  # 1 at the first: the copy before it counts
        decay = min(1 - 1 / step, self.decay) if self.warm_up else self.decay
        get_ema_multi_avg_fn(decay)(averaged, current, step)

    @contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        self.check_mode(mode)
        buffers = list(self.network.buffers()) if mode == "train" else []
        before = [buffer.clone() for buffer in buffers]
        self.network.train(mode == "train")
        for module in self.network.modules():
            if mode == "dropout" and _draws(module):
                module.train()
        try:
            yield
        finally:
            self.network.eval()
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def _draws(module: nn.Module) -> bool:
    """Whether a module is dropout or drop-path of a probability above 0."""
    return isinstance(module, _DropoutNd) and module.p > 0 or isinstance(module, DropPath) and module.drop_prob > 0
