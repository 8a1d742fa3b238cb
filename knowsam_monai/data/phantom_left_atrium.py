"""Drawing one synthetic left atrium in late-enhancement MR: anatomy in millimeters, then tissue, slabs and noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knowsam_monai.data.phantom_scanner import magnitude, oblique_affine, smooth, turn_matrix, unit_deviation


class _Atrium(NamedTuple):
    """Geometry of one atrium in its own axes: right to left, back to front, foot to head; mm."""

    axes: np.ndarray  # half axes of the body
    wobble: np.ndarray  # of its surface, 5 terms
    veins: np.ndarray  # directions (4, 3)
    vein_bends: np.ndarray  # lateral displacement after 25 mm (4, 3)
    vein_radii: np.ndarray
    vein_length: float  # of the label, beyond the body
    appendage: np.ndarray  # center and half axes (2, 3)
    valve: np.ndarray  # unit normal of the mitral valve
    valve_depth: float  # its distance from the center


def draw_left_atrium(
    seed: int, number: int, max_size: int = 64
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw patient `number`: for "LGE" its image (H, W, D) int16, label (H, W, D) uint8 and affine (4, 4).

    The label is 1 in the blood of the atrium's body, of the appendage and of the first millimeters of four veins, up
    to the mitral valve. Right atrium, left ventricle and aorta are equally bright.
    """
    rng = np.random.default_rng([seed, number])
    in_plane = rng.integers(3 * max_size // 4, max_size + 1, 2)
    shape = (int(in_plane[0]), int(in_plane[1]), int(rng.integers(max_size // 2, 5 * max_size // 8 + 1)))
    # The field of view does not depend on the number of voxels; all three spacings differ.
    spacing = np.append(rng.uniform(1.4, 1.65, 2), rng.uniform(1.9, 2.3)) * 64 / max_size
    atrium = _draw_shape(rng)
    gains, shifts = _slabs(rng, shape[2])
    scanner = _place(rng, shape, spacing, shifts)
    atrium_grid = scanner @ turn_matrix(np.deg2rad(rng.uniform(-20, 20, 3)))
    outside, label, veins, past_valve = _draw_atrium(atrium_grid, atrium)

    tissue = {
        "blood": rng.uniform(0.5, 0.75),
        "muscle": rng.uniform(0.28, 0.4),
        "wall": rng.uniform(0.1, 0.2),  # nulled by the inversion pulse
        "scar": rng.uniform(0.85, 1.15),
        "lung": rng.uniform(0.03, 0.08),
        "fat": rng.uniform(0.45, 0.7),
        "bone": rng.uniform(0.32, 0.48),
    }
    image = _draw_chest(rng, scanner, atrium_grid, atrium, tissue)
    image[veins] = tissue["blood"]
    wall = (outside > 0) & (outside < rng.uniform(2.0, 3.0))
    image[wall] = tissue["wall"]
    scar = unit_deviation(smooth(rng.normal(0, 1, shape), 2.0)) > rng.uniform(0.6, 1.4)
    image[wall & scar] = tissue["scar"]
    image[_ventricle(atrium_grid, atrium) & (past_valve > 1.5)] = tissue["blood"]
    image[(np.abs(past_valve) < 1.5) & (outside < 3)] = tissue["wall"]
    image[label] = tissue["blood"]

    image *= 1 + rng.uniform(0.05, 0.1) * unit_deviation(smooth(rng.normal(0, 1, shape), 2.0))
    image = smooth(image, rng.uniform(0.5, 0.7)) * gains * _coil_gain(rng, scanner)
    image = magnitude(rng, image, rng.uniform(0.02, 0.05)) * rng.uniform(200, 900)
    affine = oblique_affine(rng, shape, spacing, turns=((-8, 8), (-8, 8), (-12, 12)))
    return {"LGE": (np.round(image).astype(np.int16), label.astype(np.uint8), affine)}


def _draw_shape(rng: np.random.Generator) -> _Atrium:
    axes = rng.uniform([21, 16, 17], [25, 19, 21]) * rng.uniform(0.88, 1.12)
    sides = np.array([[-1, -0.35, 0.45], [-1, -0.35, -0.45], [1, -0.35, 0.45], [1, -0.35, -0.45]])
    veins = sides + rng.normal(0, 0.12, (4, 3))
    valve = np.array([0.45, 0.75, -0.5]) + rng.normal(0, 0.1, 3)
    valve /= np.linalg.norm(valve)
    return _Atrium(
        axes=axes,
        wobble=rng.normal(0, 0.07, 5),
        veins=veins / np.linalg.norm(veins, axis=1, keepdims=True),
        vein_bends=rng.normal(0, 2.5, (4, 3)),
        vein_radii=rng.uniform(4.5, 6.5, 4),
        vein_length=rng.uniform(5, 8),
        appendage=np.stack([axes * rng.uniform(0.55, 0.8, 3), rng.uniform([7, 5, 5], [10, 8, 8])]),
        valve=valve,
        valve_depth=rng.uniform(0.65, 0.8) * np.linalg.norm(axes * valve),
    )


def _slabs(rng: np.random.Generator, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Gain of each slice, darker at both edges of its slab, and in-plane shift (D, 2) of its slab, mm."""
    num_slabs = int(rng.integers(2, 4))
    slab, position = np.divmod(np.arange(depth) * num_slabs / depth, 1)
    slab = slab.astype(int)
    edge = (2 * position + num_slabs / depth - 1) ** 4
    gains = rng.normal(1, 0.07, num_slabs)[slab] * (1 - rng.uniform(0.1, 0.25) * edge)
    return gains, rng.normal(0, 0.6, (num_slabs, 2))[slab]


def _place(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing: np.ndarray, shifts: np.ndarray
) -> np.ndarray:
    """Position of every voxel (H, W, D, 3) relative to the atrium's center, mm."""
    middle = (np.array(shape) - 1) / 2
    place = (np.moveaxis(np.indices(shape), 0, -1) - middle) * spacing - rng.uniform(-5, 5, 3)
    place[..., :2] -= shifts
    return place


def _draw_atrium(place: np.ndarray, atrium: _Atrium) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Approximate distance from body and appendage, mm; label; complete veins; distance past the valve, mm."""
    outside = _outside_body(place, atrium)
    past_valve = place @ atrium.valve - atrium.valve_depth
    center, half_axes = atrium.appendage
    outside_appendage = (np.linalg.norm((place - center) / half_axes, axis=-1) - 1) * half_axes.mean()
    veins = np.zeros(outside.shape, dtype=bool)
    for direction, bend, radius in zip(atrium.veins, atrium.vein_bends, atrium.vein_radii):
        along = place @ direction
        axis = along[..., None] * direction + (along[..., None] / 25) ** 2 * bend
        veins |= (along > 0) & (np.linalg.norm(place - axis, axis=-1) < radius)
    label = (outside < 0) & (past_valve < 0)
    label |= (veins & (outside < atrium.vein_length)) | (outside_appendage < 0)
    return np.minimum(outside, outside_appendage), label, veins, past_valve


def _outside_body(place: np.ndarray, atrium: _Atrium) -> np.ndarray:
    scaled = place / atrium.axes
    radius = np.linalg.norm(scaled, axis=-1)
    u, v, w = np.moveaxis(scaled / np.maximum(radius, 1e-9)[..., None], -1, 0)
    terms = np.stack([u * v, v * w, u * w, u**2 - 1 / 3, w**2 - 1 / 3])
    return (radius * (1 + np.tensordot(atrium.wobble, terms, axes=1)) - 1) * atrium.axes.mean()


def _ventricle(place: np.ndarray, atrium: _Atrium) -> np.ndarray:
    """The left ventricle's blood behind the valve."""
    center = (atrium.valve_depth + 12) * atrium.valve
    return np.linalg.norm(place - center, axis=-1) < 20


def _draw_chest(
    rng: np.random.Generator, scanner: np.ndarray, atrium_grid: np.ndarray, atrium: _Atrium, tissue: dict[str, float]
) -> np.ndarray:
    """Everything around the atrium: the chest, along the body's axes, and the other chambers, along the atrium's."""
    x, y, _ = np.moveaxis(scanner, -1, 0)
    width, back, front = atrium.axes[0], -atrium.axes[1], atrium.axes[1]
    image = np.full(x.shape, tissue["muscle"])
    image[unit_deviation(smooth(rng.normal(0, 1, x.shape), 3.0)) > 0.8] = tissue["fat"]
    for side in (-1, 1):
        border = width + rng.uniform(9, 15) + 0.004 * (y - rng.uniform(-10, 10)) ** 2
        image[side * x > border] = tissue["lung"]
    spine = np.hypot(x - rng.uniform(-4, 4), y - back + rng.uniform(24, 28))
    image[spine < rng.uniform(12, 15)] = tissue["bone"]
    tubes = [
        (rng.uniform(8, 16), back - rng.uniform(10, 13), rng.uniform(7, 9)),  # descending aorta
        (rng.uniform(-10, -2), front + rng.uniform(13, 17), rng.uniform(9, 12)),  # ascending aorta
    ]
    for tube_x, tube_y, radius in tubes:
        distance = np.hypot(x - tube_x, y - tube_y)
        image[distance < radius + 1.5] = tissue["wall"]
        image[distance < radius] = 0.97 * tissue["blood"]
    right_center = np.array([-width - 14, 9, -4]) + rng.normal(0, 2, 3)
    right = np.linalg.norm((atrium_grid - right_center) / rng.uniform([12, 14, 16], [16, 18, 20]), axis=-1)
    image[right < 1.12] = tissue["wall"]
    image[right < 1] = 0.95 * tissue["blood"]
    image[_ventricle(atrium_grid / 1.15, atrium)] = tissue["wall"]  # its muscle
    return image


def _coil_gain(rng: np.random.Generator, place: np.ndarray) -> np.ndarray:
    """Smooth gain of the coils."""
    x, y, z = np.moveaxis(place / 50, -1, 0)
    terms = np.stack([x, y, z, x * y, x**2, y**2])
    return np.exp(np.tensordot(rng.normal(0, 0.12, 6), terms, axes=1))
