from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.noisy_passes import NoisyPasses
from tests.hosts import hand_written_noise


def build(dropout=0.0, **kwargs):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Dropout(dropout)).double()
    return NoisyPasses(EMAStudent(network, torch.optim.SGD(network.parameters(), lr=0.1)), **kwargs)


def image(num_rows=2):
    return torch.rand(num_rows, 1, 6, 6, dtype=torch.float64)


def test_noise_is_clipped_gaussian():
    noise = build().noise(torch.zeros(1, 1, 200, 200), iteration=1)
    assert noise.abs().max() == pytest.approx(0.2)
    within = noise[noise.abs() < 0.2]
    assert 1 - within.numel() / noise.numel() == pytest.approx(0.0455, abs=0.005)  # beyond two deviations
    assert within.std().item() == pytest.approx(0.088, abs=0.002)  # of a normal cut at two deviations: 0.1 x 0.88


def test_noise_is_a_function_of_seed_iteration_and_row():
    passes, x = build(), image()
    noise = passes.noise(x, iteration=5, num_passes=3)
    assert noise.shape == (3, 2, 1, 6, 6) and torch.equal(noise, passes.noise(x, iteration=5, num_passes=3))
    assert torch.equal(noise, hand_written_noise(x, 5, 3))
    assert torch.equal(noise[:, :1], passes.noise(x[:1], iteration=5, num_passes=3))  # regardless of later rows
    draws = [noise[0, 0], noise[1, 0], noise[0, 1], passes.noise(x, 6, 3)[0, 0], build(seed=1).noise(x, 5, 3)[0, 0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_second_rank_goes_on_with_the_noise_of_the_rows_after_the_firsts(monkeypatch):
    passes, x = build(), image(4)
    expected = passes.noise(x, iteration=1)[:, 2:]
    monkeypatch.setattr("knowsam_monai.networks.noisy_passes.ranks.rank", lambda: 1)
    assert torch.equal(passes.noise(x[2:], iteration=1), expected)


def test_passes_are_the_networks_answers_to_the_noisy_images():
    passes, x = build(), image()
    noisy = x + hand_written_noise(x, 3, 4)
    expected = torch.stack([passes.ema_student.network(rows) for rows in noisy])
    torch.testing.assert_close(passes(x, 3, 4), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at_once, batches", [(None, [10]), (1, [2] * 5), (2, [4, 4, 2]), (7, [10])])
def test_passes_at_once_decides_the_batch_and_not_the_result(at_once, batches):
    passes, x, seen = build(passes_at_once=at_once), image(), []
    passes.ema_student.network.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    torch.testing.assert_close(passes(x, 3, 5), build()(x, 3, 5), rtol=1e-12, atol=1e-14)
    assert seen == batches


def test_dropout_is_a_function_of_seed_and_iteration_and_leaves_the_runs_generator_alone():
    passes, x = build(dropout=0.5, noise_std=0.0), image()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = passes(x, 1, 2)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(passes(x, 1, 2), first) and not torch.equal(passes(x, 2, 2), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(build(dropout=0.5, noise_std=0.0, seed=1)(x, 1, 2), first)


def test_second_rank_draws_dropout_of_its_own(monkeypatch):
    passes, x = build(dropout=0.5, noise_std=0.0), image()
    first = passes(x, 1)
    monkeypatch.setattr("knowsam_monai.networks.noisy_passes.ranks.rank", lambda: 1)
    assert not torch.equal(passes(x, 1), first)


def test_inferer_of_the_trainer_calls_the_network():
    passes, x = build(), image()
    assert torch.equal(passes(x, 1, inferer=lambda rows, network: 2 * network(rows)), 2 * passes(x, 1))


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="must be at least 0 but are -1"):
        build(noise_std=-1)
    with pytest.raises(ValueError, match="`passes_at_once` must be at least 1, or None for all, but is 0"):
        build(passes_at_once=0)
    with pytest.raises(ValueError, match="`ema_mode` must be 'eval', 'dropout' or 'train'"):
        build(mode="test")
