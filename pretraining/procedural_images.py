"""Procedural images with object masks, the training data of the stand-in teacher.

No photographs or medical images are used. Shapes with random outlines are single, nested (a ring and its inside),
touching, or chambers: a ring around a cavity, and a crescent beside it. In two thirds of the images they lie among
large dark, gray and bright regions inside an outline, in the others on a plain background. Gray values, texture,
shading, partial volume, a bias field, blur and noise follow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MIN_AREA = 0.002  # smallest visible area of an object, as a fraction of the image


class ProceduralImage(NamedTuple):
    """An image (H, W) float32 from 0 to 1, its masks (M, H, W) bool, and the kind of each mask.

    Kinds are "single", "inner" and "outer" for nested pairs, "touching" for both of a touching pair, "whole" for the
    union of a touching pair, and "wall", "cavity" and "crescent" of a chamber. Masks contain visible pixels only: later
    objects cover earlier ones. The union of a ring and its inside is not an object: a box around both means the ring.
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
    scene = _Scene(np.random.default_rng([seed, index]), size)
    if scene.rng.random() < 0.65:
        scene.add_surroundings()
    chambers, others = scene.rng.choice([[0, 5], [1, 2], [1, 4], [2, 1]], p=[0.2, 0.4, 0.2, 0.2])
    things = [scene.add_chamber] * chambers + [scene.add_thing] * int(scene.rng.integers(0, others + 1))
    for place in scene.rng.permutation(len(things)):
        things[place]()
    masks, kinds = scene.visible()
    while not masks:
        scene.add_thing()
        masks, kinds = scene.visible()
    return ProceduralImage(scene.paint(), np.stack(masks), tuple(kinds))


