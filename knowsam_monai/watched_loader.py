"""The batch that a host is at: a loader that tells of it, and what SAM takes from it."""

from __future__ import annotations

import weakref
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


class CurrentBatch:
    """
    The batch that a host is at, by what the host has taken, and whether the student is called on it.

    Attributes:
        batch: taken last; None before the first.
        is_over: whether the student has stepped since, so that a further call must be on a new batch.

    Raises:
        RuntimeError: when a call is counted or checked that is for no batch, or for another one.

    Example::

        >>> current = CurrentBatch()
        >>> current.take({"image": torch.zeros(2, 1, 8, 8)})
        >>> current.count_call()
        1
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.is_over = False
        self._num_calls = 0
        self._uncalled_images: list[weakref.ref[Tensor]] = []  # of batches before, on which the student was not called

    def take(self, batch: Any) -> None:
        """Be at the next batch."""
        former_image = _image_of(self.batch)
        if self._num_calls:
            self._uncalled_images.clear()
        elif former_image is not None:
            self._uncalled_images.append(weakref.ref(former_image))
        self.batch, self.is_over, self._num_calls = batch, False, 0

    def count_call(self) -> int:
        """Number of the student's calls for this batch, with the one that is made now."""
        if self.batch is None:
            raise RuntimeError(
                "`student` must be called on a batch of `watch(loader)` but none was taken; let the host iterate over "
                "that, or call `next_batch(batch)` before each step."
            )
        self._num_calls += 1
        return self._num_calls

    def check(self, image: Tensor) -> None:
        """Raise a RuntimeError when the student is called on another batch, as far as its image tells."""
        if self.is_over:
            raise RuntimeError(
                "`student` must be called on a new batch after its step but is called on the one before; let the host "
                "take each batch from `watch(loader)` itself, not from `itertools.cycle` or a list of what came of it, "
                "or call `next_batch(batch)` before each step."
            )
        is_of_former = any(_begins_with(image, former()) for former in self._uncalled_images)
        if is_of_former and not _begins_with(image, _image_of(self.batch)):
            raise RuntimeError(
                "`student` must be called on the batch that was taken last but is called on one before: batches are "
                "fetched ahead. Call `next_batch(batch)` before each step, or `watch` what the host iterates over."
            )


def _image_of(batch: Any) -> Tensor | None:
    """The image of a batch that is a mapping or a sequence, where it is a tensor."""
    image = batch.get("image") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and len(batch) > 0:
        image = batch[0]
    return image if isinstance(image, Tensor) else None


def _begins_with(image: Tensor, first: Tensor | None) -> bool:
    """Whether a student's input has these rows first, value for value."""
    if first is None or first.shape[1:] != image.shape[1:] or not 0 < len(first) <= len(image):
        return False
    return torch.equal(without_meta(first).to(image), image[: len(first)])


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
