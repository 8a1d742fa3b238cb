"""Each loss on arbitrary tensors: equal to loops in float64, or one clear error; never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowsam_monai.losses import (
    DistillationLoss,
    EntropyLoss,
    MutualConsistencyLoss,
    PartiallyLabeledLoss,
    PseudoLabelLoss,
    SoftmaxMSELoss,
    dice_ce_loss,
    entropy_map,
)
from tests.properties import assert_right, cases, dice_ce, few, first_largest, log_softmax, pixels, softmax


def finite_gradient(loss, *inputs) -> bool:
    """Whether the inputs of a loss have finite gradients."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    loss(*leaves).backward()
    return all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)


@few
@given(cases(), st.sampled_from((0.5, 1.0, 10.0)), st.booleans())
def test_distillation(case, temperature, from_two_classes):
    student = case.logits()
    teacher = case.logits(classes=2 if case.classes == 1 and from_two_classes else None)
    divergences = []
    for q, p in zip(pixels(student), pixels(teacher)):
        log_q, log_p = (log_softmax([value / temperature for value in values]) for values in (q, p))
        divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q)))
    expected = temperature**2 * sum(divergences) / len(divergences)
    loss = DistillationLoss(temperature)
    assert_right(loss(student, teacher), expected, scale=temperature * case.scale)
    assert finite_gradient(lambda logits: loss(logits, teacher), student)


@few
@given(cases())
def test_entropy(case):
    views = [case.logits() for _ in range(case.labeled)]
    means = []
    for view in views:
        entropies = [-sum(p * math.log(p) for p in softmax(values) if p > 0) for values in pixels(view)]
        found = entropy_map(view)
        assert found.shape == (case.rows, 1, *case.spatial) and bool(found.isfinite().all())
        assert found.flatten().tolist() == pytest.approx(entropies, abs=1e-5)
        means.append(sum(entropies) / len(entropies) / math.log(max(case.classes, 2)))
    assert_right(EntropyLoss()(*views), sum(means))
    assert finite_gradient(EntropyLoss(), *views)


@few
@given(cases(), st.sampled_from(("hard", "soft")))
def test_mutual_consistency(case, target):
    a, b = case.logits(), case.logits()
    terms = []
    for ours, theirs in zip(pixels(a), pixels(b)):
        for learner, other in ((ours, theirs), (theirs, ours)):
            log_probs = log_softmax(learner)
            sure = first_largest(other)
            weights = softmax(other) if target == "soft" else [float(c == sure) for c in range(len(other))]
            terms.append(-sum(w * log_prob for w, log_prob in zip(weights, log_probs)))
    loss = MutualConsistencyLoss(target)
    assert_right(loss(a, b), 2 * sum(terms) / len(terms), scale=case.scale)
    assert finite_gradient(loss, a, b)


@few
@given(cases(), st.sampled_from((0.0, 0.7, 0.95, 1.0)))
def test_pseudo_label(case, threshold):
    student, target = case.logits(), case.logits()
    terms, num_near = [], 0
    for values, targets in zip(pixels(student), pixels(target)):
        confidence = max(softmax(targets))
        num_near += abs(confidence - threshold) < 1e-6  # float32 may see it on the other side
        terms.append(-log_softmax(values)[first_largest(targets)] * (confidence >= threshold))
    loss = PseudoLabelLoss(threshold)
    if num_near == 0:
        assert_right(loss(student, target), sum(terms) / len(terms), scale=case.scale)
    assert finite_gradient(lambda logits: loss(logits, target), student)


@few
@given(cases(), st.sampled_from((None, 0.0, 0.5)))
def test_softmax_mse(case, share):
    student, target = case.logits(), case.logits()
    mask = None if share is None else torch.rand((case.rows, 1, *case.spatial), generator=case.generator) < share
    kept = [True] * student[:, :1].numel() if mask is None else mask.flatten().tolist()
    terms = [
        sum((p - q) ** 2 for p, q in zip(softmax(a), softmax(b))) / len(a) * is_kept
        for a, b, is_kept in zip(pixels(student), pixels(target), kept)
    ]
    assert_right(SoftmaxMSELoss()(student, target, mask), sum(terms) / max(sum(kept), 1))
    assert finite_gradient(lambda logits: SoftmaxMSELoss()(logits, target, mask), student)


