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


@pytest.mark.parametrize("far_off, limit", [(False, 1.6), (True, 4.8)])  # 5 % of 32 pixels, and three times that
def test_box_noise_is_bounded_by_the_image_and_spreads_with_the_box(far_off, limit):
    boxes = boxes_of(squares(500))
    change = noised_boxes(boxes, (32, 32), generator(), torch.full((500,), far_off)) - boxes
    assert change.abs().max() == pytest.approx(limit, abs=1e-5)  # 10 % of 20 columns is 2: often cut
    assert 0.9 * 0.8 < change[:, 1].std() / (3 if far_off else 1) < 1.1 * 0.8  # 10 % of 8 rows, cut at two deviations


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
    stated = {(ON, False): 0.25, (TOP_LEFT, False): 0.25, (NO_POINT, True): 0.3, (TOP_LEFT, True): 0.1, (ON, True): 0.1}
    assert shares == pytest.approx({**stated, (NO_POINT, False): 0.0}, abs=0.03)
    clicked = points[codes[:, 0] == ON, 0].long()
    assert masks[0, clicked[:, 1], clicked[:, 0]].all()


def test_mask_prompts_know_the_object_and_a_wrong_one_holds_another_too():
    masks, others = squares(300), torch.zeros_like(squares(300))
    others[:, 20:30, 4:24] = True
    for wrong, holds in ((0.0, False), (1.0, True)):
        logits = corrupted_masks(masks, others, (32, 32), generator(), wrong)
        assert logits[masks].mean() > logits[~(masks | others)].mean() + 5
        assert (logits[others].mean() > logits[~(masks | others)].mean() + 5) == holds
