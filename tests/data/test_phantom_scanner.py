from __future__ import annotations

import numpy as np
import pytest

from knowsam_monai.data.phantom_scanner import magnitude, oblique_affine, smooth, turn_matrix, unit_deviation


@pytest.mark.parametrize("shape", [(40, 31), (24, 25, 20)])
def test_blur_of_a_point_is_a_gaussian(shape):
    point = np.zeros(shape)
    middle = tuple(size // 2 for size in shape)
    point[middle] = 1
    squares = sum((index - at) ** 2 for index, at in zip(np.indices(shape), middle))
    expected = np.exp(-squares / (2 * 1.5**2)) / (2 * np.pi * 1.5**2) ** (len(shape) / 2)
    np.testing.assert_allclose(smooth(point, 1.5), expected, atol=1e-5)


def test_unit_deviation():
    assert unit_deviation(np.arange(7.0)).std() == pytest.approx(1)


def test_noise_is_that_of_a_magnitude_image():
    """Without signal a Rayleigh distribution of mean noise * sqrt(pi / 2); with much signal the signal."""
    rng = np.random.default_rng(0)
    assert magnitude(rng, np.zeros(100000), 2.0).mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.01)
    assert magnitude(rng, np.full(100000, 100.0), 1.0).mean() == pytest.approx(100, rel=0.001)


def test_quarter_turn_by_hand():
    np.testing.assert_allclose(turn_matrix([0, 0, np.pi / 2]), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)


def test_affine_has_the_spacing_and_its_center_near_the_origin():
    affine = oblique_affine(np.random.default_rng(0), (10, 20, 5), (1.0, 2.0, 3.0), turns=((5, 10),) * 3)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (1, 2, 3))
    assert np.abs(affine @ [4.5, 9.5, 2, 1])[:3].max() <= 30
    np.testing.assert_allclose(
        oblique_affine(np.random.default_rng(0), (10, 20, 5), (1.0, 2.0, 3.0), turns=((0, 0),) * 3)[:3, :3],
        np.diag([-1, -2, 3]),
    )
