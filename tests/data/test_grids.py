from __future__ import annotations

import numpy as np
import pytest

from knowsam_monai.data.grids import is_same_grid

OBLIQUE = np.array([[0.0, -2, 0, 5], [2, 0, 0, 7], [0, 0, 8, 1], [0, 0, 0, 1]])  # voxels of 2 x 2 x 8 mm


@pytest.mark.parametrize(("shift", "same"), [(0.0, True), (0.99, True), (1.01, False)])
@pytest.mark.parametrize(("axis", "edge"), [(0, 2), (1, 2), (2, 8)])
def test_half_a_voxel_along_each_axis_is_the_limit(shift, same, axis, edge):
    moved = OBLIQUE.copy()
    moved[axis, 3] += shift * edge / 2
    assert is_same_grid(OBLIQUE, moved, (6, 5, 3)) == same


def test_a_small_error_of_the_spacing_adds_up_over_the_voxels():
    rounded = OBLIQUE * [1.01, 1.01, 1, 1]  # 0.02 mm in each voxel
    assert is_same_grid(OBLIQUE, rounded, (20, 20, 3))
    assert not is_same_grid(OBLIQUE, rounded, (200, 20, 3))


def test_2d_images_have_affines_of_either_size():
    assert is_same_grid(np.eye(3), np.eye(3), (8, 8)) and is_same_grid(np.eye(4), np.eye(4), (8, 8))
    assert not is_same_grid(np.eye(3), np.eye(4), (8, 8))
