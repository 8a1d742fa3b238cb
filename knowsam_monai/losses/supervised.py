"""The supervised loss on the labeled rows of a batch, for each view of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.labeled_rows import Rows, labeled_slice
from knowsam_monai.losses.regions import region_loss
from knowsam_monai.tensors import at_least_float32, class_logits, class_numbers, unstack_views, without_meta

ADD_A_CHANNEL = "pass `label[:, None]`"


def dice_ce_loss(num_classes: int = 4, ignore_index: int | None = None) -> nn.Module:
    """The supervised loss of KnowSAM: cross-entropy + Dice, each with weight 1.

    Both include the background. Dice is computed over the whole batch with a squared denominator. One channel is a
    sigmoid network: the loss is that of the two classes ``(0, z)``, regardless of `num_classes`.

    Args:
        num_classes: C, the channels of the logits; used to check `ignore_index` only.
        ignore_index: a label value that is not a class; both terms leave its pixels out. None: every pixel counts.

    Raises:
        ValueError: if ``ignore_index`` is a class.

    Example::

        >>> loss = dice_ce_loss()
        >>> loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)).ndim
        0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 4 and 12.
    """
    return _DiceCELoss(num_classes, ignore_index)


class _DiceCELoss(nn.Module):
    """See :func:`dice_ce_loss`; 0 if every pixel is ignored."""

    def __init__(self, num_classes: int, ignore_index: int | None) -> None:
        super().__init__()
        if ignore_index is not None and 0 <= ignore_index < max(num_classes, 2):
            raise KnowSAMValueError(
                f"`ignore_index` must be outside the classes 0..{max(num_classes, 2) - 1} but is {ignore_index}; "
                "255 is a common choice."
            )
        self.ignore_index = ignore_index
        self.dice = DiceLoss(softmax=True, to_onehot_y=True, batch=True, squared_pred=True, ignore_index=ignore_index)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits, label = class_logits(logits), class_numbers(label)
        target = label[:, 0].long()
        if self.ignore_index is None:
            return self.dice(logits, label) + F.cross_entropy(logits, target)
        ce = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")
        return self.dice(logits, label) + ce / (label != self.ignore_index).sum().clamp(min=1)


class PartiallyLabeledLoss(nn.Module):
    """A supervised loss on the labeled rows, by default the first of the batch, summed over the student's views.

    ``L_sup = sum_v w_v * loss(pred_v[:B_l], label)``, in at least float32, under autocast too.

    Args:
        loss: loss(logits (B_l, C, *spatial), label (B_l, 1, *spatial)), of which the mean is used; ``None`` is
            :func:`dice_ce_loss` for any C. If it ignores a label value, its attribute `ignore_index` must say so.
        view_weights: w_v of each view, in the order of the stack; ``None`` is 1 for each (eq. 12). The authors' code
            uses (1, 0.5, 0.5) for fused, U-Net and V-Net.
        overlapping: the C channels are regions that may overlap, each with a sigmoid and a label channel of its own.
            ``loss`` gets all channels at once, but :func:`dice_ce_loss` gets each alone, see
            :func:`knowsam_monai.losses.region_loss`.
        labeled_rows: the rows whose labels the student may see, if your batches have a label for every row: an int n
            (the first n), a slice, or "all". None: the first ``len(label)``, so all rows if every row has a label.

    Shape:
        - pred: logits (B, C, *spatial), or stacked views (B, V, C, *spatial)
        - label: class indices (B_l, 1, *spatial), 1 <= B_l <= B, or of all rows with `labeled_rows` given; if
          `overlapping`, 0 and 1 (B_l, C, *spatial). If C = 1 or `overlapping`, ``loss`` receives floats
        - output: scalar

    Raises:
        TypeError: if the label is None.
        ValueError: if there is no label or there are more labels than rows, the spatial shapes differ, a label is
            outside the classes, or the number of ``view_weights`` is not the number of views.

    Example::

        >>> supervised_loss = PartiallyLabeledLoss()
        >>> supervised_loss(torch.zeros(4, 3, 2, 8, 8), torch.zeros(2, 1, 8, 8)).ndim
        0

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 4 and 12.
    """

    @check_types
    def __init__(
        self,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        view_weights: Sequence[float] | None = None,
        overlapping: bool = False,
        labeled_rows: Rows = None,
    ) -> None:
        super().__init__()
        if view_weights is not None and (min(view_weights, default=-1) < 0 or sum(view_weights) == 0):
            raise KnowSAMValueError(
                f"`view_weights` must be 0 or more, and at least one positive, but are {tuple(view_weights)}; "
                "pass one weight for each view, or None for 1 each."
            )
        self.loss = dice_ce_loss() if loss is None else loss
        self.view_weights = None if view_weights is None else tuple(view_weights)
        self.overlapping = overlapping
        if labeled_rows is not None:
            labeled_slice(labeled_rows, None, num_rows=1)  # refuses what cannot select rows
        self.labeled_rows = labeled_rows

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if label is None:
            raise KnowSAMTypeError("`label` must be a tensor but is None; put a labeled item into every batch.")
        label = class_numbers(label)
        if label.ndim > 1 and label.shape[1] != 1 and not self.overlapping:
            # otherwise `pred` may be stacked views of one channel
            _check_channel(label, pred.shape[2:])
            _check_channel(label, pred.shape[3:])
        views, rows = unstack_views(without_meta(pred), label), slice(len(label))
        if self.labeled_rows is not None:
            rows = labeled_slice(self.labeled_rows, label, len(pred))
            label = label[rows] if len(label) == len(pred) else label
        views = [view[rows] for view in views]
        check_label(views[0], label, getattr(self.loss, "ignore_index", None), self.overlapping)
        weights = (1.0,) * len(views) if self.view_weights is None else self.view_weights
        if len(weights) != len(views):
            raise KnowSAMValueError(
                f"`view_weights` must be one weight for each of the {len(views)} views but are {weights}. "
                "A plain network has one view, MultiViewNet has three (fused, unet, vnet); in a bundle, "
                "network_plain.json selects the plain network."
            )
        views = [at_least_float32(view) for view in views]
        if views[0].shape[1] == 1 or self.overlapping:
            label = label.to(views[0].dtype)
        by_region = self.overlapping and isinstance(self.loss, _DiceCELoss)
        loss = partial(region_loss if by_region else loss_of, self.loss)
        with torch.autocast(label.device.type, enabled=False):
            losses = [weight * loss(view, label).mean() for view, weight in zip(views, weights) if weight > 0]
        return torch.stack(losses).sum()


def loss_of(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """A loss for (B, C, *spatial) and (B, 1, *spatial); torch's cross-entropy takes class indices without a channel."""
    if type(loss) is nn.CrossEntropyLoss and logits.shape[1] == 1:
        raise KnowSAMValueError(
            "`loss` must apply a sigmoid for a network with one channel, as BCEWithLogitsLoss does, but is "
            "CrossEntropyLoss, which is 0 for a single class."
        )
    if isinstance(loss, nn.CrossEntropyLoss) and target.shape[1] == 1:
        target = target[:, 0].long()
    return loss(logits, target)


