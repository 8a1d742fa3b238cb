"""The labeled rows of a batch: those whose labels SAM and the student may see."""

from __future__ import annotations

import operator
from typing import Literal

import torch
from torch import Tensor

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError

Rows = int | slice | Literal["all"] | None


def other_rows(rows: slice, num_rows: int) -> slice | list[int]:
    """The rows that are not labeled; a slice, which copies nothing, if the labeled rows come first."""
    labeled = range(num_rows)[rows]
    if labeled == range(len(labeled)):
        return slice(len(labeled), None)
    return [row for row in range(num_rows) if row not in labeled]


def labeled_slice(labeled_rows: Rows, label: Tensor | None, num_rows: int) -> slice:
    """
    The rows of a batch from which SAM learns, as a slice.

    Args:
        labeled_rows, label: as in :meth:`~knowsam_monai.distillation.SAMDistiller.forward`.
        num_rows: rows of the batch.

    Raises:
        TypeError: if `labeled_rows` is not a number, a slice or "all".
        ValueError: if it is negative or an odd slice, or the number of rows of `label` does not fit.

    Example::

        >>> import torch
        >>> labeled_slice(None, torch.zeros(2, 1, 8, 8), num_rows=4)
        slice(0, 2, None)
    """
    if isinstance(labeled_rows, str) and labeled_rows == "all":
        labeled_rows = None
    if isinstance(labeled_rows, slice):
        try:
            selected = range(num_rows)[labeled_rows]
        except (TypeError, ValueError):
            selected = None
        if selected is None or selected.step < 1:
            raise KnowSAMValueError(
                f"`labeled_rows` must be a slice of whole numbers with a positive step but is {labeled_rows}."
            )
        count = len(selected)
        if label is not None and len(label) not in (count, num_rows):
            raise KnowSAMValueError(
                f"`label` must have as many rows as `labeled_rows` selects ({count}) or `image` has ({num_rows}) but "
                f"has {len(label)}."
            )
        return labeled_rows
    if labeled_rows is not None:
        try:
            if isinstance(labeled_rows, bool):
                raise TypeError
            labeled_rows = operator.index(labeled_rows)
        except TypeError:
            given = repr(labeled_rows) if isinstance(labeled_rows, (str, bool)) else f"a {type(labeled_rows).__name__}"
            raise KnowSAMTypeError(
                f"`labeled_rows` must be a number of rows, a slice or 'all' but is {given}; put the labeled "
                "rows next to each other in the batch."
            ) from None
        if labeled_rows < 0:
            raise KnowSAMValueError(f"`labeled_rows` must be 0 or more but is {labeled_rows}.")
    count = labeled_rows if labeled_rows is not None else 0 if label is None else len(label)
    if label is None or len(label) == num_rows:  # a last batch may be smaller
        count = min(count, num_rows)
    if count > num_rows or (label is not None and len(label) not in (count, num_rows)):
        raise KnowSAMValueError(
            f"`label` must have as many rows as are labeled ({count}) or `image` has ({num_rows}) but has "
            f"{0 if label is None else len(label)}; say which rows are labeled with `labeled_rows`."
        )
    return slice(0, count)


def knows_labels(
    label: Tensor | None, labeled_rows: Rows, rows: slice, num_rows: int, ignore_index: int | None
) -> bool:
    """
    Whether rows have labels that the student may see.

    Not if all rows have one and nobody says which the student sees.

    Args:
        label, labeled_rows, num_rows: as in :func:`labeled_slice`.
        rows: what it returned for them.
        ignore_index: the label value of pixels without a label; None: every pixel of a labeled row has one.
    """
    if label is None or len(range(num_rows)[rows]) == 0:
        return False
    return labeled_rows is not None or len(label) < num_rows or ignore_index is not None


def take_rows(tensor: Tensor, rows: slice | list[int]) -> Tensor:
    """Some rows of a batch, without an index tensor, which would make a GPU wait."""
    return tensor[rows] if isinstance(rows, slice) else torch.cat([tensor[:0], *(tensor[i : i + 1] for i in rows)])


def put_rows(batch: Tensor, rows: slice | list[int], values: Tensor) -> None:
    """Write some rows of a batch in place."""
    if isinstance(rows, slice):
        batch[rows] = values
    else:
        for row, value in zip(rows, values):
            batch[row] = value