class _Scene:
    """Objects and tissues of an image: a tissue is one gray value, and an object may have several tissues."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.objects = np.zeros((size, size), dtype=np.int64)
        self.tissues = np.zeros((size, size), dtype=np.int64)
        self.levels = [rng.uniform(0, 1)]
        self.parts: list[tuple[tuple[int, ...], str]] = []  # (objects, kind)
        self.num_objects = 0

    def add_surroundings(self) -> None:
        """A large outline with a bright rim in the dark, and dark, gray and bright regions in it."""
        rng = self.rng
        self.levels = [rng.uniform(0, 0.1)]
        outline = self._distances(rng.uniform(0.3, 0.7, 2), rng.uniform(0.35, 0.75))
        self._fill(outline < 1, rng.uniform(0.4, 1))
        inside = outline < rng.uniform(0.8, 0.97)
        self._fill(inside, rng.uniform(0.1, 0.5))
        for _ in range(rng.integers(1, 4)):
            region = self._distances(rng.uniform(0.1, 0.9, 2), rng.uniform(0.12, 0.35)) < 1
            self._fill(region & inside, rng.uniform(0, 0.2))
        for _ in range(rng.integers(4, 20)):
            radius = np.exp(rng.uniform(np.log(0.015), np.log(0.15)))
            region = self._distances(rng.uniform(0.05, 0.95, 2), radius, waves=2) < 1
            self._fill(region & inside, rng.uniform(0, 1))

    def add_chamber(self) -> None:
        """A ring around a cavity, a crescent beside it with a thin wall of its own, and spots of the wall in both."""
        rng = self.rng
        center, radius = rng.uniform(0.2, 0.8, 2), np.exp(rng.uniform(np.log(0.05), np.log(0.2)))
        cavity_level = rng.uniform(0.25, 1)
        wall_level = cavity_level * rng.uniform(0.1, 0.75)
        if rng.random() < 0.15:
            cavity_level, wall_level = wall_level, cavity_level
        turn = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.sin(turn), np.cos(turn)])
        if rng.random() < 0.75:
            step = radius * rng.uniform(0.7, 1.5)
            crescent = self._distances(center + step * direction, radius * rng.uniform(0.6, 1.3))
            self._fill(crescent < rng.uniform(1, 1.25), wall_level * rng.uniform(0.8, 1.2))
            self._fill(crescent < 1, cavity_level * rng.uniform(0.75, 1.2), "crescent")
            self._add_spots(crescent < 1, wall_level, radius)
        outline = self._distances(center, radius)
        share = rng.uniform(0.4, 0.88)
        if rng.random() < 0.6:
            inner = outline < share
        else:
            offset = rng.normal(0, 0.25, 2) * (1 - share) * radius
            inner = (self._distances(center + offset, share * radius) < 1) & (outline < 0.95)
        self._fill(outline < 1, wall_level, "wall")
        self._fill(inner, cavity_level, "cavity")
        self._add_spots(inner, wall_level, radius * share)

    def add_thing(self) -> None:
        """A single object or a pair, of any gray values."""
        rng = self.rng
        center, radius = rng.uniform(0.1, 0.9, 2), np.exp(rng.uniform(np.log(0.05), np.log(0.28)))
        outline = self._distances(center, radius)
        levels, style = rng.uniform(0, 1, 2), rng.choice(["single", "nested", "touching"], p=[0.45, 0.3, 0.25])
        if style == "single":
            self._fill(outline < 1, levels[0], "single")
        elif style == "nested":
            inner = outline < rng.uniform(0.45, 0.85)
            if rng.random() < 0.5:  # its own shape instead of a scaled copy
                inner = self._distances(center, radius * rng.uniform(0.4, 0.7)) < 1
            self._fill(outline < 1, levels[0], "outer")
            self._fill(inner & (outline < 1), levels[1], "inner")
        else:
            turn = rng.uniform(0, 2 * np.pi)
            step = radius * rng.uniform(0.7, 1.3) * np.array([np.sin(turn), np.cos(turn)])
            beside = self._distances(center + step, radius * rng.uniform(0.6, 1.2)) < 1
            self._fill(beside, levels[0], "touching")  # the second object covers it, which leaves a crescent
            self._fill(outline < 1, levels[1], "touching")
            self.parts.append(((self.num_objects - 1, self.num_objects), "whole"))

    def _add_spots(self, region: np.ndarray, level: float, radius: float) -> None:
        """Spots of another tissue that belong to the object."""
        places = np.argwhere(region)
        for _ in range(self.rng.integers(0, 4) if len(places) else 0):
            center = (self.rng.choice(places) + 0.5) / self.size
            spot = self._distances(center, radius * self.rng.uniform(0.08, 0.3), waves=0) < 1
            self._fill(spot & region, level * self.rng.uniform(0.8, 1.4))

    def _fill(self, region: np.ndarray, level: float, kind: str | None = None) -> None:
        self.tissues[region] = len(self.levels)
        self.levels.append(level)
        if kind is not None:
            self.num_objects += 1
            self.objects[region] = self.num_objects
            self.parts.append(((self.num_objects,), kind))

    def _distances(self, center: np.ndarray, radius: float, waves: int = 4) -> np.ndarray:
        """(H, W), below 1 in a closed curve ``r(t) = radius (1 + sum_k a_k cos(k t + p_k))``, stretched and rotated."""
        rng = self.rng
        y, x = _coordinates(self.size)
        turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.35, 0.35))
        cosine, sine = np.float32(np.cos(turn) * stretch), np.float32(np.sin(turn) * stretch)
        y, x, squeeze = y - np.float32(center[0]), x - np.float32(center[1]), np.float32(stretch**-2)
        u, v = x * cosine + y * sine, (y * cosine - x * sine) * squeeze
        distance, reach = np.hypot(u, v), np.float32(radius)
        if waves:
            angle, roughness = np.arctan2(v, u), rng.choice([0.02, 0.08, 0.2])
            for k in range(2, 2 + waves):
                amplitude = np.float32(radius * roughness * rng.normal() / (k - 1))
                reach = reach + amplitude * np.cos(k * angle + np.float32(rng.uniform(0, 2 * np.pi)))
        return distance / np.maximum(reach, np.float32(0.3 * radius))

    def visible(self) -> tuple[list[np.ndarray], list[str]]:
        """Masks and kinds of the objects that are not hidden."""
        least = max(4, MIN_AREA * self.objects.size)
        areas = np.bincount(self.objects.flat, minlength=self.num_objects + 1)
        # a union is left out if one of its parts is hidden
        seen = [(numbers, kind) for numbers, kind in self.parts if all(areas[number] >= least for number in numbers)]
        return [np.isin(self.objects, numbers) for numbers, _ in seen], [kind for _, kind in seen]

    def paint(self) -> np.ndarray:
        """The image (H, W)."""
        rng, tissues, count = self.rng, self.tissues, len(self.levels)
        y, x = _coordinates(self.size)
        scales = rng.uniform(0.5, 6, 3) * self.size / 128
        textures = np.stack([_smooth(rng.normal(0, 1, tissues.shape), scale) for scale in scales])
        textures /= textures.std(axis=(1, 2), keepdims=True)
        levels, strength = np.array(self.levels), rng.uniform(0, 0.12, count) * rng.uniform(0, 1)
        slopes, texture = rng.normal(0, rng.uniform(0, 0.25), (2, count)), rng.integers(0, 3, count)
        image = levels[tissues] + slopes[0][tissues] * (x - 0.5) + slopes[1][tissues] * (y - 0.5)
        image += strength[tissues] * np.take_along_axis(textures, texture[tissues][None], axis=0)[0]
        image += rng.uniform(0, 0.08) * textures[0]  # crosses edges
        if rng.random() < 0.5:  # partial volume: a neighboring slice
            shift = rng.integers(-2, 3, 2)
            image += rng.uniform(0, 0.5) * (np.roll(image, shift, axis=(0, 1)) - image)

        image = (image - image.min()) / max(np.ptp(image), 1e-6)
        bias = _smooth(rng.normal(0, 1, tissues.shape), rng.uniform(0.15, 0.4) * self.size)
        image = image ** rng.uniform(0.7, 1.6) * np.exp(rng.uniform(0, 0.7) * bias / bias.std())
        image = _smooth(image, rng.uniform(0.2, 1.2) * self.size / 128)
        noise = rng.uniform(0, 0.08) * rng.uniform(0, 1) * rng.normal(0, 1, (2, *tissues.shape))
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
