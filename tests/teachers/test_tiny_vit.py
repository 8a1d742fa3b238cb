from __future__ import annotations

import copy

import pytest
import torch

from knowsam_monai.teachers import SAMTeacher, build_sam, check_teacher, origin
from knowsam_monai.teachers.segment_anything_import import import_segment_anything

WIDTHS, BLOCKS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)


def mobile_sam_state() -> dict[str, torch.Tensor]:
    """Names and shapes of mobile_sam.pt, attribute by attribute as its authors' sources name them."""
    torch.manual_seed(0)
    modeling = import_segment_anything().modeling
    prompts = modeling.PromptEncoder(256, (64, 64), (1024, 1024), mask_in_chans=16)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    decoder = modeling.MaskDecoder(transformer_dim=256, transformer=transformer)
    state = {f"prompt_encoder.{name}": value for name, value in prompts.state_dict().items()}
    state |= {f"mask_decoder.{name}": value for name, value in decoder.state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {"neck.0.weight": (256, 320, 1, 1), "neck.2.weight": (256, 256, 3, 3)}

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(name, before, after):
        shapes.update({f"{name}.weight": (after, before), f"{name}.bias": (after,)})

    def conv(name, before, after, side):
        shapes[f"{name}.c.weight"] = (after, before, side, side)
        norm(f"{name}.bn", after)
        shapes.update({f"{name}.bn.{what}": (after,) for what in ("running_mean", "running_var")})
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    norm("neck.1", 256)
    norm("neck.3", 256)
    conv("patch_embed.seq.0", 3, 32, 3)
    conv("patch_embed.seq.2", 32, 64, 3)
    for stage, (width, count, heads, window) in enumerate(zip(WIDTHS, BLOCKS, HEADS, WINDOWS)):
        for block in (f"layers.{stage}.blocks.{number}" for number in range(count)):
            if stage == 0:
                conv(f"{block}.conv1", width, 4 * width, 1)
                conv(f"{block}.conv2", 1, 4 * width, 3)
                conv(f"{block}.conv3", 4 * width, width, 1)
                continue
            shapes[f"{block}.attn.attention_biases"] = (heads, window**2)
            norm(f"{block}.attn.norm", width)
            linear(f"{block}.attn.qkv", width, 3 * width)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.mlp.norm", width)
            linear(f"{block}.mlp.fc1", width, 4 * width)
            linear(f"{block}.mlp.fc2", 4 * width, width)
            conv(f"{block}.local_conv", 1, width, 3)
        if stage < 3:
            following = WIDTHS[stage + 1]
            conv(f"layers.{stage}.downsample.conv1", width, following, 1)
            conv(f"layers.{stage}.downsample.conv2", 1, following, 3)
            conv(f"layers.{stage}.downsample.conv3", following, following, 1)
    norm("norm_head", 320)
    linear("head", 320, 1000)
    for name, shape in shapes.items():
        random = torch.rand(shape) if name.endswith("running_var") else torch.randn(shape) * 0.1
        state[f"image_encoder.{name}"] = random if shape else torch.tensor(1)
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mobile_sam.pt"
    torch.save(mobile_sam_state(), path)
    return path


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="MobileSAM needs the extra `mobilesam`")


def test_every_tensor_of_the_file_is_loaded_and_none_is_new(timm, file):
    sam = build_sam("mobile_sam", 1024, file)
    given, found = torch.load(file), sam.state_dict()
    assert len(given) == len(found) == 439
    assert sorted(x.sum().item() for x in given.values()) == sorted(x.sum().item() for x in found.values())
    vit = sam.image_encoder.vit
    name = "image_encoder.layers.1.downsample.conv2.bn.running_mean"  # stage 1's last is stage 2's first
    assert torch.equal(vit.stages[2].downsample.conv2.bn.running_mean, given[name])
    assert torch.equal(vit.patch_embed.conv2.conv.weight, given["image_encoder.patch_embed.seq.2.c.weight"])


@pytest.mark.parametrize("size", [(1024, 1024), (256, 128)])
def test_a_token_stands_for_16_pixels(timm, size):
    embedding = build_sam("mobile_sam", size).image_encoder(torch.zeros(1, 3, *size))
    assert embedding.shape == (1, 256, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize(
    "trainable, encoder, learns",
    [("adapters", "adapted", {"adapter"}), ("all", "adapted", {"adapter", "biases"}), ("adapters", "cached", set())],
)
def test_it_teaches_as_any_teacher(timm, file, trainable, encoder, learns):
    options = {"checkpoint": file, "trainable": trainable, "encoder": encoder}
    teacher = SAMTeacher(3, image_size=64, variant="mobile_sam", **options)
    facts = check_teacher(teacher, torch.rand(2, 1, 64, 64))
    assert not teacher.stand_in and facts.license == "Apache-2.0" and "SA-1B" in facts.pretrained_on
    of_encoder = [name for name in facts.trainable if name.startswith("sam.image_encoder.vit.stages.1.blocks.0.attn.")]
    assert {part for part in ("adapter", "biases") for name in of_encoder if part in name} == learns


def test_adapters_at_zero_change_nothing_and_new_weights_count_at_once(timm, file):
    teacher = SAMTeacher(3, image_size=64, variant="mobile_sam", checkpoint=file)
    sam, image = build_sam("mobile_sam", 64, file), torch.rand(2, 1, 64, 64)
    normalized = (image.expand(-1, 3, -1, -1) * 255 - sam.pixel_mean) / sam.pixel_std
    before = sam.image_encoder(normalized)
    assert torch.equal(teacher.encode(image), before)
    for block in sam.image_encoder.blocks:
        block.attn.attention_biases.data.normal_()
    assert not torch.equal(sam.image_encoder(normalized), before)


def test_a_copy_is_possible_after_a_step_and_its_mlp_adapters_see_normalized_tokens(timm, file):
    teacher = SAMTeacher(3, image_size=64, variant="mobile_sam", checkpoint=file, trainable="all")
    block, seen = teacher.sam.image_encoder.blocks[0], []
    block.mlp.adapter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.mlp.mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher(torch.rand(2, 1, 64, 64), torch.randn(2, 3, 64, 64)).sum().backward()
    assert torch.equal(*seen)
    copy.deepcopy(teacher)


@pytest.mark.parametrize("given, taken", [("mobile_sam", "vit_b"), ("stand_in", "mobile_sam")])
def test_the_file_of_another_variant_is_named(file, tmp_path, given, taken):
    if given != "mobile_sam":
        file = tmp_path / "other.pt"
        torch.save(build_sam(given, 64).state_dict(), file)
    if taken == "mobile_sam":
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"SAM's {taken} but .* holds a {given}; set `variant` to '{given}'"):
        build_sam(taken, 64, file)


def test_its_authors_name_of_it_is_explained():
    with pytest.raises(ValueError, match="but is 'vit_t'; MobileSAM.* is 'mobile_sam' here, .* is 'stand_in'"):
        build_sam("vit_t", 64)


def test_where_to_get_it_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="curl .*MobileSAM/raw/master/weights/mobile_sam.pt`\\."):
        build_sam("mobile_sam", 64, tmp_path / "no.pt")


def test_origin_is_known_by_the_name():
    teacher = torch.nn.Identity()
    teacher.checkpoint = "models/mobile_sam.pt"
    assert origin(teacher).pretrained_on.startswith("a hundredth of SA-1B")
