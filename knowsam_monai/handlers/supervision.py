"""Checks and rows that the methods share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from ignite.engine import Engine
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.losses.ramp_up import Weight, weight_at
from knowsam_monai.losses.supervised import check_loss_takes, has_sigmoid
from knowsam_monai.tensors import unstack_views
from knowsam_monai.wrappers import plain_network


def check_supervision(engine: Engine) -> None:
    """
    Raise a clear error if a bare loss is about to get fewer labels than rows.

    Every method with unlabeled rows registers this check with ``IterationEvents.FORWARD_COMPLETED``, which a MONAI
    trainer fires right before its loss.

    Raises:
        ValueError: if the batch has unlabeled rows and the trainer's loss comes from torch or MONAI.
    """
    image, label = engine.state.output[Keys.IMAGE], engine.state.output.get(Keys.LABEL)
    if label is not None:
        check_loss_takes(getattr(engine, "loss_function", None), num_rows=len(image), num_labels=len(label))


def check_exclusive_classes(engine: Engine) -> None:
    """
    The same as :func:`check_supervision`, for a method that takes the softmax of its predictions.

    Raises:
        TypeError: if the student's output is not a tensor of logits or views, even if the method starts later.
        ValueError: also if a label has several channels that are overlapping regions instead of exclusive classes.
    """
    check_supervision(engine)
    unstack_views(engine.state.output[Keys.PRED], engine.state.output[Keys.IMAGE])
    label = engine.state.output.get(Keys.LABEL)
    is_sigmoid = has_sigmoid(getattr(engine, "loss_function", None))
    if label is None or is_sigmoid is False:
        return
    if is_sigmoid or (engine.state.iteration == 1 and not bool((label.sum(1) == 1).all())):
        check_one_channel(label, engine.state.output[Keys.IMAGE])


def check_one_channel(label: Tensor, image: Tensor) -> None:
    """Raise a ValueError if a label has several channels, one for each region, instead of one with class numbers.

    Args:
        label: (B_l, channels, *spatial).
        image: (B, channels, *spatial); a label of fewer dimensions lacks its channel, which the loss reports.
    """
    if label.ndim == image.ndim and label.shape[1] > 1:
        raise KnowSAMValueError(
            f"`label` must have one channel of class numbers but has {label.shape[1]}: of the semi-supervised methods, "
            "only SAMDistillation takes overlapping regions; remove the others."
        )


def weight_now(engine: Engine, weight: Weight, start: int, needs_unlabeled: bool = True) -> float:
    """
    The weight of a term at this iteration, 0 before its start.

    Args:
        engine: a trainer after its forward pass.
        weight: a number or a function of the iteration.
        start: first iteration with the term.
        needs_unlabeled: raise an error at the first step, not only at `start`, if the batch has no unlabeled rows.
    """
    iteration = engine.state.iteration
    if needs_unlabeled and iteration == 1 and weight != 0:
        unlabeled_rows(engine.state.output)
    return weight_at(weight, iteration, start)


def check_ignores(name: str, loss: object, ignore_index: int) -> None:
    """
    Raise a ValueError if a loss is known not to ignore a label value.

    Args:
        name: the argument that holds the loss.
        loss: a loss, or one that wraps it as `loss`; without an `ignore_index` of its own, it may be right.
        ignore_index: the value.
    """
    inner = getattr(loss, "loss", loss)
    if getattr(inner, "ignore_index", ignore_index) != ignore_index:
        raise KnowSAMValueError(
            f"`{name}` must ignore the label {ignore_index}, since BidirectionalCopyPaste gives it to pixels without a "
            f"true label, but its `ignore_index` is {inner.ignore_index}; use `dice_ce_loss(num_classes, "
            f"ignore_index={ignore_index})`."
        )


def logits_from(pred: Any, logits_of: Callable[[Any], Tensor] | None) -> Tensor:
    """
    The logits, or stacked views, in a network's output.

    Args:
        pred: the output.
        logits_of: picks them; None: the output is the logits.

    Raises:
        TypeError: if that is not a tensor.
    """
    logits = pred if logits_of is None else logits_of(pred)
    if not isinstance(logits, Tensor):
        raise KnowSAMTypeError(
            f"`pred` must be logits but is a {type(logits).__name__}; pick the logits with `logits_of`."
        )
    return logits


def has_deep_supervision(network: nn.Module) -> bool:
    """
    Whether a student in train mode stacks its output and its deep supervision heads, which are not views.

    MONAI's ``DynUNet`` and others say so in an attribute ``deep_supervision``.

    Args:
        network: wrapped or not.
    """
    return getattr(plain_network(network), "deep_supervision", False) is True


def autocast_of(engine: Engine) -> AbstractContextManager:
    """
    Mixed precision as in the trainer's own forward pass, for a pass outside of it.

    Args:
        engine: a MONAI trainer.

    Example::

        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: None)
        >>> engine.amp = False
        >>> with autocast_of(engine):
        ...     torch.is_autocast_enabled("cuda")
        False
    """
    is_off = not engine.amp or engine.scaler is None
    return nullcontext() if is_off else torch.autocast("cuda", **engine.amp_kwargs)


def unlabeled_rows(output: dict) -> slice:
    """
    The unlabeled rows of a trainer's output, which come after the labeled ones.

    Raises:
        ValueError: if every row has a label, so a method for unlabeled rows would silently do nothing.
    """
    num_rows, label = len(output[Keys.IMAGE]), output.get(Keys.LABEL)
    num_labeled = 0 if label is None else len(label)
    if num_labeled >= num_rows:
        raise KnowSAMValueError(
            f"`image` must have unlabeled rows after the {num_labeled} labeled ones but has {num_rows} rows; "
            "leave the label key out of unlabeled items, as SemiSupervisedLoader does, or remove this method."
        )
    return slice(num_labeled, None)
