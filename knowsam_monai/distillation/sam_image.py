"""The image that SAM sees, and the check that a cached encoder sees the same images again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from monai.transforms import Compose, Randomizable, RandSimulateLowResolution, RandSimulateLowResolutiond
from monai.transforms.traits import LazyTrait
from torch.utils.data import Dataset

from knowsam_monai.data.orientation import SAM_IMAGE, RandOrientationd
from knowsam_monai.errors import KnowSAMValueError

logger = logging.getLogger(__name__)


KEEPS_GEOMETRY = (RandSimulateLowResolution, RandSimulateLowResolutiond)  # in MONAI's spatial module


def is_cached(teacher: Any) -> bool:
    """Whether a teacher caches embeddings, so that it must see the same images again."""
    return getattr(teacher, "encoder", "adapted") == "cached"


def sam_image_for(image: torch.Tensor, sam_image: torch.Tensor | None, teacher: Any = None) -> torch.Tensor:
    """The image that the teacher sees: the batch's `sam_image` on the student's device, or else the student's image.

    Args:
        image: (B, channels, *spatial), what the student saw.
        sam_image: (B, channels, *spatial), the batch's `"sam_image"`, or None.
        teacher: with encoder "cached" it requires a `sam_image`.

    Raises:
        ValueError: if a required `sam_image` is missing, or its rows or size differ from the student's.
    """
    if sam_image is None:
        if is_cached(teacher):
            raise KnowSAMValueError(
                f"`batch` must have a {SAM_IMAGE!r} for a teacher with encoder 'cached' but has none; make "
                "RandOrientationd the first augmentation, or use encoder 'adapted' if the images of the batch are "
                "mixed, as in BidirectionalCopyPaste."
            )
        return image
    if len(sam_image) != len(image) or sam_image.shape[2:] != image.shape[2:]:
        raise KnowSAMValueError(
            f"`{SAM_IMAGE}` must have the rows and the size of the image, {tuple(image.shape)}, but has shape "
            f"{tuple(sam_image.shape)}; a handler that changes the image must change or remove it too."
        )
    return sam_image.to(image.device, non_blocking=True)


def check_orientations(loader: Any, label_key: str = "label") -> None:
    """Raise an error if a cached teacher would see images that it cannot cache, or that do not match the label.

    The first random transform must be the only `RandOrientationd`; no other random transform may move pixels or change
    the label or `"sam_image"`. Later deterministic transforms that move pixels must include `"sam_image"`.

    Args:
        loader: a `SemiSupervisedLoader`, or a loader with a `dataset`; transforms are read from `dataset.transform`,
            also inside a `Subset`, a `ConcatDataset` or another `Dataset`.
        label_key: key of the label.

    Raises:
        ValueError: if a transform does not fit; names it.

    Example:
        >>> check_orientations(SemiSupervisedLoader(labeled, unlabeled, 2, 2))     # doctest: +SKIP
    """
    for transforms in _pipelines(loader):
        _check_pipeline([t for t in transforms if isinstance(t, Randomizable)], label_key)
        oriented = next(i for i, transform in enumerate(transforms) if isinstance(transform, RandOrientationd))
        _check_later(transforms[oriented + 1 :], label_key)


def _check_pipeline(transforms: list[Any], label_key: str) -> None:
    names = [type(transform).__name__ for transform in transforms]
    for name, transform in zip(names, transforms):
        if not isinstance(transform, RandOrientationd) and _moves_pixels(transform):
            raise KnowSAMValueError(
                f"`encoder` 'cached' must have RandOrientationd as the only random flip, rotation, deformation or crop "
                f"but the augmentation has {name}; remove it, or use encoder 'adapted'."
            )
    if names.count("RandOrientationd") != 1 or names[0] != "RandOrientationd":
        raise KnowSAMValueError(
            "`encoder` 'cached' must have one RandOrientationd before all other random transforms but the augmentation "
            f"has {', '.join(names) or 'no random transform'}; SAM sees the output of RandOrientationd."
        )
    for name, transform in zip(names[1:], transforms[1:]):
        keys = getattr(transform, "keys", ())
        if SAM_IMAGE in keys:
            raise KnowSAMValueError(
                f"`encoder` 'cached' must see {SAM_IMAGE!r} as RandOrientationd returns it but {name} changes it at "
                f"random; remove {SAM_IMAGE!r} from its keys."
            )
        if label_key in keys:
            raise KnowSAMValueError(
                f"`encoder` 'cached' must have RandOrientationd as the only random transform of {label_key!r} but "
                f"{name} is another, so the label would not match SAM's image; remove {label_key!r} from its keys."
            )


def _check_later(transforms: list[Any], label_key: str) -> None:
    """Deterministic transforms that move the pixels of the image must do the same to SAM's image."""
    for name, transform in ((type(t).__name__, t) for t in transforms if not isinstance(t, Randomizable)):
        keys = getattr(transform, "keys", ())
        if SAM_IMAGE in keys or not {"image", label_key} & set(keys):
            continue
        if _moves_pixels(transform):
            raise KnowSAMValueError(
                f"`encoder` 'cached' must see the output of {name} but it comes after RandOrientationd and leaves out "
                f"{SAM_IMAGE!r}; move it before RandOrientationd, or add {SAM_IMAGE!r} to its keys."
            )
        if type(transform).__module__.startswith("monai.transforms.intensity."):
            logger.warning("%s comes after RandOrientationd, so SAM sees the image without it.", name)


def _pipelines(loader: Any, outer: list[Any] | None = None) -> Iterator[list[Any]]:
    """The transforms of each dataset of a loader, followed by those of the datasets that wrap it."""
    transform = getattr(loader, "transform", None)
    transforms = outer if transform is None else [*_leaves(transform), *(outer or [])]
    inside = getattr(loader, "datasets", None) or (getattr(loader, "dataset", None),)
    inside = [dataset for dataset in inside if dataset is not None]
    if isinstance(getattr(loader, "data", None), Dataset):  # MONAI's Dataset around another one
        inside.append(loader.data)
    for dataset in inside:
        yield from _pipelines(dataset, transforms)
    if transforms is not None and not inside:
        yield transforms


def _leaves(transform: Any) -> Iterator[Any]:
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _leaves(part)
    else:
        yield transform


def _moves_pixels(transform: Any) -> bool:
    """Whether a transform is one of MONAI's spatial transforms or crops, or resamples (`LazyTrait`)."""
    module = type(transform).__module__
    places = ("spatial", "croppad", "regularization")  # the last one mixes images
    spatial = module.startswith(tuple(f"monai.transforms.{place}." for place in places)) or isinstance(
        transform, LazyTrait
    )
    deforms = type(transform).__name__.startswith("RandSmoothDeform")
    return (spatial or deforms) and not isinstance(transform, KEEPS_GEOMETRY)
