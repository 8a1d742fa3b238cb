"""Preprocessing of 3D volumes: orientation, spacing, a crop that needs no label, and padding."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CropForegroundd, MapTransform, Orientationd, Spacingd, SpatialPadd

from knowsam_monai.data.declared_size import LARGEST_IMAGE
from knowsam_monai.data.transforms import AXES, image_name, known_spacing
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import without_meta

logger = logging.getLogger(__name__)


class OrientVolumed(Orientationd):
    """Reorient volumes of known geometry to the same axes; h5 packs pass unchanged.

    The network and SAM then see all scans in the same orientation. The inverse restores the original one.

    Args:
        keys: keys of image and label; missing keys are skipped.
        axcodes: directions of the axes. LPS is the order of DICOM's axial slices.

    Example:
        >>> image = MetaTensor(torch.arange(3.0).reshape(1, 3, 1, 1), affine=torch.eye(4))     # runs to R, A, S
        >>> OrientVolumed("image")({"image": image})["image"].flatten().tolist()
        [2.0, 1.0, 0.0]
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), axcodes: str = "LPS") -> None:
        super().__init__(keys, axcodes=axcodes, labels=AXES, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        return super().__call__(data, lazy=lazy) if _knows_geometry(self, data) else dict(data)

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        return super().inverse(data) if _knows_geometry(self, data) else dict(data)


class ResampleVolumed(Spacingd):
    """Resample volumes of known spacing to one spacing; h5 packs, which have none, pass unchanged.

    Args:
        keys: keys of image and label; missing keys are skipped.
        pixdim: spacing along each axis, mm. 0 keeps the axis unchanged.
        mode: interpolation for each key.

    Raises:
        ValueError: if a volume would become too large, for example because its header has a spacing in another unit
            than mm; the message names the file.

    Example:
        >>> image = MetaTensor(torch.rand(1, 8, 8, 4), affine=torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0])))
        >>> tuple(ResampleVolumed("image", pixdim=(1, 1, 1), mode="bilinear")({"image": image})["image"].shape)
        (1, 8, 8, 7)
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        pixdim: Sequence[float] = (0.625, 0.625, 0.625),
        mode: Sequence[str] | str = ("bilinear", "nearest"),
    ) -> None:
        super().__init__(keys, pixdim=pixdim, mode=mode, allow_missing_keys=True)
        self.pixdim = tuple(pixdim)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        if not _knows_geometry(self, data):
            return dict(data)
        for key in self.key_iterator(data):
            self._check_size(key, data[key])
        return super().__call__(data, lazy=lazy)

    def _check_size(self, key: Hashable, image: torch.Tensor) -> None:
        known = known_spacing(image)
        spacing = [1.0] * len(self.pixdim) if known is None else known.tolist()
        growth = math.prod(step / (wanted or step) for step, wanted in zip(spacing, self.pixdim))
        if image.numel() * growth * 4 > LARGEST_IMAGE:
            shown = " x ".join(f"{step:g}" for step in spacing)
            raise KnowSAMValueError(
                f"`{key}` must take at most {LARGEST_IMAGE / 2**30:g} GiB at the spacing {self.pixdim} but "
                f"{image_name(image)}, {tuple(image.shape[1:])} voxels of {shown} mm, takes "
                f"{image.numel() * growth * 4 / 2**30:.3g}; correct the spacing in its header."
            )

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        return super().inverse(data) if _knows_geometry(self, data) else dict(data)


class CropCenterd(CropForegroundd):
    """Crop a cube around the image's center of brightness, without using labels.

    Air and lungs are dark, so the center of brightness of an axial chest scan is in the mediastinum. The left atrium,
    about 100 mm wide with its veins, is inside 200 mm even if that center is 50 mm off. Axes shorter than the cube and
    volumes of unknown spacing, from h5 packs, are not cropped. If the crop removes part of the label, a warning names
    the file. The inverse pads with 0.

    Args:
        keys: keys to crop equally; missing keys are skipped.
        size: edge length of the cube, mm; None disables the crop.
        source_key: key of the image.

    Raises:
        ValueError: if `size` is not above 0.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 12, 6), affine=torch.eye(4))
        >>> image[0, 9, 2] = 1
        >>> cropped = CropCenterd("image", size=3)({"image": image})["image"]
        >>> tuple(cropped.shape), cropped.nonzero().tolist()
        ((1, 3, 3), [[0, 1, 1]])
    """

    def __init__(
        self, keys: KeysCollection = ("image", "label"), size: float | None = 200.0, source_key: str = "image"
    ) -> None:
        if size is not None and not size > 0:
            raise KnowSAMValueError(f"`size` must be a length above 0 mm or None but is {size}.")
        super().__init__(
            keys,
            source_key=source_key,
            select_fn=partial(_bright_cube, size=size),
            allow_missing_keys=True,
            start_coord_key=None,
            end_coord_key=None,
        )
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        if self.size is None:
            return dict(data)
        case = super().__call__(data, lazy)
        for key in self.key_iterator(case):
            if key == self.source_key:
                continue
            before, after = ((x[key] > 0).sum().item() for x in (data, case))
            if after < before:
                logger.warning(
                    "%s loses %d of its %d labeled voxels to the crop of %g mm around its image's center of "
                    "brightness; increase `crop_size`, or disable it (--crop_size '$None').",
                    image_name(data[key]),
                    before - after,
                    before,
                    self.size,
                )
        return case

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(data) if self.size is None else super().inverse(data)


class PadVolumed(SpatialPadd):
    """Pad volumes smaller than the patch with 0 on all sides, with a warning that names the file.

    Args:
        keys: keys to pad equally; missing keys are skipped.
        spatial_size: size of the patch, in voxels.

    Example:
        >>> tuple(PadVolumed("image", spatial_size=(8, 8, 8))({"image": torch.rand(1, 10, 8, 5)})["image"].shape)
        (1, 10, 8, 8)
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), spatial_size: Sequence[int] = (112, 112, 80)) -> None:
        super().__init__(keys, spatial_size=spatial_size, allow_missing_keys=True)
        self.patch = tuple(spatial_size)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        image = data[self.first_key(data)]
        shape = tuple(image.shape[1:])
        if any(size < patch_size for size, patch_size in zip(shape, self.patch)):
            logger.warning(
                "%s has %s voxels, fewer than a patch, %s, and is padded with 0.", image_name(image), shape, self.patch
            )
        return super().__call__(data, lazy=lazy)


def _bright_cube(image: torch.Tensor, size: float) -> torch.Tensor:
    """A mask (1, *spatial) of the cube; the whole image if its spacing is unknown."""
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    known = known_spacing(image)
    spacing = [0.0] * mask[0].ndim if known is None else known.tolist()
    brightness = without_meta(image).sum(0, dtype=torch.float64)
    brightness = brightness - brightness.min()
    box: list[slice] = []
    for axis, (length, step) in enumerate(zip(brightness.shape, spacing)):
        cube_length = min(length, max(1, round(size / step))) if step else length
        profile = brightness.sum([other for other in range(brightness.ndim) if other != axis])
        positions = torch.arange(length, dtype=profile.dtype)
        center = float((profile * positions).sum() / profile.sum()) if profile.sum() > 0 else (length - 1) / 2
        first = min(max(round(center - (cube_length - 1) / 2), 0), length - cube_length)
        box.append(slice(first, first + cube_length))
    mask[(slice(None), *box)] = True
    return mask


def _knows_geometry(transform: MapTransform, data: Mapping[Hashable, torch.Tensor]) -> bool:
    images = (data[key] for key in transform.key_iterator(data))
    return all(known_spacing(image) is not None for image in images if isinstance(image, MetaTensor))
