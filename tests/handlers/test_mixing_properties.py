"""Uncertainty-guided mixing on arbitrary tensors: equal to loops in float64, or one clear error; never NaN."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowsam_monai.handlers import UncertaintyGuidedMixing
from knowsam_monai.handlers.guided_mixing import gated
from tests.properties import cases, few, first_largest, log_softmax, pixels, softmax


def cell_entropies(logits, row, grid):
    """Mean entropy of each cell, cells in reading order, as adaptive average pooling cuts them."""
    spatial = logits.shape[2:]
    positions = list(product(*(range(n) for n in spatial)))
    entropies = [-sum(p * math.log(p) for p in softmax(values) if p > 0) for values in pixels(logits[row : row + 1])]
    means = []
    for cell in product(*(range(n) for n in grid)):
        inside = [
            entropy
            for position, entropy in zip(positions, entropies)
            if all(c * n // g <= p < -(-(c + 1) * n // g) for c, n, g, p in zip(cell, spatial, grid, position))
        ]
        means.append(sum(inside) / len(inside))
    return means


@few
@given(cases(min_rows=2, min_size=2, max_size=5), st.data())
def test_most_uncertain_cells_and_their_labels_change_places(case, data):
    grid = tuple(data.draw(st.integers(1 + (axis == 0), min(n, 3))) for axis, n in enumerate(case.spatial))
    num_cells = data.draw(st.integers(1, math.prod(grid) - 1))
    label_dtype = data.draw(st.sampled_from((torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64)))
    image, label = case.image(), case.label(label_dtype)
    logits, pseudo_logits = case.logits(), case.logits()
    mixing = UncertaintyGuidedMixing(loss=None, grid_size=grid, num_cells=num_cells)
    mixed_image, mixed_label = mixing.mix(image, label, logits, pseudo_logits)

    pairs = min(case.labeled, case.rows - case.labeled)
    assert type(mixed_image) is type(mixed_label) is torch.Tensor
    assert mixed_image.shape == (2 * pairs, 1, *case.spatial) and mixed_label.shape == (2 * pairs, 1, *case.spatial)
    assert mixed_image.dtype == image.dtype and mixed_label.dtype == label.dtype
    for pair in range(pairs):
        other = case.labeled + pair
        pseudo_label = [first_largest(values) for values in pixels(pseudo_logits[other : other + 1])]
        ours = list(zip(image[pair].flatten().tolist(), label[pair].flatten().tolist()))
        theirs = list(zip(image[other].flatten().tolist(), map(float, pseudo_label)))
        # the first half: the unlabeled image with labeled content where it is unsure; the second the other way round
        for row, background, content, guide in ((pair, theirs, ours, other), (pairs + pair, ours, theirs, pair)):
            mixed = list(zip(mixed_image[row].flatten().tolist(), mixed_label[row].flatten().tolist()))
            entropies = cell_entropies(logits, guide, grid)
            chosen = set(sorted(range(len(entropies)), key=lambda cell: -entropies[cell])[:num_cells])
            border = sorted(entropies, reverse=True)[num_cells - 1 : num_cells + 1]
            if border[0] - border[1] < 1e-5:
                continue  # float32 may see either of two cells as the less certain one
            cells = [
                sum(
                    p * g // n * math.prod(grid[axis + 1 :])
                    for axis, (p, g, n) in enumerate(zip(position, grid, case.spatial))
                )
                for position in product(*(range(n) for n in case.spatial))
            ]
            assert mixed == [c if cell in chosen else b for cell, b, c in zip(cells, background, content)]


@few
@given(cases(min_rows=2, min_size=2), st.data())
def test_grid_that_does_not_fit_is_one_clear_error(case, data):
    mixing = UncertaintyGuidedMixing(loss=None, grid_size=5, num_cells=2)
    with pytest.raises(ValueError, match="`grid_size` must be at most the image's size"):
        mixing.mix(case.image(), case.label(), case.logits(), case.logits())
    with pytest.raises(ValueError, match="`num_cells` must be between 1 and 3"):
        UncertaintyGuidedMixing(loss=None, grid_size=(2, 2), num_cells=data.draw(st.sampled_from((0, 4, -1))))


@few
@given(cases(min_size=2))
def test_batch_of_one_kind_is_one_clear_error(case):
    case.labeled = case.rows
    mixing = UncertaintyGuidedMixing(loss=None, grid_size=2, num_cells=1)
    with pytest.raises(ValueError, match="`image` must have labeled and unlabeled rows but has only one kind"):
        mixing.mix(case.image(), case.label(), case.logits(), case.logits())


@few
@given(cases(), st.sampled_from((0.0, 0.3, 1.0)))
def test_gated_teacher_is_a_mixture_of_probabilities(case, gate):
    teacher, student = case.logits(), case.logits()
    found = gated(teacher, student, torch.tensor(gate))
    assert type(found) is torch.Tensor and found.shape == teacher.shape and not bool(found.isnan().any())
    for mixed, p, q in zip(pixels(found), pixels(teacher), pixels(student)):
        expected = [gate * a + (1 - gate) * b for a, b in zip(softmax(p), softmax(q))]
        # logits of probabilities, up to a constant
        assert softmax([max(value, -1e4) for value in mixed]) == pytest.approx(expected, abs=1e-4)
        assert not any(math.isnan(value) for value in log_softmax([max(value, -1e4) for value in mixed]))
