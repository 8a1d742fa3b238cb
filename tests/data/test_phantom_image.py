from __future__ import annotations

import numpy as np
import pytest

from knowsam_monai.data.phantom_image import LEFT_VENTRICLE, MYOCARDIUM, RIGHT_VENTRICLE, draw_patient

NUMBERS = range(1, 7)


@pytest.fixture(scope="module")
def patients() -> list[dict]:
    return [draw_patient(seed=0, number=number, max_size=64) for number in NUMBERS]


def count(label: np.ndarray, value: int) -> int:
    return int((label == value).sum())


def test_both_frames_have_all_structures(patients):
    for frames in patients:
        assert list(frames) == ["ED", "ES"]
        for image, label, affine in frames.values():
            assert image.shape == label.shape and affine.shape == (4, 4)
            assert (image.dtype, label.dtype) == (np.int16, np.uint8)
            assert set(np.unique(label)) == {0, RIGHT_VENTRICLE, MYOCARDIUM, LEFT_VENTRICLE}


def test_systole_has_smaller_cavities_and_a_thicker_wall(patients):
    for frames in patients:
        (_, diastole, _), (_, systole, _) = frames["ED"], frames["ES"]
        for cavity in (LEFT_VENTRICLE, RIGHT_VENTRICLE):
            assert count(systole, cavity) < 0.9 * count(diastole, cavity)
        base = diastole.shape[2] - 1
        thickness = [
            np.sqrt(count(label[..., base], MYOCARDIUM) + count(label[..., base], LEFT_VENTRICLE))
            - np.sqrt(count(label[..., base], LEFT_VENTRICLE))
            for label in (diastole, systole)
        ]
        assert thickness[1] > 1.1 * thickness[0]


def test_left_ventricle_tapers_to_the_apex_and_is_enclosed_by_myocardium(patients):
    for frames in patients:
        for _, label, _ in frames.values():
            assert count(label[..., 0], LEFT_VENTRICLE) < 0.6 * count(label[..., -1], LEFT_VENTRICLE)
            inside = label == LEFT_VENTRICLE
            for axis in (0, 1):
                for step in (1, -1):
                    neighbor = np.roll(label, step, axis)[inside]
                    assert set(np.unique(neighbor)) <= {MYOCARDIUM, LEFT_VENTRICLE}


def test_patients_vary_in_size_place_and_contrast(patients):
    shapes = {frames["ED"][1].shape for frames in patients}
    centers = np.array([np.argwhere(frames["ED"][1] == LEFT_VENTRICLE).mean(0)[:2] for frames in patients])
    volumes = [count(frames["ED"][1], LEFT_VENTRICLE) for frames in patients]
    frames_ed = [frames["ED"] for frames in patients]
    contrasts = [
        image[label == LEFT_VENTRICLE].mean() / image[label == MYOCARDIUM].mean() for image, label, _ in frames_ed
    ]
    assert len(shapes) >= 4
    assert (centers.std(0) > 1.5).all()
    assert max(volumes) > 1.3 * min(volumes)
    assert max(contrasts) > 1.2 * min(contrasts)


def test_no_threshold_finds_the_left_ventricle(patients):
    for frames in patients:
        image, label, _ = frames["ED"]
        truth = label == LEFT_VENTRICLE
        best = 0.0
        for threshold in np.quantile(image, np.linspace(0.5, 0.99, 30)):
            found = image > threshold
            best = max(best, 2 * (found & truth).sum() / (found.sum() + truth.sum()))
        assert best < 0.75
