"""Drawing one synthetic short-axis patient: anatomy in millimeters, then tissue, bias field, blur and noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knowsam_monai.data.phantom_scanner import magnitude, oblique_affine, smooth, unit_deviation

RIGHT_VENTRICLE, MYOCARDIUM, LEFT_VENTRICLE = 1, 2, 3


class _Grid(NamedTuple):
    """Voxel coordinates of one slice, in mm: x and y in the image, u and v along the axes of the heart."""

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray  # through the septum into the right ventricle
    v: np.ndarray  # along the septum
    level: float  # 0 at the apex, 1 at the base


class _Heart(NamedTuple):
    """Geometry of one frame; lengths in mm, angles in radians."""

    lv_radius: float
    wall: float
    rv_length: float
    rv_width: float


def draw_patient(seed: int, number: int, max_size: int = 128) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw patient `number`: for "ED" and "ES" its image (H, W, D) int16, label (H, W, D) uint8 and affine (4, 4)."""
    rng = np.random.default_rng([seed, number])
    height, width = (int(rng.integers(3 * max_size // 4, max_size + 1)) for _ in range(2))
    depth = int(rng.integers(6, 11))
    # The field of view, about 130 to 200 mm, does not depend on the number of voxels.
    in_plane, thickness = rng.uniform(1.4, 1.6) * 128 / max_size, rng.uniform(8.0, 10.0)

    diastole = _Heart(rng.uniform(22, 30), rng.uniform(8, 11), rng.uniform(35, 44), rng.uniform(23, 31))
    shrink = rng.uniform(0.62, 0.78)
    systole = _Heart(
        lv_radius=diastole.lv_radius * shrink,
        wall=diastole.wall * rng.uniform(1.25, 1.5),
        rv_length=diastole.rv_length * rng.uniform(0.86, 0.95),
        rv_width=diastole.rv_width * rng.uniform(0.6, 0.8),
    )
    patient = {
        "center": rng.uniform(-14, 14, 2),
        "tilt": rng.uniform(-7, 7, 2),
        "breathing": rng.normal(0, 1.0, (depth, 2)),
        "septum": np.deg2rad(rng.uniform(150, 250)),
        "ellipticity": rng.uniform(0.9, 1.12),
        "wobble": rng.normal(0, 0.025, (2, 3)),
        "fat": rng.uniform(0.8, 3.2),
        "lungs": rng.normal(0, 7, (2, 2)) + np.array([[-2.0, 86.0], [-20.0, -88.0]]),
        "liver": rng.normal(0, 8, 2) + np.array([70.0, -36.0]),
        "chest": np.array([rng.uniform(54, 70), rng.normal(0, 0.22)]),
        "papillary": rng.uniform(0.5, 2.3, 2) + np.array([0.0, np.pi]),
        "aorta": np.array([rng.uniform(20, 48), rng.uniform(46, 60), rng.uniform(8, 12)]),
        "tissue": {
            "blood": rng.uniform(0.62, 0.9),
            "wall": rng.uniform(0.22, 0.36),
            "lung": rng.uniform(0.03, 0.1),
            "liver": rng.uniform(0.26, 0.5),
            "muscle": rng.uniform(0.22, 0.4),
            "fat": rng.uniform(0.6, 1.0),
        },
        "bias": rng.normal(0, 0.16, 5),
        "texture": rng.uniform(0.06, 0.12),
        "blur": rng.uniform(0.55, 0.8),
        "noise": rng.uniform(0.02, 0.05),
        "scale": rng.uniform(250, 1100),
    }
    shape = (height, width, depth)
    affine = oblique_affine(rng, shape, (in_plane, in_plane, thickness), turns=((30, 60), (-40, -15), (-15, 15)))
    frames = {}
    for frame, heart in (("ED", diastole), ("ES", systole)):
        slices = [_draw_slice(rng, shape, z, in_plane, heart, patient) for z in range(depth)]
        image, label = (np.stack(arrays, axis=-1) for arrays in zip(*slices))
        frames[frame] = (np.round(image * patient["scale"]).astype(np.int16), label.astype(np.uint8), affine)
    return frames


def _draw_slice(
    rng: np.random.Generator, shape: tuple[int, int, int], z: int, in_plane: float, heart: _Heart, patient: dict
) -> tuple[np.ndarray, np.ndarray]:
    grid = _place(shape, z, in_plane, patient)
    label = _draw_heart(grid, heart, patient)
    image = _draw_background(grid, heart, patient, rng)
    image = _fill_heart(image, label, grid, heart, patient, rng)
    image = smooth(image, patient["blur"])
    image = image * _bias_field(grid, patient["bias"])
    return magnitude(rng, image, patient["noise"]), label


def _place(shape: tuple[int, int, int], z: int, in_plane: float, patient: dict) -> _Grid:
    height, width, depth = shape
    level = z / (depth - 1)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    y = (rows - (height - 1) / 2) * in_plane
    x = (columns - (width - 1) / 2) * in_plane
    center = patient["center"] + patient["tilt"] * (level - 0.5) + patient["breathing"][z]
    cos, sin = np.cos(patient["septum"]), np.sin(patient["septum"])
    dy, dx = y - center[0], x - center[1]
    return _Grid(x=x, y=y, u=dx * cos + dy * sin, v=-dx * sin + dy * cos, level=level)


def _draw_heart(grid: _Grid, heart: _Heart, patient: dict) -> np.ndarray:
    cavity, wall = _radii(grid.level, heart)
    angle = np.arctan2(grid.v, grid.u)
    waves = np.stack([np.cos(k * angle + grid.level * k) for k in (2, 3, 4)])
    inner, outer = (1 + np.tensordot(patient["wobble"][i], waves, axes=1) for i in range(2))
    distance = _distance(grid, patient)
    label = np.zeros(distance.shape, dtype=np.uint8)
    if grid.level > 0.2:
        label[_right_ventricle(grid, heart)] = RIGHT_VENTRICLE
    label[distance < (cavity + wall) * outer] = MYOCARDIUM
    label[distance < cavity * inner] = LEFT_VENTRICLE
    return label


def _radii(level: float, heart: _Heart) -> tuple[float, float]:
    """Cavity radius and wall thickness at a level: a truncated ellipsoid, its wall thinner toward the apex."""
    taper = np.sqrt(1 - (0.9 * (1 - level)) ** 2)
    return heart.lv_radius * taper, heart.wall * (0.75 + 0.25 * level)


def _distance(grid: _Grid, patient: dict) -> np.ndarray:
    """Distance from the long axis, slightly elliptic."""
    return np.hypot(grid.u * patient["ellipticity"], grid.v / patient["ellipticity"])


def _right_ventricle(grid: _Grid, heart: _Heart, margin: float = 0.0) -> np.ndarray:
    """An ellipse beside the left ventricle; the myocardium covers part of it, which leaves a crescent."""
    cavity, wall = _radii(grid.level, heart)
    taper = np.sqrt(1 - (1 - grid.level) ** 2) ** 0.7
    length, width = heart.rv_length * taper + margin, heart.rv_width * taper + margin
    return ((grid.u - 0.78 * (cavity + wall)) / width) ** 2 + ((grid.v + 3) / length) ** 2 < 1


def _draw_background(grid: _Grid, heart: _Heart, patient: dict, rng: np.random.Generator) -> np.ndarray:
    x, y, tissue = grid.x, grid.y, patient["tissue"]
    image = np.full(x.shape, tissue["muscle"])
    # Lungs on both sides of the mediastinum, with bright vessels.
    (left_y, left_x), (right_y, right_x) = patient["lungs"]
    lungs = ((x - left_x) / 64) ** 2 + ((y - left_y) / 78) ** 2 < 1
    lungs |= ((x - right_x) / 54) ** 2 + ((y - right_y) / 60) ** 2 < 1
    vessels = smooth(rng.normal(0, 1, x.shape), 1.3)
    image[lungs] = tissue["lung"]
    image[lungs & (vessels > 2.0 * vessels.std())] = 0.75 * tissue["blood"]
    # Liver below the right heart, larger toward the apex.
    liver_y, liver_x = patient["liver"]
    liver = ((x - liver_x) / 62) ** 2 + ((y - liver_y + 22 * (1 - grid.level)) / 38) ** 2 < 1
    image[liver] = tissue["liver"] * (1 + 0.25 * (vessels[liver] > 2 * vessels.std()))
    # Chest wall in front: muscle under a bright layer of fat, and air.
    front = y + patient["chest"][1] * x + 0.003 * x**2 + patient["chest"][0]
    image[front < 8] = tissue["muscle"]
    image[front < 0] = tissue["fat"]
    image[front < -12] = 0.01
    # Descending aorta, as bright as the cavities.
    aorta_y, aorta_x, aorta_radius = patient["aorta"]
    aorta = np.hypot(x - aorta_x, y - aorta_y) - aorta_radius
    image[aorta < 2] = tissue["wall"]
    image[aorta < 0] = tissue["blood"] * 0.97
    # Fat around the heart, thicker on one side, and the thin wall of the right ventricle.
    cavity, wall = _radii(grid.level, heart)
    distance = _distance(grid, patient)
    fat = patient["fat"] * (1 + np.cos(np.arctan2(grid.v, grid.u) - 1.2))
    image[distance < cavity + wall + fat] = tissue["fat"]
    if grid.level > 0.2:
        image[_right_ventricle(grid, heart, margin=3.0 + patient["fat"])] = tissue["fat"]
        image[_right_ventricle(grid, heart, margin=3.0)] = tissue["wall"]
    return image


def _fill_heart(
    image: np.ndarray, label: np.ndarray, grid: _Grid, heart: _Heart, patient: dict, rng: np.random.Generator
) -> np.ndarray:
    tissue = patient["tissue"]
    texture = 1 + patient["texture"] * unit_deviation(smooth(rng.normal(0, 1, image.shape), 2.0))
    trabeculae = unit_deviation(smooth(rng.normal(0, 1, image.shape), 1.1))
    image = image * texture
    image[label == MYOCARDIUM] = (tissue["wall"] * texture)[label == MYOCARDIUM]
    image[label == LEFT_VENTRICLE] = (tissue["blood"] * texture)[label == LEFT_VENTRICLE]
    right = label == RIGHT_VENTRICLE
    image[right] = (0.93 * tissue["blood"] * (texture - 0.3 * (trabeculae > 1.3)))[right]
    # Papillary muscles: dark, but part of the cavity in the labels.
    cavity, _ = _radii(grid.level, heart)
    if 0.25 < grid.level < 0.8:
        for angle in patient["papillary"]:
            at = 0.66 * cavity
            papillary = np.hypot(grid.u - at * np.cos(angle), grid.v - at * np.sin(angle)) < 0.17 * cavity
            image[papillary & (label == LEFT_VENTRICLE)] = 1.15 * tissue["wall"]
    return image


def _bias_field(grid: _Grid, coefficients: np.ndarray) -> np.ndarray:
    """Smooth gain of the coils, higher at the chest wall."""
    x, y = grid.x / 75, grid.y / 75
    terms = np.stack([x, y, x * y, x**2 - 0.5, y**2 - 0.5])
    return np.exp(np.tensordot(coefficients, terms, axes=1) - 0.18 * y)
