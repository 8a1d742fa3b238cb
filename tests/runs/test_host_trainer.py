from __future__ import annotations

import pytest
import torch

from knowsam_monai.runs.host_trainer import _to_rgb


@pytest.mark.parametrize(
    "low, high, is_windowed", [(0, 1, False), (-0.2, 1.2, False), (-1, 1, True), (-0.9, 1.9, True)]
)
def test_images_that_are_not_in_0_to_1_are_windowed_for_sam(low, high, is_windowed):
    to_rgb = _to_rgb(torch.linspace(low, high, 64).reshape(1, 1, 8, 8))
    if not is_windowed:
        assert to_rgb == 0
        return
    assert (to_rgb.low, to_rgb.high) == pytest.approx((low, high))
