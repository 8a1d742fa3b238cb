from __future__ import annotations

import logging

import pytest
import torch

from knowsam_monai.teachers import SAMTeacher
from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS
from knowsam_monai.teachers.segment_anything_import import import_segment_anything
from tests.networks.sam_toys import TOY_VARIANT


@pytest.mark.parametrize("image_size", [16, 48, 128, (64, 96), [32, 16]])
def test_any_multiple_of_16_is_a_size(image_size):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    sam = build_sam("stand_in", image_size)
    assert sam.image_encoder(torch.zeros(1, 3, height, width)).shape == (1, 128, height // 8, width // 8)
    assert sam.prompt_encoder.mask_input_size == (height // 2, width // 2)


@pytest.mark.parametrize("image_size", [0, -16, 100, (64, 100), (64, 64, 64), (64,), 64.0, "64", True, (64.0, 64.0)])
def test_other_sizes_are_an_error(image_size):
    with pytest.raises(
        ValueError, match="`image_size` must be a positive multiple of 16.* but is .*; images are resized"
    ):
        build_sam("stand_in", image_size)


def test_an_unknown_variant_is_an_error():
    with pytest.raises(
        ValueError, match="`variant` must be one of vit_b, vit_l, vit_h, mobile_sam, stand_in but is 'vit_x'"
    ):
        build_sam("vit_x", image_size=64)


def test_modules_are_upstreams_own():
    modules = build_sam("stand_in", image_size=64).named_modules()
    packages = {type(module).__module__.split(".")[0] for _, module in modules}
    assert packages == {"segment_anything", "torch"}


def test_it_is_in_eval_mode():
    assert not any(module.training for module in build_sam("stand_in", image_size=64).modules())


def test_position_tables_have_the_grids_shape_and_windows_keep_theirs(monkeypatch):
    monkeypatch.setitem(SAM_VARIANTS, "vit_b", TOY_VARIANT._replace(patch_size=16, window_size=14))
    encoder = build_sam("vit_b", image_size=(256, 320)).image_encoder
    assert encoder.pos_embed.shape == (1, 16, 20, 16)
    assert [len(block.attn.rel_pos_h) for block in encoder.blocks] == [27, 31, 27]
    assert [len(block.attn.rel_pos_w) for block in encoder.blocks] == [27, 39, 27]


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h"])
def test_published_variants_have_upstreams_tensors(variant):
    """Names, number and shapes, without allocating 640 M weights: both sides are built on the meta device."""
    registry = import_segment_anything().sam_model_registry
    with torch.device("meta"):
        ours, theirs = build_sam(variant, image_size=1024), registry[variant]()
    shapes = [{name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()} for sam in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for a, b in zip(ours.image_encoder.blocks, theirs.image_encoder.blocks):
        assert (a.window_size, a.attn.num_heads, a.norm1.eps) == (b.window_size, b.attn.num_heads, b.norm1.eps)
    for name, module in theirs.named_modules():
        if hasattr(module, "num_heads"):
            assert ours.get_submodule(name).num_heads == module.num_heads
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean) and torch.equal(ours.pixel_std, theirs.pixel_std)


def test_stand_in_is_small_and_attends_in_windows_and_globally():
    sam = build_sam("stand_in", image_size=128)
    assert sum(parameter.numel() for parameter in sam.parameters()) < 5_000_000
    windows = {block.window_size for block in sam.image_encoder.blocks}
    assert windows == {0, 8}
    assert sam.image_encoder.pos_embed.shape[1:3] == (16, 16)


def test_a_sam_without_checkpoint_tells_its_tokens_apart():
    """Upstream starts the position table at zero: equal patches would stay equal tokens."""
    embedding = build_sam("stand_in", image_size=64).image_encoder(torch.zeros(1, 3, 64, 64))
    assert embedding.flatten(2).std(dim=2).max() > 1e-3


def test_the_name_loads_the_packages_file_and_says_that_it_is_not_sam(tmp_path, monkeypatch, caplog):
    torch.manual_seed(1)
    state = build_sam("stand_in", image_size=64).state_dict()
    torch.save(state, tmp_path / "stand_in.pt")
    monkeypatch.setattr("knowsam_monai.teachers.sam.WEIGHTS", tmp_path / "stand_in.pt")
    with caplog.at_level(logging.WARNING):
        sam = build_sam("stand_in", image_size=64, checkpoint="procedural")
    assert all(torch.equal(value, state[name]) for name, value in sam.state_dict().items())
    assert "NOT SAM" in caplog.text
    assert SAMTeacher(2, 64, variant="stand_in", checkpoint="procedural").stand_in


def test_without_the_file_the_message_holds_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("knowsam_monai.teachers.sam.WEIGHTS", tmp_path / "stand_in.pt")
    with pytest.raises(FileNotFoundError, match="python -m pretraining.pretrain_stand_in --output"):
        build_sam("stand_in", image_size=64, checkpoint="procedural")


def test_another_variant_has_no_stand_in():
    with pytest.raises(ValueError, match="exists for stand_in only"):
        build_sam("vit_b", image_size=64, checkpoint="procedural")
