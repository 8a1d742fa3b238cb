from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceFocalLoss, DiceLoss, FocalLoss, TverskyLoss
from torch import nn
from torch.nn import functional as F

from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.losses.supervised import check_label, check_loss_takes, has_sigmoid


def reference(logits: torch.Tensor, label: torch.Tensor) -> float:
    """CE + Dice over the whole batch, squared denominator, background included; class by class."""
    rows = logits.double().movedim(1, -1).reshape(-1, logits.shape[1])
    truth = label.flatten().tolist()
    probs = [[math.exp(z) / sum(math.exp(y) for y in row) for z in row] for row in rows.tolist()]
    ce = -sum(math.log(p[int(t)]) for p, t in zip(probs, truth)) / len(truth)
    dice = []
    for c in range(logits.shape[1]):
        overlap = sum(p[c] for p, t in zip(probs, truth) if t == c)
        total = sum(p[c] ** 2 for p in probs) + sum(t == c for t in truth)
        dice.append(1 - (2 * overlap + 1e-5) / (total + 1e-5))
    return ce + sum(dice) / len(dice)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("absent", [False, True])
def test_default_loss_is_cross_entropy_plus_dice(num_classes, spatial, absent):
    logits = torch.randn(2, num_classes, *spatial, dtype=torch.float64)
    label = torch.randint(num_classes - absent, (2, 1, *spatial))
    # MONAI's one-hot label, and so the size of each class, is float32
    assert PartiallyLabeledLoss()(logits, label).item() == pytest.approx(reference(logits, label), rel=1e-6)


@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_first_rows_are_the_labeled_ones(num_labels):
    pred = torch.randn(4, 3, 6, 6, requires_grad=True)
    label = torch.randint(3, (num_labels, 1, 6, 6))
    loss = PartiallyLabeledLoss()(pred, label)
    assert torch.equal(loss, dice_ce_loss()(pred[:num_labels], label))
    loss.backward()
    reached = pred.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert reached.tolist() == [row < num_labels for row in range(4)]


@pytest.mark.parametrize("labeled_rows, rows", [(2, [0, 1]), (slice(1, 3), [1, 2]), ("all", [0, 1, 2, 3])])
def test_labels_of_other_rows_than_the_labeled_ones_are_not_used(labeled_rows, rows):
    pred, label = torch.randn(4, 2, 3, 6, 6, requires_grad=True), torch.randint(3, (4, 1, 6, 6))
    loss = PartiallyLabeledLoss(labeled_rows=labeled_rows)
    expected = sum(dice_ce_loss()(pred[rows, view], label[rows]) for view in range(2))
    assert torch.equal(loss(pred, label), expected) and torch.equal(loss(pred, label[rows]), expected)
    loss(pred, label).backward()
    assert (pred.grad.abs().sum(dim=(1, 2, 3, 4)) > 0).tolist() == [row in rows for row in range(4)]


@pytest.mark.parametrize("labeled_rows", [-1, "some", True, slice(None, None, -1)])
def test_rows_that_are_none_are_refused_at_once(labeled_rows):
    with pytest.raises((TypeError, ValueError), match="`labeled_rows` must be"):
        PartiallyLabeledLoss(labeled_rows=labeled_rows)


def test_every_view_counts_once_by_default():
    pred = torch.randn(4, 3, 2, 6, 6)
    label = torch.randint(2, (2, 1, 6, 6))
    expected = sum(dice_ce_loss()(pred[:2, view], label) for view in range(3))
    torch.testing.assert_close(PartiallyLabeledLoss()(pred, label), expected)


def test_view_weights_are_factors_in_the_order_of_the_stack():
    pred = torch.randn(3, 3, 2, 6, 6, requires_grad=True)
    label = torch.randint(2, (2, 1, 6, 6))
    weights = (1.0, 0.5, 0.0)
    loss = PartiallyLabeledLoss(view_weights=weights)(pred, label)
    torch.testing.assert_close(loss, sum(w * dice_ce_loss()(pred[:2, v], label) for v, w in enumerate(weights)))
    loss.backward()
    assert (pred.grad.abs().sum(dim=(0, 2, 3, 4)) > 0).tolist() == [True, True, False]


