"""The Dice by which a run chooses its best validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, do_metric_reduction

from knowsam_monai.runs.validation_case import class_dice, label_map


class MeanCaseDice(IgniteMetricHandler):
    """
    Mean Dice over the foreground classes of each case, then over the cases, as in all tables of this package.

    MONAI's ``MeanDice`` leaves a class out if the label lacks it, so false positives there would cost nothing. Here
    they give a Dice of 0. A class that neither label nor prediction has is left out.

    Args:
        num_classes: C, background included.
        output_transform: gives prediction and label, as of ``MeanDice``.

    Shape:
        prediction and label: (1, *spatial) class numbers or (C, *spatial) one-hot, decollated or as a batch.

    Example::

        SupervisedEvaluator(..., key_val_metric={"val_mean_dice": MeanCaseDice(4, from_engine(["pred", "label"]))})
    """

    def __init__(self, num_classes: int, output_transform: Callable[[Any], Any]) -> None:
        super().__init__(metric_fn=_CaseDice(num_classes), output_transform=output_transform)


class _CaseDice(CumulativeIterationMetric):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        preds, labels = (
            [label_map(case, self.num_classes, key) for case in cases]
            for key, cases in (("pred", y_pred), ("label", y))
        )
        return torch.stack([class_dice(*pair, self.num_classes) for pair in zip(preds, labels)])

    def aggregate(self) -> torch.Tensor:
        return do_metric_reduction(self.get_buffer(), "mean")[0]
