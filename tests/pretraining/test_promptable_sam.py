from __future__ import annotations

import torch

from knowsam_monai.teachers.sam import build_sam
from pretraining.promptable_sam import decode, encode
from pretraining.prompts import BOTTOM_RIGHT, NO_POINT, OFF, ON, TOP_LEFT
from tests.networks.sam_toys import randomized


@torch.no_grad()
def test_points_boxes_and_masks_equal_segment_anything_image_by_image():
    torch.manual_seed(0)
    sam = randomized(build_sam("stand_in", image_size=32), std=0.1)
    image, points, masks = torch.rand(2, 1, 32, 32), 31 * torch.rand(8, 2, 2), torch.randn(8, 16, 16)
    kinds = [(ON, NO_POINT), (ON, OFF), (TOP_LEFT, BOTTOM_RIGHT), (TOP_LEFT, BOTTOM_RIGHT)]
    codes = torch.tensor(kinds * 2)
    has_mask = torch.tensor([False, True, False, True] * 2)
    found, found_iou = decode(sam, encode(sam, image), points, codes, masks, has_mask)
    assert found.shape == (8, 4, 16, 16) and found_iou.shape == (8, 4)
    for row in range(8):
        rgb = (image[row // 4, None].expand(-1, 3, -1, -1) * 255 - sam.pixel_mean) / sam.pixel_std
        single = codes[row, 1] == NO_POINT  # upstream adds the empty point itself, and to points without a box always
        count = 1 if single else 2
        is_box = codes[row, 0] == TOP_LEFT
        sparse, dense = sam.prompt_encoder(
            points=None if is_box else (points[row : row + 1, :count], codes[row : row + 1, :count]),
            boxes=points[row].reshape(1, 4) if is_box else None,
            masks=masks[row, None, None] if has_mask[row] else None,
        )
        if not single:
            sparse = sparse[:, :2]
        expected, iou = sam.mask_decoder.predict_masks(
            sam.image_encoder(rgb), sam.prompt_encoder.get_dense_pe(), sparse, dense
        )
        assert torch.allclose(found[row], expected[0], atol=1e-4, rtol=1e-4)
        assert torch.allclose(found_iou[row], iou[0], atol=1e-4, rtol=1e-4)
