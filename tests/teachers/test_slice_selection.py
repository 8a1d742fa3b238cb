from __future__ import annotations

import pytest
import torch

from knowsam_monai.teachers.slice_selection import SliceSelection, draw_axis, draw_by_entropy, draw_uniform


def unsure_slices(axis: int, unsure: list[int], size: int = 6) -> torch.Tensor:
    """Logits (2, 2, 6, 6, 6), sure of class 1 but in the given slices, where both classes are equal."""
    logits = torch.zeros(2, 2, size, size, size)
    logits[:, 1] = 40
    logits.movedim(axis + 2, 0)[unsure] = 0
    return logits


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_row_is_cut_down_to_its_own_slices(axis):
    volume = torch.rand(2, 3, 4, 5, 6)
    index = torch.tensor([[0, 3], [1, 2]])
    thin = SliceSelection(axis, index).take(volume)
    for row in range(2):
        assert torch.equal(thin[row], volume[row].index_select(axis + 1, index[row]))


def test_rows_of_a_part_of_the_batch_are_cut_by_their_own_index():
    volume = torch.rand(4, 1, 2, 2, 5)
    selection = SliceSelection(2, torch.tensor([[0], [1], [2], [3]]))
    assert torch.equal(selection.take(volume[1:4:2], slice(1, 4, 2)), selection.take(volume)[1:4:2])


def test_gradient_passes_to_the_slices_alone():
    volume = torch.rand(2, 1, 2, 2, 4, requires_grad=True)
    SliceSelection(2, torch.tensor([[0, 3], [1, 2]])).take(volume).sum().backward()
    assert volume.grad[:, 0, 0, 0].tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize(("size", "num_slices"), [(8, 4), (7, 3), (5, 5), (5, 1), (80, 8)])
def test_uniform_draw_takes_one_slice_of_each_equal_part(size, num_slices):
    for iteration in range(20):
        index = draw_uniform(size, num_slices, num_rows=3, seed=0, iteration=iteration)
        assert index.shape == (3, num_slices) and index.dtype == torch.int64
        for part in range(num_slices):
            first, end = part * size // num_slices, (part + 1) * size // num_slices
            assert ((first <= index[:, part]) & (index[:, part] < end)).all()


def test_uniform_draw_comes_to_every_slice():
    draws = torch.cat([draw_uniform(7, 3, num_rows=4, seed=0, iteration=t) for t in range(50)])
    assert draws.unique().tolist() == list(range(7))


def draws(sampling, seed, iteration, num_rows=4):
    if sampling == "uniform":
        return draw_uniform(40, 4, num_rows, seed, iteration)
    return draw_by_entropy(torch.zeros(num_rows, 2, 2, 2, 40), 2, 4, seed, iteration)


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_draw_is_a_function_of_seed_iteration_and_row(sampling):
    reference = draws(sampling, seed=0, iteration=5)
    assert torch.equal(reference, draws(sampling, seed=0, iteration=5))
    assert torch.equal(reference[:2], draws(sampling, seed=0, iteration=5, num_rows=2))  # not of the number of rows
    assert len({tuple(row) for row in reference.tolist()}) == 4  # rows draw differently
    assert not torch.equal(reference, draws(sampling, seed=1, iteration=5))
    assert not torch.equal(reference, draws(sampling, seed=0, iteration=6))


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_rows_of_the_second_rank_are_the_rows_after_the_firsts(sampling, monkeypatch):
    both = draws(sampling, seed=0, iteration=5)
    monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: 1)
    assert torch.equal(draws(sampling, seed=0, iteration=5, num_rows=2), both[2:])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_entropy_draw_takes_the_slices_where_the_student_is_unsure(axis):
    logits = unsure_slices(axis, [1, 4])
    for iteration in range(5):
        assert draw_by_entropy(logits, axis, 2, seed=0, iteration=iteration).tolist() == [[1, 4], [1, 4]]


def test_entropy_draw_is_in_proportion_to_the_mean_entropy():
    logits = torch.zeros(500, 2, 1, 4, 9)
    logits[:, 1, 0, 1:, :8] = 40  # 8 slices are unsure in one voxel of four, the last one in all: 4 of 8 + 4
    drawn = torch.cat([draw_by_entropy(logits, 2, 1, seed=0, iteration=t) for t in range(4)])
    assert (drawn == 8).double().mean().item() == pytest.approx(1 / 3, abs=0.03)  # deviation 0.011


def test_entropy_draw_of_a_student_that_is_sure_everywhere_is_still_a_draw_without_repetition():
    logits = torch.zeros(3, 2, 2, 2, 8)
    logits[:, 1] = 1000
    index = draw_by_entropy(logits, 2, 8, seed=0, iteration=0)
    assert index.tolist() == [list(range(8))] * 3
    index = draw_by_entropy(logits, 2, 3, seed=0, iteration=0)
    assert (index.diff(dim=1) > 0).all() and len({tuple(row) for row in index.tolist()}) > 1


def test_axis_is_a_function_of_seed_and_iteration_and_all_come():
    drawn = [draw_axis((0, 2), seed=3, iteration=t) for t in range(20)]
    assert drawn == [draw_axis((0, 2), seed=3, iteration=t) for t in range(20)] and set(drawn) == {0, 2}
