from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from knowsam_monai.data.phantom_left_atrium import _slabs, draw_left_atrium

NUMBERS = range(1, 9)


@pytest.fixture(scope="module")
def volumes() -> list[tuple]:
    return [draw_left_atrium(seed=0, number=number)["LGE"] for number in NUMBERS]


def test_one_volume_of_two_classes_and_the_stated_size(volumes):
    for image, label, affine in volumes:
        assert image.shape == label.shape and affine.shape == (4, 4)
        assert (image.dtype, label.dtype) == (np.int16, np.uint8)
        assert all(48 <= size <= 64 for size in image.shape[:2]) and 32 <= image.shape[2] <= 40
        assert set(np.unique(label)) == {0, 1}
        assert 0.03 < label.mean() < 0.12


def test_smaller_volumes_show_the_same_field_of_view():
    _, label, affine = draw_left_atrium(seed=0, number=1, max_size=32)["LGE"]
    assert all(24 <= size <= 32 for size in label.shape[:2]) and 16 <= label.shape[2] <= 20
    field = np.linalg.norm(affine[:3, :3], axis=0) * label.shape
    assert 65 < field[0] < 107 and 65 < field[1] < 107 and 60 < field[2] < 93


def test_voxels_are_no_cubes(volumes):
    for _, _, affine in volumes:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        assert spacing[2] > 1.1 * max(spacing[:2])
    assert np.abs(np.diff([np.linalg.norm(affine[:3, :3], axis=0)[:2] for _, _, affine in volumes])).max() > 0.05


def test_atrium_is_one_piece_with_veins_that_stand_out(volumes):
    for _, label, _ in volumes:
        assert ndimage.label(label)[1] == 1
        # An opening with a ball of about 9 mm takes the veins off and leaves the body.
        body = ndimage.binary_opening(label, ndimage.generate_binary_structure(3, 1), iterations=4)
        assert 0.5 * label.sum() < body.sum() < 0.97 * label.sum()


def test_patients_vary_in_place_size_and_contrast(volumes):
    centers = np.array([np.argwhere(label).mean(0) / label.shape for _, label, _ in volumes])
    voxel_volumes = np.array([label.sum() * abs(np.linalg.det(affine)) for _, label, affine in volumes])
    contrasts = [image[label == 1].mean() / image[label == 0].mean() for image, label, _ in volumes]
    assert (centers.std(0) > 0.015).all()
    assert voxel_volumes.max() > 1.3 * voxel_volumes.min()
    assert max(contrasts) > 1.15 * min(contrasts)


def test_no_threshold_finds_the_atrium(volumes):
    for image, label, _ in volumes:
        truth = label == 1
        for threshold in np.quantile(image, np.linspace(0.4, 0.99, 30)):
            found = image > threshold
            assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) < 0.6


def test_scars_in_the_wall_are_brighter_than_blood_and_the_rest_of_the_wall_is_darker(volumes):
    for image, label, _ in volumes:
        shell = ndimage.binary_dilation(label, iterations=2) & (label == 0)
        blood = np.median(image[label == 1])
        assert np.quantile(image[shell], 0.2) < 0.8 * blood


def test_slabs_differ_in_gain_and_are_darker_at_their_edges():
    seen = set()
    for number in range(20):
        gains, shifts = _slabs(np.random.default_rng(number), 36)
        slabs, starts = np.unique(shifts, axis=0, return_index=True)
        seen.add(len(slabs))
        starts = [*sorted(starts), 36]
        for first, last in zip(starts, starts[1:]):
            slab = gains[first:last]
            assert slab.max() == slab[len(slab) // 2] and max(slab[0], slab[-1]) < 0.95 * slab.max()
    assert seen == {2, 3}


def test_same_numbers_give_the_same_voxels_and_others_others(volumes):
    for one, other in zip(draw_left_atrium(0, 1)["LGE"], volumes[0]):
        np.testing.assert_array_equal(one, other)
    other = draw_left_atrium(1, 1)["LGE"][0]
    assert other.shape != volumes[0][0].shape or not np.array_equal(other, volumes[0][0])
