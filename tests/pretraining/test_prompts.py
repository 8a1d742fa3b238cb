from __future__ import annotations

import pytest
import torch

from pretraining.prompts import (
    NO_POINT,
    ON,
    TOP_LEFT,
    boxes_of,
    corrections,
    corrupted_masks,
    first_prompts,
    noised_boxes,
    sample_points,
)


def squares(count: int = 1) -> torch.Tensor:
    masks = torch.zeros(count, 32, 32, dtype=torch.bool)
    masks[:, 8:16, 4:24] = True  # 8 rows, 20 columns
    return masks


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_box_is_the_first_and_last_column_and_row():
    assert boxes_of(squares()).tolist() == [[4, 8, 23, 15]]


@pytest.mark.parametrize("far_off, limit", [(False, 1.6), (True, 9.6)])  # 5 % of 32 pixels, and six times that
def test_a_box_is_enlarged_and_its_noise_is_bounded(far_off, limit):
    boxes = boxes_of(squares(2000))
    outward = (noised_boxes(boxes, (32, 32), generator(), torch.full((2000,), far_off)) - boxes) * torch.tensor(
        [-1.0, -1.0, 1.0, 1.0]
    )
    assert -limit <= outward.min() and outward.max() <= limit + 0.023 * 32 + 1e-4
    if not far_off:
        assert outward[:, 1].mean() == pytest.approx(0.0155 * 32, abs=0.05)
        spread = (0.03 * 8) ** 2 + (0.015 * 32) ** 2 / 12  # of the noise and of the padding
        assert outward[:, 1].var() == pytest.approx(spread, rel=0.15)


def test_points_are_drawn_from_the_region():
    masks = squares(200)
    points = sample_points(masks, generator()).long()
    assert masks[torch.arange(200), points[:, 1], points[:, 0]].all()
    assert len(points.unique(dim=0)) > 80


@pytest.mark.parametrize("predicted_columns, code, columns", [((4, 14), 1, (14, 24)), ((4, 30), 0, (24, 30))])
def test_a_correction_is_on_what_was_missed_or_off_what_was_too_much(predicted_columns, code, columns):
    predicted = torch.zeros_like(squares(50))
    predicted[:, 8:16, slice(*predicted_columns)] = True
    points, codes = corrections(predicted, squares(50), generator(), wrong=0.0)
    assert (codes == code).all()
    assert points[..., 0].min() >= columns[0] and points[..., 0].max() < columns[1]
    assert points[..., 1].min() >= 8 and points[..., 1].max() < 16


def test_without_an_error_the_click_is_on_the_object_and_a_wrong_click_says_the_opposite():
    assert (corrections(squares(9), squares(9), generator(), wrong=0.0)[1] == 1).all()
    assert (corrections(squares(9), squares(9), generator(), wrong=1.0)[1] == 0).all()


def test_first_prompts_are_points_boxes_and_masks_in_the_stated_shares():
    masks = squares(4000)
    points, codes, _, has_mask = first_prompts(masks, torch.zeros_like(masks), (16, 16), generator())
    shares = {
        (code, mask): ((codes[:, 0] == code) & (has_mask == mask)).float().mean().item()
        for code in (ON, TOP_LEFT, NO_POINT)
        for mask in (False, True)
    }
    stated = {
        (ON, False): 0.1,
        (TOP_LEFT, False): 0.45,
        (NO_POINT, True): 0.3,
        (TOP_LEFT, True): 0.1,
        (ON, True): 0.05,
    }
    assert shares == pytest.approx({**stated, (NO_POINT, False): 0.0}, abs=0.03)
    clicked = points[codes[:, 0] == ON, 0].long()
    assert masks[0, clicked[:, 1], clicked[:, 0]].all()


def test_mask_prompts_know_the_object_and_a_wrong_one_holds_another_too():
    masks, others = squares(300), torch.zeros_like(squares(300))
    others[:, 20:30, 4:24] = True
    for wrong, holds in ((0.0, False), (1.0, True)):
        logits = corrupted_masks(masks, others, (32, 32), generator(), wrong)
        assert logits[masks].mean() > logits[~(masks | others)].mean() + 5
        assert (logits[others].mean() > logits[~(masks | others)].mean() + 3) == holds


def test_some_mask_prompts_are_nearly_empty():
    logits = corrupted_masks(squares(2000), torch.zeros_like(squares(2000)), (32, 32), generator(), wrong=0.0)
    kept = ((logits > 0) & squares(2000)).sum(dim=(1, 2)) / squares().sum()
    assert 0.03 < (kept < 0.1).float().mean() < 1 / 6
