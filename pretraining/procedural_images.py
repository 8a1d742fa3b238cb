"""Procedural images with object masks, the training data of the stand-in teacher.

No photographs or medical images are used. Overlapping shapes with random outlines are single, nested (a ring and its
inside) or touching. They get gray values, texture and shading, followed by a bias field, blur and noise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MIN_AREA = 0.002  # smallest visible area of an object, as a fraction of the image


class ProceduralImage(NamedTuple):
    """An image (H, W) float32 from 0 to 1, its masks (M, H, W) bool, and the kind of each mask.

    Kinds are "single", "inner" and "outer" for nested pairs, "touching" for both of a touching pair, and "whole" for
    the union of a pair. Masks contain visible pixels only: later objects cover earlier ones.
    """

    image: np.ndarray
    masks: np.ndarray
    kinds: tuple[str, ...]


def draw_image(seed: int, index: int, size: int = 128) -> ProceduralImage:
    """Draw image `index` of the endless set `seed`; the pixels are a function of both numbers.

    Args:
        seed: number of the set.
        index: number of the image.
        size: height and width in pixels.

    Example::

        >>> drawn = draw_image(seed=0, index=0)
        >>> drawn.image.shape, drawn.masks.shape[1:], len(drawn.masks) == len(drawn.kinds)
        ((128, 128), (128, 128), True)
    """
    rng = np.random.default_rng([seed, index])
    labels = np.zeros((size, size), dtype=np.int64)
    parts: list[tuple[tuple[int, ...], str]] = []  # (labels, kind)
    masks, kinds = [], []
    num_things = int(rng.integers(2, 8))
    while num_things > 0 or not masks:
        _add_thing(rng, labels, parts)
        num_things -= 1
        if num_things <= 0:
            masks, kinds = _visible(labels, parts)
    return ProceduralImage(_paint(rng, labels), np.stack(masks), tuple(kinds))


def _add_thing(rng: np.random.Generator, labels: np.ndarray, parts: list[tuple[tuple[int, ...], str]]) -> None:
    """Draw an object or a pair over the earlier ones."""
    new = 1 + sum(len(numbers) for numbers, kind in parts if kind != "whole")
    center, radius = rng.uniform(0.1, 0.9, 2), np.exp(rng.uniform(np.log(0.05), np.log(0.28)))
    outline = _distance_field(rng, labels.shape[0], center, radius)
    style = rng.choice(["single", "nested", "touching"], p=[0.4, 0.35, 0.25])
    if style == "single":
        labels[outline < 1] = new
        parts.append(((new,), "single"))
        return
    if style == "nested":
        inner = outline < rng.uniform(0.45, 0.85)
        if rng.random() < 0.5:  # its own shape instead of a scaled copy
            inner = _distance_field(rng, labels.shape[0], center, radius * rng.uniform(0.4, 0.7)) < 1
        labels[outline < 1] = new
        labels[inner & (outline < 1)] = new + 1
        names = ("outer", "inner")
    else:
        turn = rng.uniform(0, 2 * np.pi)
        step = radius * rng.uniform(0.7, 1.3) * np.array([np.sin(turn), np.cos(turn)])
        beside = _distance_field(rng, labels.shape[0], center + step, radius * rng.uniform(0.6, 1.2)) < 1
        labels[beside] = new + 1  # the first object covers it, which leaves a crescent
        labels[outline < 1] = new
        names = ("touching", "touching")
    parts += [((new,), names[0]), ((new + 1,), names[1]), ((new, new + 1), "whole")]


def _distance_field(rng: np.random.Generator, size: int, center: np.ndarray, radius: float) -> np.ndarray:
    """(H, W), below 1 inside a closed curve ``r(t) = radius (1 + sum_k a_k cos(k t + p_k))``, stretched and rotated."""
    y, x = _coordinates(size)
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.35, 0.35))
    cosine, sine = np.cos(turn), np.sin(turn)
    u = ((x - center[1]) * cosine + (y - center[0]) * sine) * stretch
    v = ((y - center[0]) * cosine - (x - center[1]) * sine) / stretch
    angle, reach = np.arctan2(v, u), np.float32(radius)
    roughness = rng.choice([0.02, 0.08, 0.2])
    for k in range(2, 6):
        amplitude = np.float32(radius * roughness * rng.normal() / (k - 1))
        reach = reach + amplitude * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / np.maximum(reach, 0.3 * radius)


def _visible(labels: np.ndarray, parts: list[tuple[tuple[int, ...], str]]) -> tuple[list[np.ndarray], list[str]]:
    least = max(4, MIN_AREA * labels.size)
    masks, kinds = [], []
    for numbers, kind in parts:
        each = [labels == number for number in numbers]
        if all(mask.sum() >= least for mask in each):  # the union is left out if one part is hidden
            masks.append(np.logical_or.reduce(each))
            kinds.append(kind)
    return masks, kinds


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    size, count = labels.shape[0], int(labels.max()) + 1
    y, x = _coordinates(size)
    textures = np.stack([_smooth(rng.normal(0, 1, labels.shape), s) for s in rng.uniform(0.5, 6, 3) * size / 128])
    textures /= textures.std(axis=(1, 2), keepdims=True)
    level, strength = rng.uniform(0, 1, count), rng.uniform(0, 0.12, count)
    slope, texture = rng.normal(0, 0.25, (2, count)), rng.integers(0, 3, count)
    image = level[labels] + slope[0][labels] * (x - 0.5) + slope[1][labels] * (y - 0.5)
    image += strength[labels] * np.take_along_axis(textures, texture[labels][None], axis=0)[0]

    image = (image - image.min()) / max(np.ptp(image), 1e-6)
    bias = _smooth(rng.normal(0, 1, labels.shape), 0.25 * size)
    image = image ** rng.uniform(0.7, 1.4) * np.exp(rng.uniform(0, 0.3) * bias / bias.std())
    image = _smooth(image, rng.uniform(0.2, 1.3) * size / 128)
    noise = rng.uniform(0, 0.08) * rng.normal(0, 1, (2, *labels.shape))
    image = np.hypot(image + noise[0], noise[1]) if rng.random() < 0.5 else image + noise[0]
    low, high = np.percentile(image, [rng.uniform(0, 1), rng.uniform(98, 100)])
    image = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return (image * rng.uniform(0.4, 1.0)).astype(np.float32)  # slices rarely contain a volume's brightest voxel


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by FFT; `sigma` in pixels."""
    rows, columns = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])[None, :]
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (rows**2 + columns**2))
    return np.fft.irfft2(np.fft.rfft2(image) * transfer, s=image.shape)


@lru_cache(maxsize=4)
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    centers = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centers[:, None], centers[None, :]
