from __future__ import annotations

import copy
import pickle

import pytest
import torch

from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_encoder import _token_order, encode_image
from tests.networks.sam_toys import randomized, toy_encoder

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

# token grid, window: SAM at 256 and 1024, a whole number of windows, a grid smaller than a window, cut in one axis only
GRIDS = [
    ((16, 16), 14),
    ((14, 28), 14),
    ((8, 8), 4),
    ((4, 4), 14),
    ((1, 1), 14),
    ((5, 9), 3),
    ((20, 7), 7),
    ((7, 20), 7),
    ((16, 11), 14),
]


def upstream(encoder, image):
    return torch.cat([encoder(row[None]) for row in image])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("grid", "window_size"), GRIDS)
def test_equals_upstream_image_by_image(grid, window_size, dtype):
    torch.manual_seed(0)
    encoder = toy_encoder(grid, window_size).to(dtype)
    image = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], dtype=dtype)
    torch.testing.assert_close(encode_image(encoder, image), upstream(encoder, image), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_upstream_at_64_x_64_tokens_as_of_1024_pixels(dtype):
    torch.manual_seed(0)
    encoder = toy_encoder((64, 64), window_size=14, dim=8, num_heads=1).to(dtype)
    image = torch.randn(1, 3, 256, 256, dtype=dtype)
    with torch.no_grad():
        ours, theirs = encode_image(encoder, image), encoder(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("image_size", [(256, 256), (96, 160)])
def test_equals_upstream_for_a_whole_sam(image_size, dtype):
    torch.manual_seed(0)
    encoder = randomized(build_sam("stand_in", image_size), std=0.1).image_encoder.to(dtype)
    image = torch.randn(2, 3, *image_size, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_image(encoder, image), upstream(encoder, image), rtol=0, atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize(("grid", "window_size"), [((5, 9), 3), ((16, 16), 14), ((4, 4), 14)])
def test_gradients_equal_upstreams(grid, window_size):
    torch.manual_seed(0)
    encoder = toy_encoder(grid, window_size).double()
    image = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64, requires_grad=True)
    inputs = [image, *encoder.parameters()]
    weight = torch.randn_like(encoder(image))
    ours = torch.autograd.grad((encode_image(encoder, image) * weight).sum(), inputs)
    theirs = torch.autograd.grad((encoder(image) * weight).sum(), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_padding_is_attended_to_as_upstream_does():
    """The folded key is no formality: without the padding's bias the embedding is another one."""
    torch.manual_seed(0)
    encoder = toy_encoder((5, 5), window_size=4).double()
    image = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    before = encode_image(encoder, image)
    with torch.no_grad():
        encoder.blocks[0].attn.rel_pos_h[0] += 1.0  # the distance from the first real row to the last padded one
    assert (encode_image(encoder, image) - before).abs().max() > 1e-6


def test_bf16_autocast_stays_near_float32():
    torch.manual_seed(0)
    encoder = toy_encoder((8, 8), window_size=5)
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encode_image(encoder, image).float()
    assert torch.nn.functional.cosine_similarity(low.flatten(), encode_image(encoder, image).flatten(), dim=0) > 0.99


def test_token_order_is_built_once_for_a_size_also_in_inference_mode_and_in_copies():
    torch.manual_seed(0)
    encoder = build_sam("stand_in", image_size=64).image_encoder
    _token_order.cache_clear()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = encode_image(encoder, image)
    for copied in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        embedding = encode_image(copied, image)
        embedding.sum().backward()  # an inference tensor could not be saved for it
        assert torch.equal(embedding, expected)
    assert _token_order.cache_info().misses == 1
    encode_image(encoder.double(), image.double())
    assert _token_order.cache_info().misses == 2 and _token_order.cache_info().maxsize is not None
