from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn as nn

from knowsam_monai.files import PART
from knowsam_monai.teachers.embedding_cache import EmbeddingCache

SHAPE = (6, 2, 2)


class Encoder(nn.Module):
    """A patch embedding that counts its images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.proj = nn.Conv2d(3, 6, kernel_size=4, stride=4)
        self.num_images = 0

    def forward(self, x):
        self.num_images += len(x)
        return self.proj(x)


def build(encoder=None, dtype=torch.float32, **kwargs):
    encoder = Encoder() if encoder is None else encoder
    return encoder, EmbeddingCache(encoder, {"variant": "toy", "image_size": 8}, SHAPE, dtype=dtype, **kwargs)


def images(num=3):
    torch.manual_seed(1)
    return torch.rand(num, 3, 8, 8)


@pytest.fixture(params=["memory", "folder"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "cache"


def test_each_image_is_encoded_once_and_equals_the_encoder_bit_for_bit(folder):
    encoder, cache = build(folder=folder)
    x = images()
    expected = torch.cat([encoder.proj(row[None]) for row in x]).detach()
    assert torch.equal(cache(x, encoder), expected) and encoder.num_images == 3 and len(cache) == 3
    assert torch.equal(cache(x.flip(0), encoder), expected.flip(0)) and encoder.num_images == 3
    assert not cache(x, encoder).requires_grad


def test_same_image_twice_in_a_batch_is_encoded_once(folder):
    encoder, cache = build(folder=folder)
    x = images(1)
    out = cache(torch.cat([x, x]), encoder)
    assert torch.equal(out[0], out[1]) and encoder.num_images == 1


def test_as_many_known_images_are_encoded_again_as_are_asked_for(folder):
    encoder, cache = build(folder=folder)
    cache(images(), encoder)
    cache.num_repeats = 2
    assert torch.equal(cache(images(), encoder), encoder.proj(images())) and encoder.num_images == 3 + 2
    assert (cache.num_repeats, cache.num_lookups, cache.num_encoded) == (0, 6, 5)


def test_each_orientation_is_encoded_by_itself(folder):
    encoder, cache = build(folder=folder)
    x = images(1)
    forms = [f(x.rot90(k, (2, 3))) for f in (lambda y: y, lambda y: y.flip(2)) for k in range(4)]
    for form in forms + forms:
        assert torch.equal(cache(form, encoder), encoder.proj(form))
    assert encoder.num_images == 8 and len(cache) == 8
    turned_after = cache(x, encoder).rot90(1, (2, 3))
    assert not torch.allclose(turned_after, cache(x.rot90(1, (2, 3)), encoder))  # a kernel is not turned with its image


def test_image_of_equal_bytes_and_another_shape_is_another_image(folder):
    encoder, cache = build(folder=folder)
    x = images(1)
    cache(x, encoder)
    assert cache._key(x[0]) != cache._key(x[0].reshape(3, 4, 16))


def test_half_precision_is_kept_to_half_a_unit_in_the_last_place(folder):
    """float16 has 11 bits: each value deviates by 2^-11 of itself at most, and the first answer is the kept one."""
    encoder, cache = build(dtype=torch.float16, folder=folder)
    x = images()
    first = cache(x, encoder)
    exact = encoder.proj(x)
    assert first.dtype == torch.float32 and not torch.equal(first, exact)
    assert ((first - exact).abs() <= 2**-11 * exact.abs() + 2**-25).all()
    assert torch.equal(cache(x, encoder), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_in_any_precision_are_read_under_autocast(folder, dtype):
    (encoder, cache), batch = build(folder=folder, dtype=dtype), images()
    expected = cache(batch, encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cache(batch, encoder)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_it_is_filled_outside_autocast():
    encoder, cache = build()
    x = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cache(x, encoder)
    assert torch.equal(out, torch.cat([encoder.proj(row[None]) for row in x]))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.proj.weight.mul_(2),
        lambda e: e.load_state_dict(Encoder(5).state_dict()),
        lambda e: setattr(e, "proj", Encoder(5).proj),
    ],
    ids=["in place", "loaded", "replaced"],
)
def test_weights_that_change_make_it_start_anew(change):
    encoder, cache = build()
    x = images(1)
    before = cache(x, encoder)
    with torch.no_grad():
        change(encoder)
    after = cache(x, encoder)
    assert not torch.equal(after, before) and torch.equal(after, encoder.proj(x)) and len(cache) == 1


def test_weights_that_are_loaded_again_keep_what_is_kept():
    encoder, cache = build()
    x = images(1)
    cache(x, encoder)
    encoder.load_state_dict(Encoder(0).state_dict())
    cache(x, encoder)
    assert encoder.num_images == 1


def test_another_run_finds_the_folder_filled(tmp_path):
    encoder, cache = build(folder=tmp_path)
    expected = cache(images(), encoder)
    other, other_cache = build(folder=tmp_path)
    assert torch.equal(other_cache(images(), other), expected) and other.num_images == 0
    assert not list(tmp_path.rglob(f"*{PART}"))


def test_folder_of_another_encoder_size_or_precision_is_an_error(tmp_path):
    build(folder=tmp_path)
    with pytest.raises(ValueError, match=f"`cache_dir` must hold .* {tmp_path} has those of encoder [0-9a-f]+ instead"):
        build(Encoder(seed=1), folder=tmp_path)
    with pytest.raises(ValueError, match="has those of image_size 8 instead of 16"):
        EmbeddingCache(Encoder(), {"variant": "toy", "image_size": 16}, SHAPE, folder=tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="has those of dtype float32 instead of float16"):
        build(folder=tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_folder_whose_owner_cannot_be_read_is_an_error(tmp_path, content):
    encoder, cache = build(folder=tmp_path)
    cache(images(1), encoder)
    owner = tmp_path / "cache.json"
    owner.unlink() if content is None else owner.write_text(content)
    with pytest.raises(ValueError, match="has no readable cache.json; name another folder"):
        build(folder=tmp_path)


def of_another_image(path):
    encoder, cache = build(folder=path.parent)
    cache(images(2)[1:], encoder)
    other = next(file for file in path.parent.glob("*.npy") if file != path)
    path.write_bytes(other.read_bytes())


SPOILS = {
    "tail": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "head": lambda path: path.write_bytes(path.read_bytes()[:9]),
    "empty": lambda path: path.write_bytes(b""),
    "another array": lambda path: np.save(path, np.zeros(1)),
    "value": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "another image": of_another_image,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_torn_file_is_warned_of_and_computed_again(tmp_path, spoil, caplog):
    encoder, cache = build(folder=tmp_path)
    x = images(1)
    expected = cache(x, encoder)
    (path,) = tmp_path.glob("*.npy")
    spoil(path)
    assert torch.equal(cache(x, encoder), expected) and encoder.num_images == 2
    assert [f"{path} is damaged or belongs to another image" in message for message in caplog.messages] == [True]
    cache(x, encoder)
    assert encoder.num_images == 2


def test_value_that_half_precision_cannot_hold_is_an_error():
    encoder, cache = build(dtype=torch.float16)
    with torch.no_grad():
        encoder.proj.bias.fill_(1e5)
    with pytest.raises(ValueError, match="`dtype` of the cache must hold the encoder's values"):
        cache(images(1), encoder)


def test_encoder_that_changes_is_noticed_buffers_too_and_its_folder_refused_each_time(tmp_path):
    encoder, cache = build(folder=tmp_path)
    encoder.register_buffer("mean", torch.zeros(1))
    image = torch.rand(1, 3, 8, 8)
    for change in (lambda: encoder.mean.add_(1), lambda: None):
        with torch.no_grad():
            change()
        with pytest.raises(ValueError, match="must hold the embeddings of this encoder but"):
            cache(image, encoder)
    assert not list(tmp_path.glob("*.npy"))


def test_wrong_dtype_is_an_error():
    with pytest.raises(ValueError, match="must be torch.float16 or torch.float32 but is torch.bfloat16"):
        build(dtype=torch.bfloat16)


def test_owner_of_a_folder_is_plain_json(tmp_path):
    build(folder=tmp_path)
    facts = json.loads((tmp_path / "cache.json").read_text())
    assert set(facts) == {"variant", "image_size", "encoder", "shape", "dtype"} and facts["shape"] == [6, 2, 2]


@pytest.mark.parametrize("num_again", [0, 1])
def test_images_that_never_come_again_are_warned_of_once(monkeypatch, caplog, num_again):
    monkeypatch.setattr("knowsam_monai.teachers.embedding_cache.LOOKUPS_WITHOUT_A_HIT", 4)
    encoder, cache = build()
    cache(torch.cat((images(4 - num_again), images(num_again), images(9)[4:])), encoder)
    warned = ["None of the first 4 images of the cached encoder repeated" in message for message in caplog.messages]
    assert warned == [True] * (num_again == 0)


@pytest.mark.parametrize("path", ["file", "file/inside"])
def test_folder_that_is_a_file_is_an_error(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(
        PermissionError, match=r"`cache_dir` must be a writable folder but .*file.* cannot .* \(.*\); name"
    ):
        build(folder=tmp_path / path)


def test_folder_that_cannot_be_made_is_an_error():
    with pytest.raises(PermissionError, match="`cache_dir` must be a writable folder but /proc/cache cannot"):
        build(folder="/proc/cache")
