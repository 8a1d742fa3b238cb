"""Segmenting many images: one that cannot be segmented never stops the others."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Evaluator

from knowsam_monai.errors import KnowSAMError, KnowSAMValueError, root_cause


def segment(evaluator: Evaluator) -> None:
    """
    Segment all images of an evaluator; for a bundle's `run`.

    Args:
        evaluator: MONAI's evaluator with a loader whose items have an `image`, without shuffling.

    Raises:
        ValueError: after all other images are segmented; lists those that could not be, with their reasons. If the
            evaluator already has a :class:`~knowsam_monai.runs.segmenting.SkippingLoader`, as in `predict`, its owner
            reports them instead.

    Example::

        "run": [{"_target_": "knowsam_monai.runs.segment", "evaluator": "@evaluator"}]
    """
    if isinstance(evaluator.data_loader, SkippingLoader):
        evaluator.run()
        return
    loader = SkippingLoader(evaluator)
    evaluator.run()
    loader.raise_if_faulty()
    loader.raise_if_broken("dataset_dir")


class SkippingLoader:
    """
    An evaluator's loader and step. If either fails, the batch's images are listed as `broken` with the error.

    Args:
        evaluator: the evaluator, which uses this loader and this step from now on.

    Example::

        loader = SkippingLoader(evaluator)
        evaluator.run()
        loader.raise_if_faulty()
        loader.raise_if_broken("dataset_dir")
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.loader = evaluator.data_loader
        self.broken: list[tuple[Any, BaseException]] = []
        self.number = 0  # of the batch
        evaluator.data_loader, evaluator._process_function = self, self.step
        # with fewer batches than the loader's length, ignite would restart the loader
        evaluator.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: evaluator.terminate_epoch())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)  # continues with the next batch after an error
        for self.number in range(len(self.loader)):
            try:
                batch = next(batches)
            except Exception as error:  # every reader and transform fails in its own way
                self._skip(error)
            else:
                yield batch

    @property
    def num_segmented(self) -> int:
        """Images that were segmented, after the run."""
        return len(self.loader.dataset) - len(self.broken)

    def step(self, engine: Engine, batch: Any) -> Any:
        """The engine's step: network, postprocessing, writing."""
        try:
            return engine._iteration(engine, batch)
        except Exception as error:
            self._skip(error)
            return []

    def raise_if_faulty(self) -> None:
        """Raise the first error if all images failed and no error is of this package: the images are not at fault."""
        left_out = [str(item["image"]) for item in self.loader.dataset.data if "left_out" in item]
        errors = [root for image, root in self.broken if str(image) not in left_out]
        if errors and not self.num_segmented and not any(isinstance(root, KnowSAMError) for root in errors):
            raise errors[0]

    def raise_if_broken(self, argument: str, remedy: str = "") -> None:
        """
        Raise an error that lists the broken images.

        Args:
            argument: the argument that named the images.
            remedy: another one, in words before that for the images.

        Raises:
            ValueError: with the reason for each image.
        """
        if not self.broken:
            return
        reasons = [(str(image), reason(root)) for image, root in self.broken]
        lines = dict.fromkeys(f"\n  {text}" if image in text else f"\n  {image}: {text}" for image, text in reasons)
        raise KnowSAMValueError(
            f"`{argument}` must be images that can be segmented but {len(self.broken)} of {len(self.loader.dataset)} "
            f"could not be; {remedy}repair or remove:{''.join(lines)}"
        )

    def _skip(self, error: BaseException) -> None:
        size = self.loader.batch_size
        items = self.loader.dataset.data[self.number * size : (self.number + 1) * size]
        root = root_cause(error)
        traceback.clear_frames(root.__traceback__)  # to free the image
        self.broken += [(item["image"], root) for item in items]


def reason(error: BaseException) -> str:
    """
    The first line of an error, with its type unless it is an error of this package.

    Example:
        >>> reason(KeyError("image"))
        "KeyError: 'image'"
    """
    lines = str(error).strip().splitlines() or [""]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1]  # MONAI's SaveImage includes the writer's traceback
    return lines[0] if isinstance(error, KnowSAMError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")