def test_view_of_weight_zero_is_left_out_whatever_it_holds():
    pred, label = torch.randn(2, 2, 3, 6, 6), torch.randint(3, (2, 1, 6, 6))
    pred[:, 1] = torch.nan
    assert torch.equal(PartiallyLabeledLoss(view_weights=(1, 0))(pred, label), dice_ce_loss()(pred[:, 0], label))


def test_any_loss_of_logits_and_label_can_be_wrapped():
    pred, label = torch.randn(3, 4, 6, 6), torch.randint(4, (2, 1, 6, 6))
    loss = PartiallyLabeledLoss(lambda logits, label: F.cross_entropy(logits, label.squeeze(1)))
    assert torch.equal(loss(pred, label), F.cross_entropy(pred[:2], label[:, 0]))


@pytest.mark.parametrize("overlapping", [False, True])
def test_loss_of_each_pixel_counts_by_its_mean(overlapping):
    """As in MONAI's trainer; a sum would be larger by the number of pixels."""
    pred, label = torch.randn(3, 4, 6, 6), torch.randint(2, (2, 4 if overlapping else 1, 6, 6))
    losses = [
        PartiallyLabeledLoss(partial(own_loss, reduction=reduction), overlapping=overlapping)(pred, label)
        for own_loss in [F.binary_cross_entropy_with_logits if overlapping else cross_entropy_of_channel]
        for reduction in ("none", "mean")
    ]
    torch.testing.assert_close(*losses)


def cross_entropy_of_channel(logits, label, reduction):
    return F.cross_entropy(logits, label[:, 0], reduction=reduction)


@pytest.mark.parametrize("form", ["meta", "channels_last", "view", "half", "autocast"])
def test_any_form_of_input_gives_plain_float32(form):
    pred, label = torch.randn(3, 4, 6, 6).half().float(), torch.randint(4, (2, 1, 6, 6)).float()
    expected = PartiallyLabeledLoss()(pred, label)
    pred, label = {
        "meta": lambda: (MetaTensor(pred), MetaTensor(label)),
        "channels_last": lambda: (pred.contiguous(memory_format=torch.channels_last), label.to(torch.uint8)),
        "view": lambda: (torch.stack((pred, pred), dim=1).unbind(1)[1], label.long()),
        "half": lambda: (pred.half(), label.half()),
        "autocast": lambda: (pred, label),
    }[form]()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
        loss = PartiallyLabeledLoss()(pred, label)
    assert type(loss) is torch.Tensor and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_wrapped_loss_sees_no_autocast_and_float64_stays():
    seen = []

    def loss(logits, label):
        seen.append((logits.dtype, (logits[0, 0] @ logits[0, 0]).dtype))
        return logits.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float64):
            PartiallyLabeledLoss(loss)(torch.randn(2, 2, 4, 4, dtype=dtype), torch.zeros(2, 1, 4, 4))
    assert seen == [(torch.float32, torch.float32), (torch.float64, torch.float64)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, 6, 6), "`label` must have one row or more but has none"),
        ((5, 1, 6, 6), r"`label` must have at most as many rows as `pred` \(4\) but has 5"),
        ((2, 1, 6, 8), r"`label` must have shape \(labeled rows, 1, 6, 6\) but has \(2, 1, 6, 8\)"),
        ((2, 2, 6, 6), r"`label` must have shape \(labeled rows, 1, 6, 6\) but has \(2, 2, 6, 6\)"),
    ],
)
@pytest.mark.parametrize("views", [(), (3,)])
def test_label_that_does_not_fit_is_an_error(shape, message, views):
    with pytest.raises(ValueError, match=message):
        PartiallyLabeledLoss()(torch.zeros(4, *views, 3, 6, 6), torch.zeros(shape))


