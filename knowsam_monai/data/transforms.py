"""Transforms that MONAI lacks: checking cases, scaling by volume, and splitting volumes into slices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import nibabel
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, Orientation, ScaleIntensity, ScaleIntensityRange, SplitDim, Transform
from monai.transforms.traits import MultiSampleTrait

from knowsam_monai.data.grids import is_same_grid
from knowsam_monai.errors import KnowSAMValueError

AXES = (("L", "R"), ("P", "A"), ("I", "S"))  # as in nibabel

# Tolerance for labels that resampling or float32 arithmetic moved off their integers.
ROUNDED = 1e-3
# The square of a larger value overflows float32, and so does the variance.
LARGEST_VALUE = 1e18

logger = logging.getLogger(__name__)


class CheckDatad(Transform):
    """Refuse cases that would silently spoil training, and fix a label's grid and values.

    The label gets the image's geometry, see `align_label`, with a warning unless both agree within half a voxel. Label
    values within 0.001 of an integer are rounded. With two classes, a mask of 0 and 255 is read as 0 and 1, with one
    warning.

    Args:
        image_key: key of the image, channel first.
        label_key: key of the label, one channel of class numbers; absent in unlabeled items.
        num_classes: number of classes C, background included; label values are the integers 0 to C - 1.
        num_channels: input channels of the network; None for any number.
        num_axes: spatial axes of the network's input; None for 2 or 3.
        warn: whether to warn about corrections.

    Shape:
        image (ch, *spatial), label (1, *spatial).

    Raises:
        ValueError: if the image has another number of channels or axes, or values that are NaN, infinite or above 1e18;
            if the label has another spatial shape or several channels; if its values are not integers from 0 to C - 1.

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
                f"{image.ndim - 1}, {tuple(image.shape[1:])}; use the bundle for such images, or split the file."
            )
        if self.num_channels not in (None, image.shape[0]):
            expected = f"{self.num_channels} channel{'s' * (self.num_channels != 1)}"
            raise KnowSAMValueError(
                f"`{self.image_key}` must have {expected} but {image_name(image)} has {image.shape[0]}; set "
                "`in_channels` to the channels of the data, list the files of an image together in a data list, or "
                "save each time point as one file."
            )
        extremes = torch.stack(torch.aminmax(torch.as_tensor(image)))  # NaN if there is one
        if not extremes.isfinite().all():
            num_bad = int(image.numel() - torch.isfinite(image).sum())
            raise KnowSAMValueError(
                f"`{self.image_key}` must be finite but {image_name(image)} has {num_bad} NaN or infinite values; "
                "repair or remove the file."
            )
        if extremes.abs().max() > LARGEST_VALUE:
            raise KnowSAMValueError(
                f"`{self.image_key}` must have values up to {LARGEST_VALUE:g} but {image_name(image)} goes from "
                f"{extremes[0]:g} to {extremes[1]:g}, whose squares overflow; replace placeholders of missing values."
            )
        if self.label_key not in data:
            return data
        label, alignment = align_label(image, data[self.label_key])
        if alignment and self.warn:
            logger.warning("%s: its label has %s.", image_name(image), alignment)
        label = self._as_classes(image, label)
        return data if label is data[self.label_key] else {**data, self.label_key: label}

    def _as_classes(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise KnowSAMValueError(
                f"`{self.label_key}` must be one channel of the image's shape {tuple(image.shape[1:])} but "
                f"{image_name(label)} has shape {tuple(label.shape)} for the image {image_name(image)}."
            )
        plain = torch.as_tensor(label)
        if plain.is_floating_point() and 0 < (plain - plain.round()).abs().max() <= ROUNDED:  # False for NaN
            label = label.round()
            plain = torch.as_tensor(label)
        low, high = torch.aminmax(plain)
        if self.num_classes == 2 and high == 255 and ((plain == 0) | (plain == 255)).all():
            if self.warn and not self.has_warned_of_masks:
                logger.warning(
                    "%s has the values 0 and 255, which are read as 0 and 1, in this and all other files.",
                    image_name(label),
                )
                self.has_warned_of_masks = True
            return label // 255
        if not (low >= 0 and high < self.num_classes and (plain == plain.floor()).all()):  # True for NaN
            wrong = [v for v in torch.unique(plain).tolist() if v not in range(self.num_classes)]
            shown = ", ".join(list(dict.fromkeys(f"{v:.5g}" for v in wrong))[:5])
            raise KnowSAMValueError(
                f"`{self.label_key}` must have the integers 0 to {self.num_classes - 1} as values but "
                f"{image_name(label)} has {shown}; name all classes (`class_names` of a bundle; `--num_classes` of "
                "`knowsam check`), or map the labels."
            )
        return label


class ScaleVolumed(MapTransform):
    """Scale each channel of an image to 0..1 over its whole volume; the channels of a color file together.

    A slice file of a pack, an item with a `"slice"` number, is not changed: it was scaled with its volume when the pack
    was made. Scaled by its own range, it would be brighter in training than its volume in validation.

    Args:
        keys: keys of the images.
        window: two intensities, such as HU, that become 0 and 1 in every channel, with values beyond them clipped;
            None: the smallest and the largest of the channel.

    Raises:
        ValueError: if a slice file has values outside of 0..1, or there is a `window` for it.

    Example:
        >>> scaled = ScaleVolumed("image")({"image": torch.tensor([[[2.0, 4.0], [3.0, 2.0]]])})
        >>> scaled["image"].tolist()
        [[[0.0, 1.0], [0.5, 0.0]]]
    """

    def __init__(self, keys: KeysCollection = "image", window: tuple[float, float] | None = None) -> None:
        super().__init__(keys)
        self.window = window
        self.scale: Callable = ScaleIntensity(minv=0.0, maxv=1.0, channel_wise=True)
        self.scale_colors: Callable = ScaleIntensity(minv=0.0, maxv=1.0)
        if window is not None:
            self.scale = self.scale_colors = ScaleIntensityRange(*window, b_min=0.0, b_max=1.0, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            if "slice" not in case:
                is_color = isinstance(case[key], MetaTensor) and case[key].meta.get("is_color", False)
                case[key] = (self.scale_colors if is_color else self.scale)(case[key])
            elif self.window is not None:
                raise KnowSAMValueError(
                    "`intensity_window` must be None for slice files, which were scaled with their volume, but is "
                    f"{list(self.window)} and {image_name(case[key])} has a slice number; leave it out."
                )
            else:
                check_slice_range(image_name(case[key]), float(case[key].min()), float(case[key].max()), str(key))
        return case


class SplitSlicesd(MapTransform, MultiSampleTrait):
    """Split a volume into its slices along the last axis; 2D images pass unchanged.

    Args:
        keys: keys of the volumes to split together; missing keys are skipped.
        image_key: the key whose number of axes decides whether the item is a volume.

    Shape:
        (ch, H, W, D) becomes D items (ch, H, W), each with its own metadata (the affine of the slice) and its position
        in the stack as `"slice"`. (ch, H, W) remains one item.

    Example:
        >>> slices = SplitSlicesd(keys=["image"])({"image": MetaTensor(torch.rand(1, 8, 8, 3))})
        >>> len(slices), tuple(slices[0]["image"].shape)
        (3, (1, 8, 8))
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), image_key: str = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key
        self.split = SplitDim(dim=-1, keepdim=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]] | dict[Hashable, Any]:
        if data[self.image_key].ndim == 3:
            return dict(data)
        stacks = {key: self.split(data[key]) for key in self.key_iterator(data)}
        # Slices are copied, since a view would keep the whole volume in memory.
        return [
            {**data, **{key: stack[index].clone() for key, stack in stacks.items()}, "slice": index}
            for index in range(len(stacks[self.image_key]))
        ]


def check_slice_range(name: str, low: float, high: float, key: str = "image") -> None:
    """Refuse an item with a `"slice"` number that was not scaled with its volume.

    Args:
        name: name of its file.
        low: its minimum.
        high: its maximum.
        key: key of the image.

    Raises:
        ValueError: if values are outside of 0..1.

    Example:
        >>> check_slice_range("patient001_frame01_slice_0.h5", low=0.0, high=0.8)
    """
    if low < 0 or high > 1:
        raise KnowSAMValueError(
            f"`{key}` of an item with a slice number must be in 0..1, scaled with its volume, but {name} goes from "
            f"{low:g} to {high:g}; scale the volume first, or leave the number out to scale each file separately."
        )


def align_label(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A label with the geometry of its image, and what was different about it; "" if both have one grid.

    A label with the image's grid but another order or direction of axes is reoriented to the image. With other
    differences of more than half a voxel, such as a lost header, voxels are assumed to be aligned. So they are if the
    label's format has no geometry, such as .npy. Nothing is changed if that of the image is unknown.

    Args:
        image: (ch, *spatial).
        label: (1, *spatial).

    Example:
        >>> align_label(MetaTensor(torch.rand(1, 8, 8)), MetaTensor(torch.zeros(1, 8, 8)))[1]
        ''
    """
    if known_spacing(image) is None or not isinstance(label, MetaTensor):
        return label, ""
    is_known = known_spacing(label) is not None
    if is_known and torch.equal(image.affine, label.affine):
        return label, ""
    aligned, alignment = label.clone(), ""
    if is_known and not is_same_grid(image.affine, label.affine, image.shape[1:]):
        alignment = f"another {_difference(image, label)} than the image; the voxels are assumed to be aligned"
        if image.ndim == label.ndim == 4:
            turned = Orientation(axcodes=nibabel.aff2axcodes(image.affine.numpy()), labels=AXES)(label)
            if turned.shape[1:] == image.shape[1:] and is_same_grid(image.affine, turned.affine, image.shape[1:]):
                aligned = turned
                alignment = "axes in another order or direction than the image; they are reoriented"
    aligned.affine, aligned.applied_operations = image.affine.clone(), []
    aligned.meta["spacing_known"] = True
    return aligned, alignment


def _difference(image: torch.Tensor, label: torch.Tensor) -> str:
    if image.ndim != label.ndim:
        return "number of axes"
    spacings = [known_spacing(image), known_spacing(label)]
    if not torch.allclose(*spacings, rtol=1e-3):
        return "spacing"
    codes, label_codes = (nibabel.aff2axcodes(x.affine.numpy())[: x.ndim - 1] for x in (image, label))
    return "origin or rotation" if codes == label_codes else "orientation"


def known_spacing(image: torch.Tensor) -> torch.Tensor | None:
    """The length of a voxel along each spatial axis, mm; None for files without geometry, such as h5 packs.

    MONAI's ``pixdim`` is that of volumes: of a slice it ignores the part of a step that leaves the x-y plane.

    Args:
        image: (ch, *spatial).

    Example:
        >>> known_spacing(MetaTensor(torch.rand(1, 8, 8), affine=torch.diag(torch.tensor([1.5, 2.0, 1.0])))).tolist()
        [1.5, 2.0]
    """
    if not isinstance(image, MetaTensor) or not torch.as_tensor(image.meta.get("spacing_known", True)).all():
        return None
    return affine_to_spacing(image.affine, len(image.affine) - 1)[: image.ndim - 1]


def rows_of(item: Any) -> list[Any]:
    """The rows of a dataset's item; multi-sample transforms return several."""
    return list(item) if isinstance(item, (list, tuple)) else [item]


def image_name(image: torch.Tensor) -> str:
    """The file of an image, for messages."""
    meta = image.meta if isinstance(image, MetaTensor) else {}
    return str(meta.get("filename_or_obj", "an image in memory"))
