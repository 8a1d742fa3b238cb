"""Which rows of a batch SAM learns from."""

from __future__ import annotations

import operator
from typing import Literal

from torch import Tensor

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError

Rows = int | slice | Literal["all"] | None


def other_rows(rows: slice, num_rows: int) -> slice | list[int]:
    """The rows that are not labeled; where the labeled ones come first, a slice, which copies nothing."""
    labeled = range(num_rows)[rows]
    if labeled == range(len(labeled)):
        return slice(len(labeled), None)
    return [row for row in range(num_rows) if row not in labeled]


def labeled_slice(labeled_rows: Rows, label: Tensor | None, num_rows: int) -> slice:
    """
    The rows of a batch that SAM learns from, as a slice.

    Args:
        labeled_rows, label: as in :meth:`~knowsam_monai.distillation.SAMDistiller.forward`.
        num_rows: of the batch.

    Raises:
        TypeError: when `labeled_rows` is neither a number nor a slice nor "all".
        ValueError: when it is negative, or `label` has another number of rows.

    Example::

        >>> labeled_slice(None, torch.zeros(2, 1, 8, 8), num_rows=4)
        slice(0, 2, None)
    """
    if isinstance(labeled_rows, str) and labeled_rows == "all":
        labeled_rows = None
    if isinstance(labeled_rows, slice):
        count = len(range(num_rows)[labeled_rows])
        if label is not None and len(label) not in (count, num_rows):
            raise KnowSAMValueError(
                f"`label` must have as many rows as `labeled_rows` takes ({count}) or as `image` has ({num_rows}) but "
                f"has {len(label)}."
            )
        return labeled_rows
    if labeled_rows is not None:
        try:
            labeled_rows = operator.index(labeled_rows)
        except TypeError:
            given = repr(labeled_rows) if isinstance(labeled_rows, str) else f"a {type(labeled_rows).__name__}"
            raise KnowSAMTypeError(
                f"`labeled_rows` must be a number of rows, a slice or 'all' but is {given}; put the labeled rows side "
                "by side in the batch."
            ) from None
        if labeled_rows < 0:
            raise KnowSAMValueError(f"`labeled_rows` must be 0 or more but is {labeled_rows}.")
    count = labeled_rows if labeled_rows is not None else 0 if label is None else len(label)
    if count > num_rows or (label is not None and len(label) not in (count, num_rows)):
        raise KnowSAMValueError(
            f"`label` must have as many rows as are labeled ({count}) or as `image` has ({num_rows}) but has "
            f"{0 if label is None else len(label)}; name the labeled rows with `labeled_rows`."
        )
    return slice(0, count)
