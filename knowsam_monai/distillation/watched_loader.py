"""The host's current batch: a loader that announces each batch, and what SAM uses of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowsam_monai.arguments import check_types
from knowsam_monai.data.orientation import SAM_IMAGE
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.tensors import mapped_tensors, without_meta


class WatchedLoader:
    """
    A proxy of a loader that calls `next_batch` with each batch before the host gets it.

    It iterates like the loader, has its length and its attributes (to read and to set), and passes ``isinstance`` of
    its class; only ``type`` differs. Pickling it, as for another process, pickles the bare loader.

    Args:
        loader: any iterable or iterator.
        next_batch: called with each batch; None until ``distiller.attach(student, optimizer, loader=watched_loader)``
            adds one.

    Attributes:
        watched_by: the functions called with each batch, in this order.

    Example::

        >>> list(WatchedLoader([1, 2], next_batch=print))
        1
        2
        [1, 2]
        >>> isinstance(WatchedLoader([1, 2]), list)
        True
    """

    __slots__ = ("_watched_loader", "watched_by", "_watched_iterator", "__weakref__")

    @check_types
    def __init__(self, loader: Any, next_batch: Callable[[Any], None] | None = None) -> None:
        self._watched_loader = loader
        self.watched_by = [] if next_batch is None else [next_batch]  # shared with the iterators
        self._watched_iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._watched_loader)
        return self if iterator is self._watched_loader else self._with_watchers(iterator)  # type: ignore[return-value]

    def __next__(self) -> Any:
        """The next batch; a loader that is not an iterator is iterated, and starts again after its end."""
        if not isinstance(self._watched_loader, Iterator):
            self._watched_iterator = iter(self) if self._watched_iterator is None else self._watched_iterator
            try:
                return next(self._watched_iterator)
            except StopIteration:
                self._watched_iterator = None
                raise
        return self._announce(next(self._watched_loader))

    def __getitem__(self, index: Any) -> Any:
        item = self._watched_loader[index]  # type: ignore[index]
        return self._announce(item) if hasattr(index, "__index__") else item

    def __len__(self) -> int:
        return len(self._watched_loader)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self._watched_loader)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return self._watched_loader.__class__

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return self._watched_loader.__dict__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched_loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WatchedLoader.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._watched_loader, name, value)

    def __copy__(self) -> WatchedLoader:
        return self._with_watchers(self._watched_loader)

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedLoader:
        return self._with_watchers(copy.deepcopy(self._watched_loader, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return copy.copy, (self._watched_loader,)

    def _with_watchers(self, loader: Iterable) -> WatchedLoader:
        watched = WatchedLoader(loader)
        watched.watched_by = self.watched_by
        return watched

    def _announce(self, batch: Any) -> Any:
        for next_batch in self.watched_by:
            next_batch(batch)
        return batch


class CurrentBatch:
    """
    The batch that the host took last, and the student's calls on it.

    Attributes:
        batch: the batch; None before the first one.
        is_over: whether the student has stepped since, so the next call must be on a new batch.
        num_calls: number of the student's calls on this batch.
        is_unused: whether the student has not yet been called on any batch in train mode, and no error was raised.

    Raises:
        RuntimeError: if the student is called without a batch, or on another one.

    Example::

        >>> current = CurrentBatch()
        >>> current.take({"image": torch.zeros(2, 1, 8, 8)})
        >>> current.count_call()
        1
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.is_over = False
        self._moved: tuple[torch.device, Any] | None = None
        self.num_calls = 0
        self.is_unused = True
        self._uncalled_images: list[weakref.ref[Tensor]] = []  # of earlier batches without a call of the student

    def take(self, batch: Any) -> None:
        """Make this the current batch."""
        former_image = _image_of(self.batch)
        if self.num_calls:
            self._uncalled_images.clear()
        elif former_image is not None:
            self._uncalled_images.append(weakref.ref(former_image))
        self.batch, self.is_over, self.num_calls, self._moved = batch, False, 0, None

    def on(self, device: torch.device) -> Any:
        """The batch with its tensors on a device; moved once."""
        if self._moved is None or self._moved[0] != device:
            self._moved = device, on_device(self.batch, device)
        return self._moved[1]

    def count_call(self) -> int:
        """Number of the student's calls on this batch, including the current one."""
        if self.batch is None:
            raise KnowSAMRuntimeError(
                "`student` must be called on a batch of `watch(loader)` but no batch was taken; let the host iterate "
                "over `watch(loader)`, or call `next_batch(batch)` before each step."
            )
        self.num_calls += 1
        return self.num_calls

    def check(self, image: Tensor) -> None:
        """Raise a RuntimeError if the image shows that the student is called on another batch."""
        if self.is_over:
            raise KnowSAMRuntimeError(
                "`student` must be called on a new batch after its step but is called on the previous one; let the "
                "host take each batch from `watch(loader)` itself, not from `itertools.cycle` or a list of batches, or "
                "call `next_batch(batch)` before each step."
            )
        is_of_former = any(_begins_with(image, former()) for former in self._uncalled_images)
        if is_of_former and not _begins_with(image, _image_of(self.batch)):
            raise KnowSAMRuntimeError(
                "`student` must be called on the batch taken last but is called on an earlier one, so batches are "
                "prefetched; call `next_batch(batch)` before each step, or `watch` what the host iterates over."
            )


