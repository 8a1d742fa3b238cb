from __future__ import annotations

from knowsam_monai.data.sampling import LABELED, UNLABELED, TwoStreamSampler
from knowsam_monai.seeds import derive_seed


def test_keys_of_a_batch_name_stream_pass_and_item():
    sampler = TwoStreamSampler(sizes=(2, 4), batch_sizes=(1, 2))
    batches = list(sampler)
    assert [[key.stream for key in keys] for keys in batches] == [[LABELED, UNLABELED, UNLABELED]] * 2
    assert sorted(keys[0].index for keys in batches) == [0, 1]
    assert sorted(key.index for keys in batches for key in keys[1:]) == [0, 1, 2, 3]
    assert {key.epoch for keys in batches for key in keys} == {0}


def test_batch_may_end_one_pass_and_begin_the_next():
    keys = TwoStreamSampler(sizes=(3, 3), batch_sizes=(2, 2)).keys(iteration=1, rank=0, world_size=1)
    assert [key.epoch for key in keys] == [0, 1, 0, 1]


def test_order_is_the_same_on_every_machine():
    """Numbers of numpy's frozen generator: they must never change, or resumed runs do."""
    assert derive_seed(0, 1, 2) == 3884055042
    keys = TwoStreamSampler(sizes=(4, 4), batch_sizes=(4, 4)).keys(0, 0, 1)
    assert [key.index for key in keys] == [3, 1, 2, 0, 3, 1, 2, 0]


def test_streams_have_orders_of_their_own():
    sampler = TwoStreamSampler(sizes=(50, 50), batch_sizes=(50, 50))
    keys = sampler.keys(0, 0, 1)
    assert [key.index for key in keys[:50]] != [key.index for key in keys[50:]]


def test_old_passes_are_forgotten():
    sampler = TwoStreamSampler(sizes=(2, 2), batch_sizes=(2, 2))
    for iteration in range(10):
        sampler.keys(iteration, 0, 1)
    assert len(sampler._orders) == 4