def check_label(
    logits: torch.Tensor,
    label: torch.Tensor,
    ignore_index: int | None = None,
    overlapping: bool = False,
    channel_remedy: str = ADD_A_CHANNEL,
) -> None:
    """Raise a clear error if a label does not fit the first rows of the logits.

    Args:
        logits: (B, C, *spatial).
        label: class indices (B_l, 1, *spatial); 0 and 1 (B_l, C, *spatial) if `overlapping`.
        ignore_index: a label value that is not a class; the loss leaves its pixels out.
        overlapping: each channel is a region that may overlap with others.
        channel_remedy: for a label without a channel.

    Raises:
        ValueError: if there is no label or there are more labels than rows, the spatial shapes differ, or a label on
            the CPU is outside the classes or not a whole number. On an accelerator the last two checks would make
            every step wait for the device, so the data checker has to find these faults.
    """
    num_rows, num_classes = logits.shape[:2]
    if len(label) == 0:
        raise KnowSAMValueError("`label` must have one row or more but has none; put a labeled item into every batch.")
    if len(label) > num_rows:
        raise KnowSAMValueError(
            f"`label` must have at most as many rows as `pred` ({num_rows}) but has {len(label)}. Labeled rows come "
            "first in a batch, one label for each image."
        )
    channels = num_classes if overlapping else 1
    if not overlapping:
        _check_channel(label, logits.shape[2:], channel_remedy)
    if label.ndim < 2 or label.shape[1] != channels or label.shape[2:] != logits.shape[2:]:
        if label.shape[1:2] == (num_classes,) and not overlapping:
            remedy = "combine its channels into one of class indices, or set `overlapping` if regions may overlap"
        else:
            values = "0 and 1 for each region" if overlapping else "one channel of class indices"
            remedy = f"load it with {values}, and resize it with its image"
        raise KnowSAMValueError(
            f"`label` must have shape (labeled rows, {', '.join(map(str, (channels, *logits.shape[2:])))}) but has "
            f"{tuple(label.shape)}; {remedy}."
        )
    if label.device.type == "cpu":
        values = label if ignore_index is None else label[label != ignore_index]
        top = 1 if overlapping else max(num_classes, 2) - 1  # a sigmoid network of one channel has two classes
        if values.numel() > 0 and not (values.min() >= 0 and values.max() <= top):
            what = "outside or inside of each region" if overlapping else "the classes of the network"
            raise KnowSAMValueError(
                f"`label` must be in 0..{top}, {what}, but is in "
                f"{values.min():g}..{values.max():g}; build the network for the labels' classes, map the labels, or "
                "give the loss an attribute `ignore_index` if it ignores such a value."
            )
        if values.is_floating_point() and not (values == values.floor()).all():
            broken = values[values != values.floor()][0]
            raise KnowSAMValueError(
                f'`label` must be class numbers but has {broken:g}; resize and rotate labels with mode "nearest".'
            )


