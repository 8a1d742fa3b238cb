"""The batch that a host is at: a loader that tells of it, and what SAM takes from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowsam_monai.data.orientation import SAM_IMAGE
from knowsam_monai.losses.class_logits import without_meta


class WatchedLoader:
    """
    A loader as it is, length and attributes too, that calls `next_batch` with each batch before the host gets it.

    Args:
        loader: anything to iterate over.
        next_batch: what is told.

    Example::

        >>> list(WatchedLoader([1, 2], next_batch=print))
        1
        2
        [1, 2]
    """

    def __init__(self, loader: Iterable, next_batch: Callable[[Any], None]) -> None:
        self.loader = loader
        self.next_batch = next_batch

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.next_batch(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # not there yet while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)


def image_and_label(batch: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """
    SAM's image, if the batch has one of its own, and the label, of a batch whose image the student was called on.

    Args:
        batch: a mapping with "image" and maybe "label" and "sam_image", or a pair (image, label).
        image: (B, channels, *spatial), what the student was called on.

    Raises:
        ValueError: when `batch` is neither, or its image is not `image`, value for value: no label is guessed.
    """
    if isinstance(batch, Mapping) and "image" in batch:
        batch_image, label, sam_image = batch["image"], batch.get("label"), batch.get(SAM_IMAGE, image)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        (batch_image, label), sam_image = batch, image
    else:
        raise ValueError(
            "A watched batch must be a mapping with 'image' and 'label' or a pair (image, label) but is a "
            f"{type(batch).__name__}; give `select`."
        )
    if not isinstance(batch_image, (Tensor, np.ndarray)):
        raise ValueError(
            f"The image of a watched batch must be a tensor but is a {type(batch_image).__name__}; where a batch is "
            "made of several, `watch` the loader of the labelled ones and give `select`."
        )
    batch_image = without_meta(torch.as_tensor(batch_image))
    if batch_image.shape != image.shape or not torch.equal(batch_image.to(image), image):
        raise ValueError(
            f"The student's input, of shape {tuple(image.shape)}, must be the image of the watched batch, of shape "
            f"{tuple(batch_image.shape)}, but differs: where it is changed in the step, give `select`; where batches "
            "are fetched ahead, call `next_batch(batch)` before each step."
        )
    return sam_image, label
