from __future__ import annotations

import random

import pytest
import torch

from knowsam_monai.files import InvalidCheckpointError, read_tensor_file, write_tensor_file
from tests.same_bits import assert_same_bits


@pytest.fixture
def written(tmp_path):
    """A file of weights and plain values, and what is in it."""
    torch.manual_seed(0)
    state = {"network": {f"layer{i}.weight": torch.randn(40, 30) for i in range(6)}, "trainer": {"epoch": 3}, "x": 0.5}
    with open(tmp_path / "a.pt", "x+b") as file:
        write_tensor_file(state, file)
    return tmp_path / "a.pt", state


def test_every_flipped_bit_is_refused_or_harmless(written):
    """Anywhere: in weights, in the zip's headers and its directory, in the checksum."""
    path, state = written
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    places = [*range(300), *range(len(whole) - 1000, len(whole)), *(draw.randrange(len(whole)) for _ in range(300))]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = read_tensor_file(path)
        except InvalidCheckpointError:
            refused += 1
        else:
            assert_same_bits(found, state)
    assert refused >= len(places) - 15  # those that hit the mark before the checksum


def test_file_with_a_checksum_is_a_zip_like_any_other(written):
    path, state = written
    assert_same_bits(read_tensor_file(path), state)
    assert_same_bits(torch.load(path, weights_only=True), state)
    assert_same_bits(torch.load(path, weights_only=True, mmap=True), state)


@pytest.mark.parametrize("as_zip", [True, False])
def test_other_programs_files_are_read_and_flipped_weights_in_their_zip_refused(written, tmp_path, as_zip):
    _, state = written
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=as_zip)
    assert_same_bits(read_tensor_file(tmp_path / "b.pt"), state)
    content = bytearray((tmp_path / "b.pt").read_bytes())
    content[content.index(state["network"]["layer3.weight"].numpy().tobytes()) + 7] ^= 64
    (tmp_path / "b.pt").write_bytes(content)
    if as_zip:
        with pytest.raises(InvalidCheckpointError, match="is damaged"):
            read_tensor_file(tmp_path / "b.pt")


def test_flipped_weights_are_called_damaged(written):
    path, state = written
    content = bytearray(path.read_bytes())
    start = content.index(state["network"]["layer3.weight"].numpy().tobytes())
    for i in range(200):
        content[start + 16 * i] ^= 64
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"] == 0.5  # torch itself takes it
    with pytest.raises(
        InvalidCheckpointError, match=r"^\(\d+ bytes\) is damaged: its checksum does not match its content$"
    ):
        read_tensor_file(path)
