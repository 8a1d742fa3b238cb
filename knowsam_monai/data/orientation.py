"""The eight flips and rotations of a square image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Flip, MapTransform, RandomizableTransform, Rotate90

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import without_meta

SAM_IMAGE = "sam_image"
NUM_ORIENTATIONS = 8


def orient(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Rotate a square image by `orientation % 4` quarter turns, then flip axis 0 if `orientation` is 4 or more.

    Args:
        image: (ch, n, n). A MetaTensor's affine is updated; a plain tensor stays one.
        orientation: 0 (no change) to 7.

    Raises:
        ValueError: if the image is not 2D and square.

    Example:
        >>> orient(torch.tensor([[[1, 2], [3, 4]]]), 4).tolist()
        [[[3, 4], [1, 2]]]
    """
    if image.ndim != 3 or image.shape[1] != image.shape[2]:
        raise KnowSAMValueError(
            f"`image` must be 2D and square, (channels, n, n), to be flipped and rotated but has shape "
            f"{tuple(image.shape)}; resize or pad it first."
        )
    oriented = Rotate90(k=orientation % 4)(image) if orientation % 4 else image
    oriented = Flip(spatial_axis=0)(oriented) if orientation >= 4 else oriented
    return oriented if isinstance(image, MetaTensor) else without_meta(oriented)  # all rows of a batch are of one type


class RandOrientationd(RandomizableTransform, MapTransform):
    """Flip and rotate a square image to one of eight orientations, drawn with equal probability.

    It also adds `"orientation"`, 0 to 7 (see `orient`), and `"sam_image"`, a copy of the oriented image.
    `SAMDistillation` passes this copy to the teacher: SAM sees images before intensity augmentation, so each image has
    only eight variants, which `SAMTeacher(encoder="cached")` encodes once. Put this transform before all other random
    transforms.

    Args:
        keys: keys to transform equally.
        image_key: the key of the image for SAM.
        allow_missing_keys: True for unlabeled items.

    Shape:
        (ch, n, n) each.

    Raises:
        ValueError: if `image_key` is not one of `keys`, or an image is not 2D and square.

    Example:
        >>> item = RandOrientationd(keys="image")({"image": torch.rand(1, 8, 8)})
        >>> sorted(item)
        ['image', 'orientation', 'sam_image']
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if image_key not in self.keys:
            raise KnowSAMValueError(f"`image_key` must be one of `keys`, {list(self.keys)}, but is {image_key!r}.")
        self.image_key = image_key
        self.orientation = 0

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self.orientation = self.R.randint(NUM_ORIENTATIONS)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize()
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = orient(item[key], self.orientation)
        return {**item, "orientation": self.orientation, SAM_IMAGE: item[self.image_key].clone()}