@pytest.mark.parametrize("views", [(), (2,)])
@pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.float32])
def test_overlapping_regions_reach_the_loss_whole_and_as_floats(views, label_dtype):
    pred = torch.randn(4, *views, 3, 6, 8)  # with views, the label has the shape of a volume without a channel
    label = torch.randint(2, (2, 3, 6, 8)).to(label_dtype)
    loss = DiceLoss(sigmoid=True)
    expected = sum(loss(view[:2], label.float()) for view in (pred.unbind(1) if views else [pred]))
    torch.testing.assert_close(PartiallyLabeledLoss(loss, overlapping=True)(pred, label), expected)


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        (
            (2, 1, 6, 6),
            1,
            r"shape \(labeled rows, 3, 6, 6\) but has \(2, 1, 6, 6\); load it with 0 and 1 for each region",
        ),
        ((2, 6, 6), 1, r"shape \(labeled rows, 3, 6, 6\) but has \(2, 6, 6\)"),
        ((2, 3, 6, 8), 1, r"shape \(labeled rows, 3, 6, 6\) but has"),
        ((2, 3, 6, 6), 2, "in 0..1, outside or inside of each region, but is in 2..2"),
        ((2, 3, 6, 6), math.nan, "in 0..1, outside or inside of each region, but is in nan..nan"),
        ((2, 3, 6, 6), 0.5, "class numbers but has 0.5"),
    ],
)
def test_label_that_does_not_fit_regions_is_an_error(shape, value, message):
    with pytest.raises(ValueError, match=message):
        check_label(torch.zeros(4, 3, 6, 6), torch.full(shape, value), overlapping=True)


def test_regions_in_a_loss_of_classes_are_an_error_that_names_the_argument():
    with pytest.raises(
        ValueError, match="but has .*; combine its channels .* or set `overlapping` if regions may overlap"
    ):
        PartiallyLabeledLoss()(torch.zeros(4, 3, 6, 6), torch.zeros(2, 3, 6, 6))


@pytest.mark.parametrize("views", [(), (2,)])
@pytest.mark.parametrize("spatial", [(6, 8), (6, 8, 4)])
def test_label_without_a_channel_is_an_error_and_not_taken_for_a_view(spatial, views):
    size = ", ".join(map(str, spatial))
    message = rf"`label` must have shape \(labeled rows, 1, {size}\) but has \(2, {size}\); pass `label\[:, None\]`"
    with pytest.raises(ValueError, match=message):
        PartiallyLabeledLoss()(torch.zeros(4, *views, 3, *spatial), torch.zeros(2, *spatial))


@pytest.mark.parametrize(
    ("num_classes", "value", "top"), [(3, 3, 2), (4, -1, 3), (1, 2, 1), (2, float("nan"), 1), (4, 255, 3)]
)
def test_label_value_outside_the_classes_is_an_error(num_classes, value, top):
    label = torch.zeros(2, 1, 6, 6)
    label[1, 0, 5, 5] = value
    with pytest.raises(ValueError, match=f"`label` must be in 0..{top}, the classes of the network, but is in"):
        check_label(torch.zeros(2, num_classes, 6, 6), label)


