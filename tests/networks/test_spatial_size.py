from __future__ import annotations

import pytest
import torch

from knowsam_monai.networks.spatial_size import check_spatial_size


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (16, 64, 32)])
def test_multiples_pass(size):
    check_spatial_size(torch.empty(1, 3, *size), divisor=16)


@pytest.mark.parametrize("size", [(24, 16), (16, 40), (16, 16, 8)])
def test_any_other_size_is_an_error_with_size_and_remedy(size):
    with pytest.raises(ValueError) as error:
        check_spatial_size(torch.empty(1, 3, *size), divisor=16)
    assert str(list(size)) in str(error.value)
    assert "multiples of 16" in str(error.value) and "DivisiblePad(k=16)" in str(error.value)


def test_the_divisor_is_the_networks():
    check_spatial_size(torch.empty(1, 3, 24, 8), divisor=8)
    with pytest.raises(ValueError, match="multiples of 8"):
        check_spatial_size(torch.empty(1, 3, 24, 12), divisor=8)
