"""The transforms that MONAI lacks: checking a case by name, scaling by volume, splitting a volume into slices."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import nibabel
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, ScaleIntensity, SplitDim, Transform
from monai.transforms.traits import MultiSampleTrait

from knowsam_monai.errors import KnowSAMValueError

__all__ = ["CheckDatad", "ScaleVolumed", "SplitSlicesd", "image_name"]

AXES = (("L", "R"), ("P", "A"), ("I", "S"))  # names of the ends of the axes, as nibabel has them

# Resampling and arithmetic in float32 leave labels so far beside their integer.
ROUNDED = 1e-3
# The square of a larger one is no float32, and so neither is the variance.
LARGEST_VALUE = 1e18

logger = logging.getLogger(__name__)


class CheckDatad(Transform):
    """Refuse a case that would silently train wrong, naming its file, and give its label the image's grid and classes.

    A label whose header has the image's grid with axes in another order or direction is turned to the image's. One that
    differs otherwise, as after a tool that lost the header, is taken as aligned voxel by voxel, and gets the image's
    affine. Either is warned of. Label values within 0.001 of an integer are rounded. Of two classes a mask of 0 and 255
    is read as 0 and 1, which is warned of once.

    Args:
        image_key: key of the image, channel first.
        label_key: key of the label, channel first, one channel of class numbers; absent in unlabelled items.
        num_classes: number of classes C, background included: label values are the integers 0 to C - 1.
        num_channels: channels that the network takes; None for any number.
        num_axes: spatial axes that the network takes; None for 2 or 3.
        warn: whether what is put right is warned of.

    Shape:
        image (ch, *spatial), label (1, *spatial).

    Raises:
        ValueError: if the image has another number of channels or axes, NaN, infinite values or some above 1e18, the
            label has another spatial shape or more than one channel, or a label value is no integer from 0 to C - 1.

    Example:
        >>> check = CheckDatad(num_classes=4)
        >>> case = check({"image": torch.rand(1, 8, 8), "label": torch.zeros(1, 8, 8)})
    """

    def __init__(
        self,
        image_key: str = "image",
        label_key: str = "label",
        num_classes: int = 4,
        num_channels: int | None = None,
        warn: bool = True,
        num_axes: int | None = None,
    ) -> None:
        if num_classes < 2:
            raise KnowSAMValueError(f"`num_classes` must be at least 2 (background included) but is {num_classes}.")
        self.image_key = image_key
        self.label_key = label_key
        self.num_classes = num_classes
        self.num_channels = num_channels
        self.warn = warn
        self.has_warned_of_masks = False
        self.num_axes = num_axes

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        image = data[self.image_key]
        if image.ndim - 1 not in ((2, 3) if self.num_axes is None else (self.num_axes,)):
            raise KnowSAMValueError(
                f"`{self.image_key}` must have {self.num_axes or '2 or 3'} spatial axes but {image_name(image)} has "
                f"{image.ndim - 1}, {tuple(image.shape[1:])}. Take the bundle for images of that kind, or write one "
                "image to each file."
            )
        if self.num_channels not in (None, image.shape[0]):
            raise KnowSAMValueError(
                f"`{self.image_key}` must have {self.num_channels} channels but {image_name(image)} has "
                f"{image.shape[0]}. Set `in_channels` to the channels of the data."
            )
        extremes = torch.stack(torch.aminmax(torch.as_tensor(image)))  # NaN where there is one
        if not extremes.isfinite().all():
            num_bad = int(image.numel() - torch.isfinite(image).sum())
            raise KnowSAMValueError(
                f"`{self.image_key}` must be finite but {image_name(image)} has {num_bad} NaN or infinite values. "
                "Repair or remove the file."
            )
        if extremes.abs().max() > LARGEST_VALUE:
            raise KnowSAMValueError(
                f"`{self.image_key}` must have values up to {LARGEST_VALUE:g} but {image_name(image)} goes from "
                f"{extremes[0]:g} to {extremes[1]:g}, whose squares are infinite. Replace what stands for no value."
            )
        if self.label_key not in data:
            return data
        label = self._on_grid_of(image, data[self.label_key])
        label = self._as_classes(image, label)
        return data if label is data[self.label_key] else {**data, self.label_key: label}

    def _on_grid_of(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        both = (image, label)
        if not all(isinstance(one, MetaTensor) and one.meta.get("spacing_known", True) for one in both):
            return label
        if _is_close(image.affine, label.affine):
            return label
        said = "different affines: the voxels are taken as aligned"
        placed = label.clone()
        if image.ndim == label.ndim == 4:
            turned = Orientation(axcodes=nibabel.aff2axcodes(image.affine.numpy()), labels=AXES)(label)
            if turned.shape[1:] == image.shape[1:] and _is_close(turned.affine, image.affine):
                said = "axes in another order or direction: the label is turned to the image's"
                placed = turned
        placed.affine, placed.applied_operations = image.affine.clone(), []
        if self.warn:
            logger.warning("%s and its label have %s.", image_name(image), said)
        return placed

    def _as_classes(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise KnowSAMValueError(
                f"`{self.label_key}` must be one channel of the image's shape {tuple(image.shape[1:])} but "
                f"{image_name(label)} has shape {tuple(label.shape)} for the image {image_name(image)}."
            )
        plain = torch.as_tensor(label)
        if plain.is_floating_point() and 0 < (plain - plain.round()).abs().max() <= ROUNDED:  # not so for NaN
            label = label.round()
            plain = torch.as_tensor(label)
        low, high = torch.aminmax(plain)
        if self.num_classes == 2 and high == 255 and ((plain == 0) | (plain == 255)).all():
            if self.warn and not self.has_warned_of_masks:
                logger.warning(
                    "%s has the values 0 and 255: read as 0 and 1, here and in further files.", image_name(label)
                )
                self.has_warned_of_masks = True
            return label // 255
        if not (low >= 0 and high < self.num_classes and (plain == plain.floor()).all()):  # so for NaN
            wrong = [v for v in torch.unique(plain).tolist() if v not in range(self.num_classes)]
            shown = ", ".join(list(dict.fromkeys(f"{v:.5g}" for v in wrong))[:5])
            raise KnowSAMValueError(
                f"`{self.label_key}` must have the integers 0 to {self.num_classes - 1} as values but "
                f"{image_name(label)} has {shown}. Set `num_classes` to the classes of the data or map the labels."
            )
        return label


class ScaleVolumed(MapTransform):
    """Scale an image to 0..1 over its whole volume.

    A slice file of a pack, an item with a `"slice"` number, stays as it is: it was scaled together with its volume when
    the pack was made, and by its own range it would be brighter in training than its volume is in validation.

    Args:
        keys: keys of the images.
        channel_wise: whether each channel is scaled by itself.

    Raises:
        ValueError: if a slice file has values outside 0..1.

    Example:
        >>> scaled = ScaleVolumed("image")({"image": torch.tensor([[[2.0, 4.0], [3.0, 2.0]]])})
        >>> scaled["image"].tolist()
        [[[0.0, 1.0], [0.5, 0.0]]]
    """

    def __init__(self, keys: Any = "image", channel_wise: bool = False) -> None:
        super().__init__(keys)
        self.scale = ScaleIntensity(minv=0.0, maxv=1.0, channel_wise=channel_wise)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            if "slice" not in case:
                case[key] = self.scale(case[key])
            else:
                check_slice_range(image_name(case[key]), float(case[key].min()), float(case[key].max()), str(key))
        return case


class SplitSlicesd(MapTransform, MultiSampleTrait):
    """Split a volume into its slices along the last axis; an image that is already 2D passes unchanged.

    Args:
        keys: keys of the volumes to split together; a missing key is skipped (unlabelled items).
        image_key: the key whose number of axes says whether the item is a volume.

    Shape:
        (ch, H, W, D) gives D items of (ch, H, W), each with its own metadata (affine moved to the slice) and its
        position in the stack as `"slice"`. (ch, H, W) gives the item itself.

    Example:
        >>> slices = SplitSlicesd(keys=["image"])({"image": MetaTensor(torch.rand(1, 8, 8, 3))})
        >>> len(slices), tuple(slices[0]["image"].shape)
        (3, (1, 8, 8))
    """

    def __init__(self, keys: Any = ("image", "label"), image_key: str = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key
        self.split = SplitDim(dim=-1, keepdim=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]] | dict[Hashable, Any]:
        if data[self.image_key].ndim == 3:
            return dict(data)
        stacks = {key: self.split(data[key]) for key in self.key_iterator(data)}
        # A slice is copied: a view would keep the whole volume in memory.
        return [
            {**data, **{key: stack[index].clone() for key, stack in stacks.items()}, "slice": index}
            for index in range(len(stacks[self.image_key]))
        ]


def check_slice_range(name: str, low: float, high: float, key: str = "image") -> None:
    """Refuse a slice of a volume, an item with a `"slice"` number, that was not scaled together with the volume.

    Args:
        name: of its file.
        low: its smallest value.
        high: its largest value.
        key: key of the image.

    Raises:
        ValueError: if the values leave 0 to 1.

    Example:
        >>> check_slice_range("patient001_frame01_slice_0.h5", low=0.0, high=0.8)
    """
    if low < 0 or high > 1:
        raise KnowSAMValueError(
            f"`{key}` must be from 0 to 1, scaled with its volume, in an item with a slice number but {name} goes from "
            f"{low:g} to {high:g}. Scale the volume first, or leave the number out to scale each file by itself."
        )


def _is_close(affine: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(affine, other, rtol=0, atol=1e-2)


def image_name(image: torch.Tensor) -> str:
    """The file an image came from, for messages."""
    meta = image.meta if isinstance(image, MetaTensor) else {}
    return str(meta.get("filename_or_obj", "an image in memory"))
