from __future__ import annotations

import logging
import os

import pytest
import torch

from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_checkpoint import resize_positions
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS, SAMVariant
from knowsam_monai.teachers.segment_anything_import import import_segment_anything
from tests.networks.sam_toys import randomized


@pytest.fixture
def toy_variants(monkeypatch):
    """vit_b and vit_l of upstream's layout but few channels."""
    for variant, dim in (("vit_b", 16), ("vit_l", 24)):
        published = SAM_VARIANTS[variant]
        toy = SAMVariant(dim, 3, 2, (1,), prompt_dim=256, decoder_mlp_dim=2048, url=published.url, md5=published.md5)
        monkeypatch.setitem(SAM_VARIANTS, variant, toy)


def upstream_sam(variant: str):
    """Built by `segment_anything`'s own builder, at 1024."""
    import_segment_anything()
    from segment_anything.build_sam import _build_sam

    numbers = SAM_VARIANTS[variant]
    return _build_sam(
        encoder_embed_dim=numbers.embed_dim,
        encoder_depth=numbers.depth,
        encoder_num_heads=numbers.num_heads,
        encoder_global_attn_indexes=list(numbers.global_attention_blocks),
    )


@pytest.fixture
def saved(toy_variants, tmp_path):
    """A vit_b checkpoint as `segment_anything` saves it, and its file."""
    torch.manual_seed(0)
    state = randomized(upstream_sam("vit_b")).state_dict()
    path = tmp_path / "sam_vit_b.pth"
    torch.save(state, path)
    return state, path


def assert_all_loaded(sam, state, grid):
    """Every tensor of the checkpoint is in the model, and nothing is in the model that is not from the checkpoint."""
    loaded = sam.state_dict()
    assert loaded.keys() == state.keys()
    resized = []
    for name, tensor in loaded.items():
        if tensor.shape == state[name].shape:
            assert torch.equal(tensor, state[name]), name
        else:
            assert torch.equal(tensor, resize_positions(state[name], tensor.shape)), name
            resized.append(name)
    global_blocks = SAM_VARIANTS["vit_b"].global_attention_blocks
    relative = [f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"]
    assert sorted(resized) == sorted(["image_encoder.pos_embed", *relative])
    assert loaded["image_encoder.pos_embed"].shape[1:3] == grid
    assert all(len(loaded[name]) == 2 * grid[name.endswith("w")] - 1 for name in relative)
    assert len(loaded["image_encoder.blocks.0.attn.rel_pos_h"]) == 27


def test_a_file_in_half_precision_from_several_gpus_is_taken_and_said(tmp_path, caplog):
    state = build_sam("stand_in", 64).state_dict()
    path = tmp_path / "half.pt"
    torch.save({f"module.{name}": value.half() for name, value in state.items()}, path)
    with caplog.at_level(logging.INFO):
        loaded = build_sam("stand_in", 64, path).state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in state.items())
    assert "holds torch.float16" in caplog.text and "saved from several GPUs" in caplog.text


def test_the_published_vit_b_file_loads_to_the_last_tensor(tmp_path):
    torch.manual_seed(0)
    published = import_segment_anything().sam_model_registry["vit_b"]()
    with torch.no_grad():  # upstream starts these at zero, as ours starts some: make them tell
        for name, parameter in published.image_encoder.named_parameters():
            if "pos" in name:
                parameter.normal_()
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(published.state_dict(), path)
    try:
        sam = build_sam("vit_b", image_size=256, checkpoint=path)
    finally:
        path.unlink()  # 375 MB
    assert_all_loaded(sam, published.state_dict(), grid=(16, 16))
    assert len(sam.state_dict()) == 314


def test_a_file_that_segment_anything_saved_loads_at_another_non_square_size(saved):
    state, path = saved
    assert_all_loaded(build_sam("vit_b", image_size=(128, 192), checkpoint=path), state, grid=(8, 12))


def test_at_1024_nothing_is_resized(saved):
    state, path = saved
    loaded = build_sam("vit_b", image_size=1024, checkpoint=str(path)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_medsams_training_file_loads_as_vit_b(saved, tmp_path, prefix):
    state, _ = saved
    path = tmp_path / "medsam_model_best.pth"
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3}, path)
    assert_all_loaded(build_sam("vit_b", image_size=64, checkpoint=path), state, grid=(4, 4))


def test_a_checkpoint_of_an_own_sam_loads_at_another_size(tmp_path):
    saved_sam = randomized(build_sam("stand_in", image_size=64))
    torch.save(saved_sam.state_dict(), tmp_path / "stand_in.pt")
    sam = build_sam("stand_in", image_size=(64, 64), checkpoint=tmp_path / "stand_in.pt")
    for a, b in zip(sam.state_dict().values(), saved_sam.state_dict().values()):
        assert torch.equal(a, b)
    assert build_sam("stand_in", 96, tmp_path / "stand_in.pt").image_encoder.pos_embed.shape == (1, 12, 12, 160)


def test_relative_positions_are_resized_as_upstream_resizes_them_in_its_forward():
    import_segment_anything()
    from segment_anything.modeling.image_encoder import get_rel_pos

    table = torch.randn(127, 8)
    distances = torch.arange(16)[:, None] - torch.arange(16) + 15
    assert torch.equal(resize_positions(table, (31, 8))[distances], get_rel_pos(16, 16, table))


def test_the_position_table_is_resized_bilinearly():
    ramp = torch.arange(8.0)[None, :, None, None].expand(1, 8, 8, 1)
    torch.testing.assert_close(
        resize_positions(ramp, (1, 4, 4, 1))[0, :, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5])[:, None].expand(4, 4)
    )


