from __future__ import annotations

import pytest
import torch

from knowsam_monai.teachers.prompt import LearnablePrompt


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 5), (16, 16)])
def test_every_token_grid_gives_finite_tokens_of_each_class(num_classes, num_tokens, grid):
    tokens = LearnablePrompt(num_classes, embed_dim=16, num_tokens=num_tokens)(torch.randn(3, 16, *grid))
    assert tokens.shape == (3, num_classes, num_tokens, 16) and tokens.isfinite().all()


def test_no_sample_sees_another():
    prompt = LearnablePrompt(num_classes=3, embed_dim=32).double().train()
    embedding = torch.randn(4, 32, 8, 8, dtype=torch.float64)
    together = prompt(embedding)
    alone = torch.cat([prompt(row[None]) for row in embedding])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_each_class_has_tokens_of_its_own_that_depend_on_the_image():
    prompt = LearnablePrompt(num_classes=3, embed_dim=32)
    tokens = prompt(torch.randn(2, 32, 4, 4))
    assert not torch.allclose(tokens[0], tokens[1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(tokens[:, a], tokens[:, b])


def test_classes_start_different_on_the_scale_of_sams_own_tokens():
    torch.manual_seed(0)
    tokens = LearnablePrompt(num_classes=4)(torch.randn(1, 256, 4, 4))
    assert tokens.std().item() == pytest.approx(1, abs=0.1)  # a bias of zeros gives 0.2


def test_image_counts_by_the_mean_of_its_features():
    prompt = LearnablePrompt(num_classes=3, embed_dim=32).double()
    prompt.trunk = torch.nn.Identity()
    features = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    mean = features.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(prompt(features), prompt(mean), rtol=0, atol=1e-12)


def test_it_is_at_least_twenty_times_smaller_than_the_authors():
    assert sum(p.numel() for p in LearnablePrompt(num_classes=4).parameters()) < 22_000_000 / 20


def test_all_its_parameters_get_gradients():
    prompt = LearnablePrompt(num_classes=4, embed_dim=32)
    prompt(torch.randn(2, 32, 4, 4)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prompt.parameters())


@pytest.mark.parametrize("name", ["num_classes", "num_tokens"])
def test_a_count_below_one_is_an_error(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1 but is 0"):
        LearnablePrompt(**{"num_classes": 4, name: 0})