MUTUAL = [MutualConsistencyLoss("hard"), MutualConsistencyLoss("soft")]


@pytest.mark.parametrize("loss", [DistillationLoss(), EntropyLoss(), *MUTUAL, PseudoLabelLoss(), SoftmaxMSELoss()])
def test_autocast_changes_nothing(loss):
    logits = 4 * torch.randn(2, 4, 6, 6), 4 * torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*logits)
    torch.testing.assert_close(found, loss(*logits))


LABEL_DTYPES = (torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64)


@few
@given(cases(), st.sampled_from(LABEL_DTYPES), st.integers(1, 5), st.sampled_from((None, 255, "all ignored")))
def test_supervised(case, label_dtype, present, ignored):
    ignore_index = None if ignored is None else 255
    pred, label = case.logits(), case.label(label_dtype, present)
    if ignored is not None:
        gone = torch.rand(label.shape, generator=case.generator) < (0.3 if ignored == 255 else 2)
        label = torch.where(gone, torch.tensor(255, dtype=label_dtype), label) if label_dtype != torch.int16 else label
    loss = PartiallyLabeledLoss(dice_ce_loss(case.classes, ignore_index))
    expected = dice_ce(pred[: case.labeled], label, ignore_index)
    assert_right(loss(pred, label), expected, scale=case.scale)
    assert finite_gradient(lambda logits: loss(logits, label), pred)


@few
@given(cases(), st.integers(2, 3), st.data())
def test_supervised_views(case, num_views, data):
    weights = data.draw(st.lists(st.sampled_from((0.0, 0.5, 1.0)), min_size=num_views, max_size=num_views))
    views, label = [case.logits() for _ in range(num_views)], case.label()
    if sum(weights) == 0:
        with pytest.raises(ValueError, match="`view_weights` must be 0 or more, and at least one positive"):
            PartiallyLabeledLoss(view_weights=weights)
        return
    loss = PartiallyLabeledLoss(dice_ce_loss(case.classes), view_weights=weights)
    expected = sum(weight * dice_ce(view[: case.labeled], label) for weight, view in zip(weights, views))
    assert_right(loss(torch.stack(views, dim=1), label), expected, scale=num_views * case.scale)


@few
@given(cases(min_rows=2), st.data())
def test_shapes_that_do_not_belong_together_are_one_clear_error(case, data):
    """Another row, class, or size: no loss broadcasts."""
    ours, theirs = case.logits(), case.logits()
    axis = data.draw(st.integers(0, ours.ndim - 1))
    theirs = torch.cat([theirs, theirs.narrow(axis, 0, 1)], dim=axis)
    for loss in (DistillationLoss(), MutualConsistencyLoss(), PseudoLabelLoss(), SoftmaxMSELoss()):
        if case.classes == 1 and axis == 1 and isinstance(loss, DistillationLoss):
            continue  # a sigmoid student may learn from a teacher of two classes
        with pytest.raises(ValueError, match="must have the (student's )?shape"):
            loss(ours, theirs)


@few
@given(cases(), st.sampled_from(("value", "negative", "NaN", "half", "rows", "size", "channel")))
def test_label_that_cannot_belong_is_one_clear_error(case, fault):
    pred, label = case.logits(), case.label()
    values = {"value": max(case.classes, 2), "negative": -1, "NaN": math.nan, "half": 0.5}
    if fault in values:
        label = label.clone()
        label[(-1,) * label.ndim] = values[fault]
    elif fault == "rows":
        label = label[:1].expand(case.rows + 1, *label.shape[1:])
    elif fault == "size":
        label = torch.cat([label, label], dim=-1)
    else:
        label = torch.cat([label, label], dim=1)
    with pytest.raises(ValueError, match="`label` must (be|have)"):
        PartiallyLabeledLoss(dice_ce_loss(case.classes))(pred, label)
