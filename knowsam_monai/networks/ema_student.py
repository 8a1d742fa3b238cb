"""The averaged student of Mean Teacher and of the methods derived from it."""

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
from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice
from knowsam_monai.tensors import unstack_views
from knowsam_monai.wrappers import plain_network, plain_optimizer, stepped_parameters

logger = logging.getLogger(__name__)


class EMAStudent:
    """
    A copy of the student whose weights are the exponential moving average of the student's.

    .. math::
        \\theta'_t = \\alpha_t \\theta'_{t-1} + (1 - \\alpha_t) \\theta_t, \\qquad
        \\alpha_t = \\min(1 - 1/t, \\alpha)

    t counts the steps of the student's optimizer from 1, so the first step copies the student. The average is updated
    after each step of the optimizer, not after each iteration, so it stays correct under gradient accumulation and
    when GradScaler skips a step. It shares no memory with the student and has no gradient. In a distributed run all
    processes use the batch statistics of the first one. ``network`` is the averaged network in eval mode, for
    validation and checkpoints; ``state_dict`` also holds t.

    The averaging is torch's ``AveragedModel``. Ignite's EMAHandler has another warm-up (linear over a given number of
    iterations), and its two networks share their buffers.

    Args:
        network: the student; may be wrapped in DistributedDataParallel, DataParallel or torch.compile.
        optimizer: the student's; if there are several, the one that steps last.
        decay: alpha, 0..1; SSL4MIS and BCP use 0.99.
        warm_up: True: alpha_t follows the equation (Mean Teacher). False: alpha_t is alpha from the start (BCP).
        buffers: how to update the statistics of batch normalization: "copy" the student's after each step (SSL4MIS
            averages parameters only), or "average" them like the parameters (BCP). Counters are always copied.

    Raises:
        ValueError: if `decay` or `buffers` is not as described, or `optimizer` steps no parameter of `network`.

    Example::

        ema_student = EMAStudent(network, optimizer)
        SupervisedTrainer(..., train_handlers=[MeanTeacher(ema_student)])         # attaches it too
        SupervisedTrainer(..., train_handlers=[ema_student])                      # only averages, for validation
        SupervisedEvaluator(..., network=ema_student.network)
        CheckpointSaver(..., save_dict={"model": ema_student.network, "ema_student": ema_student})

    Reference: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
    """

    @check_types
    def __init__(
        self, network: nn.Module, optimizer: Optimizer, decay: float = 0.99, warm_up: bool = True, buffers: str = "copy"
    ) -> None:
        if not 0 <= decay <= 1:
            raise KnowSAMValueError(f"`decay` must be between 0 and 1 but is {decay}; the published value is 0.99.")
        check_choice("buffers", buffers, ("copy", "average"))
        student, optimizer = plain_network(network), plain_optimizer(optimizer)
        if set(stepped_parameters(optimizer)).isdisjoint(student.parameters()):
            raise KnowSAMValueError(
                "`optimizer` must step parameters of `network` but has none of them; pass the student's."
            )
        self.decay = decay
        self.warm_up = warm_up
        self.optimizer = optimizer
        self.average = AveragedModel(student, multi_avg_fn=self._average, use_buffers=buffers == "average")
        self.average.requires_grad_(False).eval()
        self._student = student
        self._handle: RemovableHandle | None = None
        self._has_warned = False

    @property
    def network(self) -> nn.Module:
        """The averaged network, in eval mode."""
        return self.average.module

    def attach(self, engine: Engine) -> None:
        """Follow the student from the start to the end of each run. Several handlers may attach the same average."""
        engine.add_event_handler(Events.STARTED, self.check_trainer)
        engine.add_event_handler(Events.STARTED, self.follow)
        engine.add_event_handler(Events.COMPLETED, self.unfollow)

    def check_trainer(self, engine: Engine) -> None:
        """
        Check that a trainer trains this average's student, with its optimizer; otherwise the average would never move.

        Raises:
            ValueError: if it has another network or another optimizer.
        """
        network, optimizer = getattr(engine, "network", None), getattr(engine, "optimizer", None)
        ours = set(self._student.parameters())
        for name, is_other in (
            ("network", isinstance(network, nn.Module) and ours.isdisjoint(network.parameters())),
            ("optimizer", isinstance(optimizer, Optimizer) and not _contains(optimizer, self.optimizer)),
        ):
            if is_other:
                raise KnowSAMValueError(
                    f"`{name}` of EMAStudent must be the trainer's but is not, so nothing would be averaged; build "
                    "EMAStudent from the trainer's network and optimizer."
                )

    @property
    def is_followed(self) -> bool:
        """Whether the student's steps update the average."""
        return self._handle is not None

    def follow(self) -> None:
        """Update the average after each step of the student's optimizer; further calls change nothing."""
        if self._handle is not None:
            return
        self.network.to(next(self._student.parameters()).device)
        if self.average.n_averaged == 0:  # nothing averaged or loaded yet: start with the current student
            self.average.update_parameters(self._student)
        self._handle = self.optimizer.register_step_post_hook(self._student_stepped)

    def restart(self) -> None:
        """Forget the average; the next :meth:`follow` starts it again from the student."""
        self.unfollow()
        self.average.n_averaged.zero_()

    def unfollow(self) -> None:
        """Stop updating and remove the hook from the student's optimizer; the average stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check_mode(self, mode: str) -> None:
        """
        Check a mode of :meth:`logits`; warn once if it is "dropout" but the network has no dropout layers.

        Raises:
            ValueError: if `mode` is unknown.
        """
        check_choice("ema_mode", mode, ("eval", "dropout", "train"))
        if mode == "dropout" and not self._has_warned and not any(map(_is_dropout, self.network.modules())):
            self._has_warned = True
            logger.warning(
                "%s has no dropout layers, so ema_mode='dropout' is the same as 'eval'. Add dropout to the network, or "
                "set ema_mode='eval' if noise on the image is enough.",
                type(self.network).__name__,
            )

    @torch.no_grad()
    def logits(
        self, image: Tensor, mode: str = "eval", inferer: Callable[[Tensor, nn.Module], Tensor] | None = None
    ) -> Tensor:
        """
        Logits of the averaged student; no mode changes its weights or buffers.

        Args:
            image: (B, channels, *spatial).
            mode: "eval"; "dropout": only dropout and drop-path layers are in train mode, so normalization uses its
                running statistics; or "train": the whole network is in train mode and uses batch statistics, as in
                SSL4MIS, and its buffers are restored afterwards.
            inferer: calls the network, ``f(image, network)``, usually the trainer's inferer; None: a plain call.

        Returns:
            (B, C, *spatial); view 0 of a multi-view student.
        """
        with self._in_mode(mode):
            pred = self.network(image) if inferer is None else inferer(image, self.network)
        return unstack_views(pred, image)[0]

    def state_dict(self) -> dict[str, Any]:
        """The averaged parameters and buffers, and the number of steps."""
        return self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average from a checkpoint."""
        self.average.load_state_dict(state_dict)

    def _student_stepped(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer skips overflows itself
        if found_inf is None or not found_inf:
            self.average.update_parameters(self._student)
            self._take_statistics_of_first_rank()

    def _take_statistics_of_first_rank(self) -> None:
        """Batch statistics differ between processes; every process uses those of the validated and saved average."""
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
        step = int(self.average.n_averaged)  # 1 at the first step: the initial copy counts as well
        decay = min(1 - 1 / step, self.decay) if self.warm_up else self.decay
        get_ema_multi_avg_fn(decay)(averaged, current, step)

    @contextmanager
    def _in_mode(self, mode: str) -> Iterator[None]:
        self.check_mode(mode)
        buffers = list(self.network.buffers()) if mode == "train" else []
        before = [buffer.clone() for buffer in buffers]
        self.network.train(mode == "train")
        for module in self.network.modules():
            if mode == "dropout" and _is_dropout(module):
                module.train()
        try:
            yield
        finally:
            self.network.eval()
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def _contains(optimizer: Any, inner: Optimizer, seen: set[int] | None = None) -> bool:
    """Whether an optimizer is `inner` or holds it, in wrappers or lists; `seen` has the ids of parts."""
    seen = set() if seen is None else seen
    if optimizer is inner or id(optimizer) in seen:
        return optimizer is inner
    seen.add(id(optimizer))
    parts = optimizer if isinstance(optimizer, (list, tuple)) else getattr(optimizer, "__dict__", {}).values()
    return any(_contains(part, inner, seen) for part in parts if isinstance(part, (list, tuple, Optimizer)))


def _is_dropout(module: nn.Module) -> bool:
    """Whether a module is dropout or drop-path with a probability above 0."""
    return isinstance(module, _DropoutNd) and module.p > 0 or isinstance(module, DropPath) and module.drop_prob > 0
