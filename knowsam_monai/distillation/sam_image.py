"""The image that SAM sees, and the check that a cached encoder sees it again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from monai.transforms import Compose, Randomizable, RandSimulateLowResolution, RandSimulateLowResolutiond
from monai.transforms.traits import LazyTrait

from knowsam_monai.data.orientation import SAM_IMAGE, RandOrientationd
from knowsam_monai.errors import KnowSAMValueError

logger = logging.getLogger(__name__)


KEEPS_GEOMETRY = (RandSimulateLowResolution, RandSimulateLowResolutiond)  # MONAI has them among the spatial ones


def is_cached(teacher: Any) -> bool:
    """Whether a teacher keeps what it encoded, and so must see images that come again."""
    return getattr(teacher, "encoder", "adapted") == "cached"


def sam_image_for(image: torch.Tensor, sam_image: torch.Tensor | None, teacher: Any = None) -> torch.Tensor:
    """What a teacher sees: the batch's own image for it, on the student's device, or without one the student's.

    Args:
        image: (B, channels, *spatial), what the student saw.
        sam_image: (B, channels, *spatial), the batch's `"sam_image"`, or None.
        teacher: one whose encoder is "cached" needs a `sam_image`.

    Raises:
        ValueError: if it has none, or rows and size are not the student's.
    """
    if sam_image is None:
        if is_cached(teacher):
            raise KnowSAMValueError(
                f"`batch` must have a {SAM_IMAGE!r} for a teacher whose encoder is 'cached' but has none; put "
                "RandOrientationd first into the augmentation, or, where the batch is mixed to new images as by "
                "BidirectionalCopyPaste, take the encoder 'adapted'."
            )
        return image
    if len(sam_image) != len(image) or sam_image.shape[2:] != image.shape[2:]:
        raise KnowSAMValueError(
            f"`{SAM_IMAGE}` must have the rows and the size of the image, {tuple(image.shape)}, but is of shape "
            f"{tuple(sam_image.shape)}; what changes the image in the batch must change or remove it too."
        )
    return sam_image.to(image.device)


def check_orientations(loader: Any, label_key: str = "label") -> None:
    """Refuse a pipeline in which a cached teacher would see other images than it can keep, or other than the label's.

    Of random transforms, `RandOrientationd` must come first, once, and no other may move pixels or touch the label or
    `"sam_image"`. What is not random and comes after it must move `"sam_image"` too.

    Args:
        loader: a `SemiSupervisedLoader`, or a loader with a `dataset`; transforms are read from `dataset.transform`,
            and from the datasets inside a `Subset` or a `ConcatDataset`.
        label_key: key of the label.

    Raises:
        ValueError: naming the transform that does not fit.

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
                f"`encoder` 'cached' must have RandOrientationd as the only random flip, turn, deformation or crop but "
                f"the augmentation has {name}; remove it, or take the encoder 'adapted'."
            )
    if names.count("RandOrientationd") != 1 or names[0] != "RandOrientationd":
        raise KnowSAMValueError(
            "`encoder` 'cached' must have one RandOrientationd before all other random transforms but the augmentation "
            f"has {', '.join(names) or 'no random transform'}; SAM sees the image as RandOrientationd leaves it."
        )
    for name, transform in zip(names[1:], transforms[1:]):
        keys = getattr(transform, "keys", ())
        if SAM_IMAGE in keys:
            raise KnowSAMValueError(
                f"`encoder` 'cached' must see {SAM_IMAGE!r} as RandOrientationd leaves it but {name} changes it each "
                f"time anew; take {SAM_IMAGE!r} out of its keys."
            )
        if label_key in keys:
            raise KnowSAMValueError(
                f"`encoder` 'cached' must have no random transform of {label_key!r} but RandOrientationd but {name} is "
                f"one: SAM would learn from labels that its image does not show. Take {label_key!r} out of its keys."
            )


def _check_later(transforms: list[Any], label_key: str) -> None:
    """Of transforms that are not random: what moves or scales the image must do so with SAM's."""
    for name, transform in ((type(t).__name__, t) for t in transforms if not isinstance(t, Randomizable)):
        keys = getattr(transform, "keys", ())
        if SAM_IMAGE in keys or not {"image", label_key} & set(keys):
            continue
        if _moves_pixels(transform):
            raise KnowSAMValueError(
                f"`encoder` 'cached' must see what {name} makes of the image but it comes after RandOrientationd and "
                f"leaves {SAM_IMAGE!r} out; put it before, or {SAM_IMAGE!r} among its keys."
            )
        if type(transform).__module__.startswith("monai.transforms.intensity."):
            logger.warning("%s comes after RandOrientationd, so that SAM sees the image without it.", name)


def _pipelines(loader: Any, outer: list[Any] | None = None) -> Iterator[list[Any]]:
    """The transforms of every dataset of a loader, those of the datasets around it after its own."""
    transform = getattr(loader, "transform", None)
    transforms = outer if transform is None else [*_leaves(transform), *(outer or [])]
    inside = getattr(loader, "datasets", None) or (getattr(loader, "dataset", None),)
    inside = [dataset for dataset in inside if dataset is not None]
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
    """Whether a random transform is one of MONAI's spatial ones or crops, or says itself that it resamples."""
    module = type(transform).__module__
    places = ("spatial", "croppad", "regularization")  # the last mixes images
    spatial = module.startswith(tuple(f"monai.transforms.{place}." for place in places)) or isinstance(
        transform, LazyTrait
    )
    deforms = type(transform).__name__.startswith("RandSmoothDeform")
    return (spatial or deforms) and not isinstance(transform, KEEPS_GEOMETRY)