@pytest.mark.parametrize(("num_classes", "top"), [(1, 1), (2, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_label_of_the_highest_class_fits(num_classes, top, dtype):
    check_label(torch.zeros(2, num_classes, 6, 6), torch.full((1, 1, 6, 6), top, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_label_of_any_type_fits_a_sigmoid_network(dtype):
    label = torch.randint(2, (2, 1, 6, 6)).to(dtype)
    logits = torch.randn(2, 1, 6, 6)
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes=1))
    torch.testing.assert_close(loss(logits, label), dice_ce_loss(num_classes=1)(logits, label.float()))


def test_value_that_the_loss_ignores_fits():
    label = torch.randint(3, (2, 1, 6, 6))
    label[0] = 255

    class IgnoringLoss(nn.Module):
        ignore_index = 255

        def forward(self, logits, label):
            return F.cross_entropy(logits, label.squeeze(1), ignore_index=self.ignore_index)

    pred = torch.randn(3, 3, 6, 6)
    expected = F.cross_entropy(pred[1:2], label[1:2, 0])
    torch.testing.assert_close(PartiallyLabeledLoss(IgnoringLoss())(pred, label), expected)
    check_label(pred, torch.full((2, 1, 6, 6), 255), ignore_index=255)


def test_batch_without_a_label_is_an_error():
    with pytest.raises(TypeError, match="`label` must be a tensor but is None; put a labeled item into every batch"):
        PartiallyLabeledLoss()(torch.zeros(2, 3, 4, 4), None)


def test_weights_for_another_number_of_views_are_an_error():
    loss = PartiallyLabeledLoss(view_weights=(1, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"one weight for each of the 1 views but are \(1, 0.5, 0.5\)"):
        loss(torch.zeros(2, 3, 6, 6), torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize("weights", [(), (0, 0), (1, -1)])
def test_weights_that_are_negative_or_all_zero_are_an_error(weights):
    with pytest.raises(ValueError, match="`view_weights` must be 0 or more, and at least one positive"):
        PartiallyLabeledLoss(view_weights=weights)


def test_bare_loss_with_fewer_labels_than_rows_is_one_clear_error():
    with pytest.raises(ValueError) as error:
        check_loss_takes(dice_ce_loss(), num_rows=4, num_labels=2)
    assert "`loss_function` must be a PartiallyLabeledLoss if only 2 of 4 rows have a label" in str(error.value)
    assert "PartiallyLabeledLoss(loss=dice_ce_loss(...))" in str(error.value)
    with pytest.raises(ValueError, match="but is cross_entropy"):
        check_loss_takes(F.cross_entropy, num_rows=4, num_labels=2)


def test_partially_labeled_loss_takes_fewer_labels_and_any_loss_takes_as_many():
    check_loss_takes(PartiallyLabeledLoss(), num_rows=4, num_labels=2)
    check_loss_takes(DeepSupervisionLoss(PartiallyLabeledLoss()), num_rows=4, num_labels=2)
    check_loss_takes(dice_ce_loss(), num_rows=4, num_labels=4)


def test_whoever_wrote_a_loss_of_their_own_knows_what_it_takes():
    class OwnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = dice_ce_loss()

    check_loss_takes(OwnLoss(), num_rows=4, num_labels=2)
    check_loss_takes(lambda pred, label: 0, num_rows=4, num_labels=2)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_ignored_pixels_are_as_if_they_were_not_there(num_classes, spatial):
    logits = torch.randn(2, num_classes, *spatial, dtype=torch.float64, requires_grad=True)
    label = torch.randint(num_classes, (2, 1, *spatial))
    known = torch.rand(2, 1, *spatial) < 0.6
    loss = PartiallyLabeledLoss(dice_ce_loss(num_classes, ignore_index=255))(logits, label.where(known, 255))
    pixels = logits.movedim(1, -1)[known[:, 0]].T.unsqueeze(0).detach()  # (1, C, known pixels)
    assert loss.item() == pytest.approx(reference(pixels, label[known]), rel=1e-6)
    loss.backward()
    assert logits.grad.movedim(1, -1)[~known[:, 0]].abs().sum() == 0


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_without_an_ignored_pixel_it_is_the_same_loss(num_classes):
    logits = torch.randn(2, num_classes, 4, 4, dtype=torch.float64)
    label = torch.randint(max(num_classes, 2), (2, 1, 4, 4)).double()
    losses = [dice_ce_loss(num_classes, ignore_index)(logits, label) for ignore_index in (None, 255)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 4])
def test_with_no_pixel_known_the_loss_is_zero_and_finite(num_classes):
    logits = torch.randn(2, num_classes, 4, 4, requires_grad=True)
    loss = dice_ce_loss(num_classes, ignore_index=-1)(logits, torch.full((2, 1, 4, 4), -1.0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().sum() == 0


def test_a_class_cannot_be_ignored():
    with pytest.raises(ValueError, match=r"`ignore_index` must be outside the classes 0..3 but is 3"):
        dice_ce_loss(4, ignore_index=3)


class Own(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss


@pytest.mark.parametrize("wrap", [lambda loss: loss, PartiallyLabeledLoss, Own])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DiceLoss(sigmoid=True), True),
        (DiceLoss(softmax=True, to_onehot_y=True), False),
        (DiceCELoss(sigmoid=True), True),
        (DiceCELoss(softmax=True), False),
        (DiceFocalLoss(sigmoid=True), True),
        (TverskyLoss(softmax=True), False),
        (FocalLoss(), True),
        (FocalLoss(use_softmax=True), False),
        (nn.BCEWithLogitsLoss(), True),
        (nn.CrossEntropyLoss(), False),
        (dice_ce_loss(), False),
        (DiceLoss(), None),
        (F.cross_entropy, None),
    ],
)
def test_losses_tell_whether_they_apply_a_sigmoid_or_a_softmax(loss, expected, wrap):
    if isinstance(loss, nn.Module) or wrap is PartiallyLabeledLoss:
        assert has_sigmoid(wrap(loss)) is expected
    assert has_sigmoid(None) is None


def test_loss_of_this_package_applies_what_its_wrapper_says():
    for loss in (None, dice_ce_loss(3)):
        assert [has_sigmoid(PartiallyLabeledLoss(loss, overlapping=given)) for given in (True, False)] == [True, False]
