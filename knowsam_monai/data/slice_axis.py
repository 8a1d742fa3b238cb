"""Turning volumes so that their slices are along the last axis, in one orientation."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Orientation
from monai.transforms.spatial.functional import orientation

from knowsam_monai.data.transforms import AXES, image_name, known_spacing

logger = logging.getLogger(__name__)

# Directions of in-plane axes: as on a radiologist's screen, columns run left or back and rows back or down.
IN_PLANE = "LPI"
THICK = 1.5  # Slices are at least this much thicker than their pixels are wide.
FEW = 3  # A volume has at least this many times as many rows and columns as slices, if its size is to show them.
EQUAL = 0.01  # largest relative difference of spacings that count as equal


class TurnSlicesd(MapTransform, InvertibleTransform):
    """Turn volumes so that their slices are along the last axis, in the orientation of radiological display.

    The same scan then gives the same slices, whatever the order and direction of its axes in the file. If neither
    spacing nor size shows the slice axis, see `find_slice_axis`, slices are axial, with one warning. Slices keep their
    order. 2D images and files of unknown geometry (h5) pass unchanged. The inverse restores the axes of the file.

    Args:
        keys: keys to turn equally; missing keys are skipped.
        image_key: key of the image, whose geometry counts.
        warn: whether to warn.

    Shape:
        (ch, *spatial) in the axes of the file becomes (ch, H, W, D) with D slices.

    Example:
        >>> sagittal = MetaTensor(torch.rand(1, 3, 8, 9), affine=torch.diag(torch.tensor([8.0, 1.5, 1.5, 1.0])))
        >>> tuple(TurnSlicesd("image")({"image": sagittal})["image"].shape)
        (1, 8, 9, 3)
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), image_key: str = "image", warn: bool = True) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key
        self.orientation = Orientation(axcodes="LPS", labels=AXES)  # records and inverts; the codes differ by case
        self.warn = warn

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image = case[self.image_key]
        if not _has_axes(image):
            return case
        affine = image.affine.numpy()
        codes = nibabel.aff2axcodes(affine)
        axis = slice_axis(image)
        if find_slice_axis(image.pixdim.tolist(), image.shape[1:]) is None:
            self._warn(image)
        pair = next(pair for pair in AXES if codes[axis] in pair)
        target = [*(code for code in IN_PLANE if code not in pair), codes[axis]]
        for key in self.key_iterator(case):
            volume = case[key]
            if key != self.image_key and isinstance(volume, MetaTensor):
                volume = volume.clone()
                volume.affine = image.affine.clone()
            turn = nibabel.orientations.ornt_transform(
                nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(target)
            )
            case[key] = orientation(
                volume, affine, turn, lazy=False, transform_info=self.orientation.get_transform_info()
            )
        return case

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            if _has_axes(case[key]):
                case[key] = self.orientation.inverse(case[key])
        return case

    def _warn(self, image: torch.Tensor) -> None:
        if self.warn:
            logger.warning(
                "%s has voxels of %s mm, which do not show along which axis its slices are: they are taken axially, in "
                "this and all other such files. If they are others, correct the spacing in the header.",
                image_name(image),
                " x ".join(f"{step:g}" for step in image.pixdim.tolist()),
            )
            self.warn = False


def find_slice_axis(spacing: Sequence[float], shape: Sequence[int]) -> int | None:
    """The axis that a volume was acquired along, slice by slice; None if its geometry does not show it.

    It is the first of these that exists:

    - the only axis of length 1;
    - the axis of the largest spacing, if that is at least 1.5 times the others;
    - the axis whose spacing differs, if the other two are equal;
    - the axis that is at most a third as long as the others, since a header may have lost its spacing.

    Args:
        spacing: along each of the three axes, mm.
        shape: number of voxels along each axis.

    Example:
        >>> find_slice_axis((8.0, 1.5, 1.2), (10, 200, 256)), find_slice_axis((1.0, 1.0, 1.0), (200, 10, 256))
        (0, 1)
        >>> find_slice_axis((1.0, 1.0, 1.0), (200, 200, 200)) is None
        True
    """
    if list(shape).count(1) == 1:
        return list(shape).index(1)
    low, middle, high = sorted(spacing)
    if high >= THICK * middle:
        return list(spacing).index(high)
    if high - middle > EQUAL * high and middle - low <= EQUAL * middle:
        return list(spacing).index(high)
    if middle - low > EQUAL * middle and high - middle <= EQUAL * high:
        return list(spacing).index(low)
    short, next_longer, _ = sorted(shape)
    return list(shape).index(short) if FEW * short <= next_longer else None


def slice_axis(image: torch.Tensor) -> int:
    """The spatial axis along which `TurnSlicesd` takes a volume's slices; the last one if its geometry is unknown.

    Args:
        image: (ch, *spatial) of three spatial axes.

    Example:
        >>> slice_axis(MetaTensor(torch.rand(1, 3, 8, 9), affine=torch.diag(torch.tensor([8.0, 1.5, 1.5, 1.0]))))
        0
    """
    if not _has_axes(image):
        return image.ndim - 2
    axis = find_slice_axis(image.pixdim.tolist(), image.shape[1:])
    if axis is None:
        codes = nibabel.aff2axcodes(image.affine.numpy())
        axis = next(number for number, code in enumerate(codes) if code in "IS")
    return axis


def _has_axes(image: torch.Tensor) -> bool:
    """Whether it is a volume of known geometry."""
    return image.ndim == 4 and known_spacing(image) is not None
