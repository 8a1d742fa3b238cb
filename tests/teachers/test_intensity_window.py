"""IntensityWindow: rows that a hand can check."""

import pytest
import torch

from knowsam_monai.teachers import IntensityWindow


def test_window_is_scaled_to_0_to_1_and_cut_off_outside():
    image = torch.tensor([-3.0, -2.0, 1.0, 4.0, 9.0]).reshape(1, 1, 1, 5)
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])
    assert torch.equal(IntensityWindow(-2, 4)(image), expected.expand(1, 3, 1, 5))


def test_channel_is_the_one_that_is_named():
    image = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None]
    assert IntensityWindow(0, 2, channel=1)(image).unique().tolist() == [0.5]


@pytest.mark.parametrize("high", [-2.0, -3.0])
def test_window_that_is_no_range_is_refused(high):
    with pytest.raises(ValueError, match=f"`high` must be above `low`, -2.0, but is {high}"):
        IntensityWindow(-2.0, high)


@pytest.mark.parametrize("channel", [2, -3])
def test_channel_that_the_image_lacks_is_refused(channel):
    with pytest.raises(ValueError, match=f"`channel` must be below 2, the channels of the image, but is {channel}"):
        IntensityWindow(0, 1, channel)(torch.zeros(1, 2, 4, 4))
