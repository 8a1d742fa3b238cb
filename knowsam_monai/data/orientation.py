"""Flips and turns of a square image, and the check that nothing else moves what a cached encoder sees."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    Flip,
    MapTransform,
    RandomizableTransform,
    Rotate90,
)

from knowsam_monai.errors import KnowSAMValueError

__all__ = [
    "SAM_IMAGE",
    "RandOrientationd",
    "orient",
]

logger = logging.getLogger(__name__)

SAM_IMAGE = "sam_image"
NUM_ORIENTATIONS = 8


def orient(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """One of the eight flips and turns of a square: `orientation % 4` quarter turns, then from 4 on a flip of axis 0.

    Args:
        image: (ch, n, n); a MetaTensor's affine is turned too.
        orientation: 0 (nothing) to 7.

    Raises:
        ValueError: if the image is not 2D and square.

    Example:
        >>> orient(torch.tensor([[[1, 2], [3, 4]]]), 4).tolist()
        [[[3, 4], [1, 2]]]
    """
    if image.ndim != 3 or image.shape[1] != image.shape[2]:
        raise KnowSAMValueError(
            f"`image` must be 2D and square, (channels, n, n), to be flipped and turned but is of shape "
            f"{tuple(image.shape)}; resize or pad it before."
        )
    if orientation % 4:
        image = Rotate90(k=orientation % 4)(image)
    return Flip(spatial_axis=0)(image) if orientation >= 4 else image


class RandOrientationd(RandomizableTransform, MapTransform):
    """Flip and turn a square image by one of the eight orientations, drawn with equal chances.

    Beside the keys it writes `"orientation"`, 0 to 7 (see `orient`), and `"sam_image"`: the image flipped and turned
    but not augmented otherwise. `SAMDistillation` gives that one to the teacher: SAM sees the image before intensities
    are augmented, and so each image in eight forms only, which `SAMTeacher(encoder="cached")` encodes once.
    Put it before every other random transform.

    Args:
        keys: keys to flip and turn alike.
        image_key: the one of them that SAM sees.
        orientations: those to draw from; all eight.
        allow_missing_keys: for unlabelled items.

    Shape:
        (ch, n, n) each.

    Raises:
        ValueError: if `image_key` is not one of `keys`, an orientation is not 0 to 7, or an image is not 2D and square.

    Example:
        >>> item = RandOrientationd(keys="image")({"image": torch.rand(1, 8, 8)})
        >>> sorted(item)
        ['image', 'orientation', 'sam_image']
    """

    def __init__(
        self,
        keys: Any = ("image", "label"),
        image_key: str = "image",
        orientations: Sequence[int] = tuple(range(NUM_ORIENTATIONS)),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if image_key not in self.keys:
            raise KnowSAMValueError(f"`image_key` must be one of `keys`, {list(self.keys)}, but is {image_key!r}.")
        if len(orientations) == 0 or any(o not in range(NUM_ORIENTATIONS) for o in orientations):
            raise KnowSAMValueError(f"`orientations` must be numbers from 0 to 7 but is {list(orientations)}.")
        self.image_key = image_key
        self.orientations = tuple(orientations)
        self.orientation = self.orientations[0]

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self.orientation = self.orientations[self.R.randint(len(self.orientations))]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize()
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = orient(item[key], self.orientation)
        return {**item, "orientation": self.orientation, SAM_IMAGE: item[self.image_key].clone()}