def _check_channel(label: torch.Tensor, spatial_shape: torch.Size, remedy: str = ADD_A_CHANNEL) -> None:
    if label.shape[1:] == spatial_shape:
        raise KnowSAMValueError(
            f"`label` must have shape (labeled rows, 1, {', '.join(map(str, spatial_shape))}) but has "
            f"{tuple(label.shape)}; {remedy}."
        )


def check_loss_takes(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_rows: int, num_labels: int
) -> None:
    """Raise a clear error if a loss needs a label for every row but would get fewer.

    Args:
        loss: the trainer's loss. A :class:`PartiallyLabeledLoss`, alone or inside another module, accepts fewer labels,
            and so may a custom loss. The losses of torch and MONAI, and :func:`dice_ce_loss`, need one for each row.
        num_rows: B, rows of the batch.
        num_labels: B_l, rows with a label.

    Raises:
        ValueError: if ``num_labels`` is below ``num_rows`` and ``loss`` needs a label for every row.
    """
    if num_labels >= num_rows:
        return
    if _takes_every_label(loss):
        name = "dice_ce_loss" if isinstance(loss, _DiceCELoss) else getattr(loss, "__name__", type(loss).__name__)
        raise KnowSAMValueError(
            f"`loss_function` must be a PartiallyLabeledLoss if only {num_labels} of {num_rows} rows have a label "
            f"but is {name}; wrap it: PartiallyLabeledLoss(loss={name}(...))."
        )


def check_hides_labels(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_rows: int, num_labels: int, rows: slice
) -> None:
    """Raise a clear error if a loss would learn from labels that the student must not see.

    Args:
        loss: the trainer's loss. Only losses of torch and MONAI, :func:`dice_ce_loss` and :class:`PartiallyLabeledLoss`
            are known; one that ignores a label value may get it in the other rows.
        num_rows: B, rows of the batch.
        num_labels: B_l, rows with a label.
        rows: those whose labels the student may see.

    Raises:
        ValueError: if every row has a label, and ``loss`` uses that of a row outside of ``rows``.
    """
    visible = range(num_rows)[rows]
    if num_labels < num_rows or len(visible) == num_rows:
        return
    parts = list(loss.modules()) if isinstance(loss, nn.Module) else []
    ours = [part for part in parts if isinstance(part, PartiallyLabeledLoss)]
    parts += [part.loss for part in ours if not isinstance(part.loss, nn.Module)]
    if any(getattr(part, "ignore_index", None) not in (None, -100) for part in parts):
        return
    if any(_uses_hidden_labels(part, num_rows, visible) for part in ours) or (not ours and _takes_every_label(loss)):
        is_first = visible == range(len(visible))
        selected = visible.stop if is_first else f"slice{visible.start, visible.stop, visible.step}"
        remedy = f"PartiallyLabeledLoss(..., labeled_rows={selected}), or " if len(visible) > 0 else ""
        raise KnowSAMValueError(
            f"`loss_function` must use no other labels than those of the {len(visible)} of {num_rows} rows that "
            f'`labeled_rows` selects; make it {remedy}PartiallyLabeledLoss(..., labeled_rows="all") if the student may '
            "see every label, or the loss ignores those of the other rows."
        )


def _uses_hidden_labels(loss: PartiallyLabeledLoss, num_rows: int, visible: range) -> bool:
    """Not with "all", with which a user says that the student may see every label."""
    if loss.labeled_rows in (None, "all"):
        return loss.labeled_rows is None
    used = range(num_rows)[labeled_slice(loss.labeled_rows, None, num_rows)]
    return not set(used) <= set(visible)


def _takes_every_label(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    """Whether a loss is one of torch's or MONAI's, or :func:`dice_ce_loss`; a custom one may select rows."""
    parts = [type(module) for module in loss.modules()] if isinstance(loss, nn.Module) else [loss]
    return all(
        part is _DiceCELoss or getattr(part, "__module__", "").partition(".")[0] in ("torch", "monai") for part in parts
    )


def has_sigmoid(loss: Callable | None) -> bool | None:
    """
    Whether a loss applies a sigmoid to each channel (True) or a softmax over all (False); None if it does not tell.

    Args:
        loss: a loss of MONAI (whose attributes `sigmoid` and `softmax` tell) or of torch, or any module that contains
            one.

    Example::

        >>> has_sigmoid(DiceLoss(sigmoid=True)), has_sigmoid(nn.CrossEntropyLoss()), has_sigmoid(DiceLoss())
        (True, False, None)
    """
    if isinstance(loss, PartiallyLabeledLoss) and isinstance(loss.loss, _DiceCELoss):
        return loss.overlapping
    parts = list(loss.modules()) if isinstance(loss, nn.Module) else []
    told = {
        name == "sigmoid" for part in parts for name in ("sigmoid", "softmax") if getattr(part, name, False) is True
    }
    if not told:  # DiceCELoss contains both losses of torch, so its attributes come first
        told |= {not part.use_softmax for part in parts if isinstance(part, FocalLoss)}
        told |= {True for part in parts if isinstance(part, nn.BCEWithLogitsLoss)}
        told |= {False for part in parts if isinstance(part, nn.CrossEntropyLoss)}
    return told.pop() if len(told) == 1 else None
