from __future__ import annotations

import pytest
import torch

from knowsam_monai.runs.host_trainer import SKDSettings, _distiller, _to_rgb


@pytest.mark.parametrize(
    "low, high, is_windowed", [(0, 1, False), (-0.2, 1.2, False), (-1, 1, True), (-0.9, 1.9, True)]
)
def test_images_that_are_not_in_0_to_1_are_windowed_for_sam(low, high, is_windowed):
    to_rgb = _to_rgb(torch.linspace(low, high, 64).reshape(1, 1, 8, 8))
    if not is_windowed:
        assert to_rgb == 0
        return
    assert (to_rgb.low, to_rgb.high) == pytest.approx((low, high))


@pytest.mark.parametrize("axes, expected", [(-1, 8), (0, 4), ((0, 2), 4)])
def test_volume_with_fewer_slices_along_the_sliced_axes_shows_all_of_them(axes, expected):
    settings = SKDSettings(unlabeled="list", sam_variant="stand_in", sam_checkpoint="procedural", axes=axes)
    assert _distiller(settings, torch.rand(1, 1, 4, 32, 32), 2, False).teacher.slices == expected
