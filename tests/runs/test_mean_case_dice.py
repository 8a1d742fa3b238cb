from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.transforms import AsDiscrete

from knowsam_monai.runs import MeanCaseDice
from knowsam_monai.runs.validation_case import class_dice
from knowsam_monai.runs.validation_report import mean_over_cases

# label and prediction of three cases, two classes: Dice 1 and 2/3; nan and 0 (false positives); nan and nan
LABELS = torch.tensor([[[1, 2, 2, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])
PREDS = torch.tensor([[[1, 2, 0, 0]], [[2, 2, 2, 2]], [[0, 0, 0, 0]]])


def score(num_classes, *batches):
    engine = Engine(lambda _, batch: batch)
    MeanCaseDice(num_classes, lambda output: output).attach(engine, "dice")
    return engine.run(batches).metrics["dice"]


@pytest.mark.parametrize("form", ["numbers", "one-hot", "list"])
def test_false_positives_of_an_absent_class_count_and_a_class_that_both_lack_does_not(form):
    preds, labels = PREDS, LABELS
    if form == "one-hot":
        preds = torch.stack([AsDiscrete(to_onehot=3)(pred) for pred in PREDS])
    elif form == "list":
        preds, labels = list(PREDS), list(LABELS)
    assert score(3, (preds, labels)) == pytest.approx((5 / 6 + 0) / 2)


def test_it_is_the_mean_of_the_report():
    generator = torch.Generator().manual_seed(0)
    has_structures = torch.tensor([1, 1, 0, 1, 0]).view(5, 1, 1, 1)
    labels, preds = torch.randint(0, 4, (2, 5, 1, 6, 6), generator=generator) * has_structures
    dice = {str(n): class_dice(pred[0], label[0], 4) for n, (pred, label) in enumerate(zip(preds, labels))}
    batches = (preds[:2], labels[:2]), (preds[2:], labels[2:])
    assert score(4, *batches) == pytest.approx(mean_over_cases(dice)[-1])
