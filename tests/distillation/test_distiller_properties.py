"""The distiller on arbitrary batches: equal to loops in float64, or one clear error; never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.losses import DistillationLoss
from tests.properties import assert_right, cases, dice_ce, few, log_softmax, pixels


class RowTeacher(nn.Module):
    """A promptable teacher in float32 that takes any precision: a p + b x for prompt p and image x, class by class."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.prompt_weight = nn.Parameter(torch.linspace(-0.5, 0.7, num_classes))
        self.image_weight = nn.Parameter(torch.linspace(0.3, -0.2, num_classes))

    def forward(self, image, prompt_logits):
        shape = (1, -1) + (1,) * (image.ndim - 2)
        wide = torch.float64 if prompt_logits.dtype == torch.float64 else torch.float32
        return self.prompt_weight.view(shape) * prompt_logits.to(wide) + self.image_weight.view(shape) * image.to(wide)


def divergence(student, teacher, temperature):
    terms = []
    for q, p in zip(pixels(student), pixels(teacher)):
        log_q, log_p = (log_softmax([value / temperature for value in values]) for values in (q, p))
        terms.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q)))
    return temperature**2 * sum(terms) / len(terms)


def build(case, **options):
    teacher = RowTeacher(case.classes)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    return SAMDistiller(teacher, optimizer, DistillationLoss(2.0), **{"gate": "none", **options})


@few
@given(cases(), st.sampled_from((1, 3)), st.booleans(), st.sampled_from((torch.uint8, torch.int64, torch.float32)))
def test_both_losses(case, num_views, all_labeled, label_dtype):
    """A batch with fewer labels than rows, or a label for every row of which the first are named."""
    image, views = case.image(), [case.logits() for _ in range(num_views)]
    num_labeled = case.labeled
    case.labeled = case.rows if all_labeled else num_labeled
    label = case.label(label_dtype)
    logits = views[0] if num_views == 1 else torch.stack(views, dim=1)
    logits = logits.detach().clone().requires_grad_()
    distiller = build(case, taught_views=(1, 2) if num_views == 3 else (0,))
    found = distiller(image, logits, label, labeled_rows=num_labeled if all_labeled else "all", weight=0.5)

    teacher_logits = distiller.teacher(image.double(), views[0].double()).detach()
    taught = views[1:] if num_views == 3 else views
    expected = 0.5 * sum(divergence(view, teacher_logits, 2.0) for view in taught)
    assert_right(found.distillation_loss, expected, scale=4 * case.scale)
    expected = dice_ce(teacher_logits[:num_labeled], label[:num_labeled])
    assert_right(found.sam_loss, expected, scale=case.scale)
    assert type(found.teacher_logits) is torch.Tensor and not found.teacher_logits.requires_grad
    assert torch.allclose(found.teacher_logits.double(), teacher_logits, atol=1e-4 * (1 + case.scale))

    found.loss.backward()
    gradients = [logits.grad, *(parameter.grad for parameter in distiller.teacher.parameters())]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@few
@given(cases(min_rows=2), st.data())
def test_labeled_rows_anywhere(case, data):
    """A slice selects the rows from which SAM learns, at any position."""
    start = data.draw(st.integers(0, case.rows - 1))
    rows = slice(start, data.draw(st.integers(start + 1, case.rows)), data.draw(st.sampled_from((None, 2))))
    case.labeled = case.rows
    image, logits, label = case.image(), case.logits(), case.label()
    distiller = build(case)
    found = distiller(image, logits, label, labeled_rows=rows)
    teacher_logits = distiller.teacher(image.double(), logits.double()).detach()
    assert_right(found.distillation_loss, divergence(logits, teacher_logits, 2.0), scale=4 * case.scale)
    assert_right(found.sam_loss, dice_ce(teacher_logits[rows], label[rows]), scale=case.scale)
    assert torch.allclose(found.teacher_logits.double(), teacher_logits, atol=1e-4 * (1 + case.scale))


@few
@given(cases())
def test_batch_without_labels_teaches_and_trains_no_teacher(case):
    image, logits = case.image(), case.logits()
    distiller = build(case)
    found = distiller(image, logits)
    teacher_logits = distiller.teacher(image.double(), logits.double()).detach()
    assert_right(found.distillation_loss, divergence(logits, teacher_logits, 2.0), scale=4 * case.scale)
    assert found.sam_loss.item() == 0 and not found.sam_loss.requires_grad


@few
@given(cases(min_rows=2), st.sampled_from(("rows", "size", "value", "classes", "image rows", "image size", "views")))
def test_what_does_not_belong_together_is_one_clear_error(case, fault):
    image, logits, label = case.image(), case.logits(), case.label()
    distiller = build(case, taught_views=(0, 5) if fault == "views" else (0,))
    if fault == "rows":
        label = label[:1].expand(case.rows + 1, *label.shape[1:])
    elif fault == "size":
        label = torch.cat([label, label], dim=-1)
    elif fault == "value":
        label = label + max(case.classes, 2)
    elif fault == "classes":
        logits = case.logits(classes=case.classes + 1)
    elif fault == "image rows":
        image = image[:1]
    elif fault == "image size":
        image = torch.cat([image, image], dim=-1)
    else:
        logits = torch.stack([logits, logits], dim=1)
    with pytest.raises(ValueError, match="` must "):
        distiller(image, logits, label)
