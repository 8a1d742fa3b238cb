from __future__ import annotations

import pytest
import torch

from knowsam_monai.labeled_rows import knows_labels, labeled_slice, other_rows, put_rows, take_rows


def label_of(num_rows):
    return None if num_rows is None else torch.zeros(num_rows, 1, 2, 2)


@pytest.mark.parametrize(
    ("labeled_rows", "rows_of_label", "expected"),
    [
        (None, 2, [0, 1]),
        (None, 4, [0, 1, 2, 3]),
        (None, None, []),
        ("all", 4, [0, 1, 2, 3]),
        (2, 2, [0, 1]),
        (2, 4, [0, 1]),
        (6, 4, [0, 1, 2, 3]),  # the last batch of an epoch
        (6, None, [0, 1, 2, 3]),
        (0, None, []),
        (slice(2, None), 2, [2, 3]),
        (slice(2, None), 4, [2, 3]),
        (slice(None, None, 2), 2, [0, 2]),
    ],
)
def test_rows_from_which_sam_learns(labeled_rows, rows_of_label, expected):
    rows = labeled_slice(labeled_rows, label_of(rows_of_label), num_rows=4)
    assert list(range(4))[rows] == expected


@pytest.mark.parametrize(
    ("labeled_rows", "rows_of_label", "message"),
    [
        (3, 2, r"as many rows as are labeled \(3\) or `image` has \(4\) but has 2"),
        (6, 6, r"as many rows as are labeled \(6\) or `image` has \(4\) but has 6"),
        (None, 6, r"as many rows as are labeled \(6\) or `image` has \(4\) but has 6"),
        (slice(2, None), 3, r"as `labeled_rows` selects \(2\) or `image` has \(4\) but has 3"),
        (-1, 2, "must be 0 or more but is -1"),
        (slice(None, None, -1), 4, "a positive step but is"),
        (slice("a"), 4, "a slice of whole numbers"),
        (True, 2, "a number of rows, a slice or 'all' but is True"),
        ("first", 2, "but is 'first'"),
        ([0, 1], 2, "but is a list"),
    ],
)
def test_rows_that_do_not_fit_are_an_error(labeled_rows, rows_of_label, message):
    with pytest.raises((TypeError, ValueError), match=message):
        labeled_slice(labeled_rows, label_of(rows_of_label), num_rows=4)


@pytest.mark.parametrize(
    ("rows", "others"),
    [
        (slice(0, 1), [1, 2, 3]),
        (slice(0, 0), [0, 1, 2, 3]),
        (slice(0, 4), []),
        (slice(2, 4), [0, 1]),
        (slice(0, None, 2), [1, 3]),
    ],
)
def test_other_rows_are_taken_and_put_back(rows, others):
    batch = torch.arange(4.0)
    found = other_rows(rows, num_rows=4)
    assert isinstance(found, slice) == (list(range(4))[rows] == list(range(len(batch[rows]))))  # a view, not a copy
    taken = take_rows(batch, found)
    assert taken.tolist() == others
    put_rows(batch, found, taken + 10)
    assert batch.tolist() == [row + 10 if row in others else row for row in range(4)]


@pytest.mark.parametrize(
    ("rows_of_label", "labeled_rows", "ignore_index", "known"),
    [
        (2, None, None, True),
        (4, None, None, False),  # nobody says which of them the student sees
        (4, "all", None, True),
        (4, None, 255, True),
        (None, 2, None, False),
        (4, 0, None, False),
    ],
)
def test_labels_are_known_where_the_student_may_see_them(rows_of_label, labeled_rows, ignore_index, known):
    label = label_of(rows_of_label)
    rows = labeled_slice(labeled_rows, label, num_rows=4)
    assert knows_labels(label, labeled_rows, rows, 4, ignore_index) is known