def on_device(batch: Any, device: torch.device) -> Any:
    """
    A batch with its tensors on a device.

    Args:
        batch: nested mappings, lists, tuples and named tuples; other values stay as they are.
        device: the device; parts already on it are returned without a copy.

    Example::

        >>> batch = {"image": torch.zeros(2, 1, 8, 8), "name": ["a", "b"]}
        >>> on_device(batch, torch.device("cpu")) is batch
        True
    """
    # a host waits for its copies
    return mapped_tensors(batch, lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))


def _image_of(batch: Any) -> Tensor | None:
    """The image of a batch that is a mapping or a sequence, if it is a tensor."""
    image = batch.get("image") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and len(batch) > 0:
        image = batch[0]
    return image if isinstance(image, Tensor) else None


def _begins_with(image: Tensor, first: Tensor | None) -> bool:
    """Whether the student's input starts with exactly these rows."""
    if first is None or first.shape[1:] != image.shape[1:] or not 0 < len(first) <= len(image):
        return False
    first = without_meta(first).to(image, non_blocking=image.device.type != "cpu")
    return torch.equal(first, image[: len(first)])


def image_and_label(batch: Any, image: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """
    SAM's image (the batch's own, or else `image`) and the label of a batch on whose image the student was called.

    Args:
        batch: a mapping with "image" and optionally "label" and "sam_image", or a pair (image, label).
        image: (B, channels, *spatial), the student's input.

    Returns:
        SAM's image, the label, and whether the batch's image is exactly `image`: None if both share their memory, else
        a scalar on the device. Pass it to :func:`check_same_image` before the result has any effect, but only once
        the device has other work, since the host waits for it.

    Raises:
        ValueError: if `batch` is neither, or its image has another shape; the label is never guessed.
    """
    if isinstance(batch, Mapping) and "image" in batch:
        batch_image, label, sam_image = batch["image"], batch.get("label"), batch.get(SAM_IMAGE, image)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        (batch_image, label), sam_image = batch, image
    else:
        raise KnowSAMValueError(
            "A watched batch must be a mapping with 'image' and 'label' or a pair (image, label) but is a "
            f"{type(batch).__name__}; pass `select`."
        )
    if not isinstance(batch_image, (Tensor, np.ndarray)):
        raise KnowSAMValueError(
            f"The image of a watched batch must be a tensor but is a {type(batch_image).__name__}; if each "
            "step combines several batches, `watch` the loader of the labeled ones and pass `select`."
        )
    batch_image = without_meta(torch.as_tensor(batch_image))
    if batch_image.shape != image.shape:
        raise _other_image(image, batch_image.shape)
    is_same = None
    if _place(batch_image) != _place(image):
        is_same = (batch_image.to(image, non_blocking=image.device.type != "cpu") == image).all()
    return sam_image, label, is_same


def check_same_image(is_same: Tensor | None, image: Tensor) -> None:
    """Raise a ValueError if the batch's image is not the student's, as :func:`image_and_label` found."""
    if is_same is not None and not bool(is_same):
        raise _other_image(image, image.shape)


def _other_image(image: Tensor, batch_shape: Sequence[int]) -> KnowSAMValueError:
    return KnowSAMValueError(
        f"The student's input, of shape {tuple(image.shape)}, must be the image of the watched batch, of shape "
        f"{tuple(batch_shape)}, but differs; pass `select` if the step changes the image, or call "
        "`next_batch(batch)` before each step if batches are prefetched."
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors of one shape that are the same elements of the same memory."""
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.stride()