def test_the_log_says_what_was_loaded_and_resized(saved, caplog):
    with caplog.at_level(logging.INFO):
        build_sam("vit_b", image_size=256, checkpoint=saved[1])
    message = caplog.messages[-1]
    assert f"all {len(saved[0])} tensors loaded from {saved[1]}. Resized" in message
    assert "16x16: image_encoder.pos_embed, image_encoder.blocks.1.attn.rel_pos_h" in message


def load(path, variant="vit_b"):
    build_sam(variant, image_size=64, checkpoint=path)


def one_sentence_about(path, error) -> str:
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    assert message.startswith("`checkpoint` must be a file with the weights of SAM's ")
    return message


def test_a_missing_file_names_the_command_that_gets_it(tmp_path):
    path = tmp_path / "models" / "sam.pth"
    with pytest.raises(FileNotFoundError) as error:
        load(path)
    url = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
    message = one_sentence_about(path, error)
    assert f"does not exist; get it with `curl --fail --location --create-dirs --output {path} {url}`" in message
    assert "(md5 01ec64d29a2fca3f0661936605ae66f8)" in message
    with pytest.raises(FileNotFoundError, match="stand_in but .* does not exist; set `checkpoint` to 'procedural'"):
        load(path, variant="stand_in")
    with pytest.raises(FileNotFoundError, match="is a folder; name the file in it, or use Sam2Teacher"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"scan", b"<html>"])
def test_a_file_of_something_else_is_not_overwritten_by_the_command(tmp_path, content):
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "scan.nii.gz")
    message = one_sentence_about(tmp_path / "scan.nii.gz", error)
    assert f"--output {tmp_path / 'sam_vit_b_01ec64.pth'} https" in message


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(saved, fraction, zip_format):
    state, path = saved
    torch.save(state, path, _use_new_zipfile_serialization=zip_format)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(ValueError) as error:
        load(path)
    assert "is truncated or not a checkpoint; get it with `curl" in one_sentence_about(path, error)


def test_values_that_are_not_finite_are_named(saved):
    state, path = saved
    torch.save({**state, "image_encoder.pos_embed": state["image_encoder.pos_embed"] * torch.nan}, path)
    with pytest.raises(ValueError) as error:
        load(path)
    message = one_sentence_about(path, error)
    assert "holds NaN or infinite values in `image_encoder.pos_embed`; get it with `curl" in message


PAGES = b"<!DOCTYPE html><html></html>", b"\n  <html>", b"<?xml version='1.0'?>"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ec2d"


@pytest.mark.parametrize("content", [*PAGES, b"junk text here", LFS_POINTER, b"PK\x03\x04junk", b"\x80\x02junk"])
def test_a_web_page_and_a_file_that_is_no_checkpoint_are_named(tmp_path, content):
    path = tmp_path / "sam.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    downloads = dict.fromkeys(PAGES, "a web page (HTML or XML), saved") | {LFS_POINTER: "a pointer of git-lfs, saved"}
    found = downloads.get(content, "truncated or not a che")
    assert f"is {found}" in one_sentence_about(path, error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"conv1.weight": torch.zeros(3)}, r"another model \(its tensors are `conv1.weight`\)"),
        ({}, "holds a dict of nothing; save"),
        (
            {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(3)},
            "holds a LoRA or the like, .*; merge it into its base model",
        ),
        ({"w_a_000": torch.zeros(3)}, "holds a LoRA or the like, .*; merge it into its base model"),
        ({0: torch.zeros(3)}, "holds a dict of `0`; save"),
        (torch.zeros(3), "holds a Tensor; save"),
        ({"epoch": 3, "optimizer": {}}, "holds a dict of `epoch`, `optimizer`; save"),
        ([torch.zeros(3)], "holds a list; save"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(tmp_path, content, words):
    path = tmp_path / "resnet.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    one_sentence_about(path, error)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


WINDOW_TABLE = "image_encoder.blocks.0.attn.rel_pos_h"
TOKEN_MLP = "mask_decoder.transformer.layers.0.mlp.lin1.weight"
VIT_L_PATCHES = {"image_encoder.patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)}
SAM_HQ_TOKEN = {"mask_decoder.hf_token.weight": torch.zeros(1, 256)}
ONE_MORE = {"mask_decoder.one_more.weight": torch.zeros(1)}
LONG_WINDOW_TABLE = {WINDOW_TABLE: torch.zeros(31, 8)}
NARROW_POSITIONS = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: without(state, TOKEN_MLP), f"lacks `{TOKEN_MLP}`"),
        (lambda state: without(state, WINDOW_TABLE), f"lacks `{WINDOW_TABLE}`"),
        (lambda state: state | VIT_L_PATCHES, "holds a vit_l; set `variant` to 'vit_l' or use a file of vit_b"),
        (lambda state: state | SAM_HQ_TOKEN, "holds HQ-SAM, which has additional decoder layers"),
        (lambda state: state | ONE_MORE, "has unexpected `mask_decoder.one_more.weight`"),
        (lambda state: state | LONG_WINDOW_TABLE, r"other shapes in .*rel_pos_h \[31, 8\] instead of \[27, 8\]"),
        (lambda state: state | NARROW_POSITIONS, r"pos_embed \[1, 64, 64, 3\] instead of \[1, 4, 4, 16\]"),
    ],
)
def test_a_tensor_too_few_too_many_or_misshapen_is_named(saved, change, words):
    state, path = saved
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    one_sentence_about(path, error)
