from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor

from knowsam_monai.teachers.adapter import Adapter
from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_decoder import dense_positions
from knowsam_monai.teachers.sam_teacher import SAMTeacher
from tests.networks.sam_toys import randomized


def toy_teacher(num_classes=3, image_size=32, **kwargs) -> SAMTeacher:
    torch.manual_seed(0)
    kwargs = {"variant": "stand_in", "trainable": "all"} | kwargs
    return SAMTeacher(num_classes=num_classes, image_size=image_size, **kwargs)


def toy_batch(num_classes=3, size=(32, 32), batch_size=2, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.rand(batch_size, 1, *size, dtype=dtype), torch.randn(batch_size, num_classes, *size, dtype=dtype)


def trained(module: nn.Module) -> nn.Module:
    return randomized(module, std=0.1)


def trainable_names(teacher) -> set[str]:
    return {name for name, parameter in teacher.named_parameters() if parameter.requires_grad}


def names_with_gradient(teacher) -> set[str]:
    return {name for name, parameter in teacher.named_parameters() if parameter.grad is not None}


def adapter_and_prompt_names(teacher) -> set[str]:
    adapters = {
        f"{name}.{layer}.{kind}"
        for name, module in teacher.named_modules()
        if isinstance(module, Adapter)
        for layer in ("down", "up")
        for kind in ("weight", "bias")
    }
    return adapters | {f"prompt.{name}" for name, _ in teacher.prompt.named_parameters()}


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (48, 40), (17, 31)])
def test_logits_have_the_images_size_and_a_mask_for_each_class(num_classes, size):
    logits = toy_teacher(num_classes)(*toy_batch(num_classes, size))
    assert logits.shape == (2, num_classes, *size)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("image_size", [(32, 32), (32, 48)])
def test_equals_segment_anything_image_by_image_and_class_by_class(image_size):
    """The whole way of an image, written down with upstream's own forwards."""
    teacher = trained(toy_teacher(image_size=image_size).double())
    image, prompt_logits = toy_batch(size=(40, 40), dtype=torch.float64)
    logits = teacher(image, prompt_logits)
    sam = teacher.sam
    height, width = sam.prompt_encoder.image_embedding_size
    for i in range(2):
        rgb = F.interpolate(image[i, None].repeat(1, 3, 1, 1), size=image_size, mode="bilinear")
        embedding = sam.image_encoder((rgb * 255 - sam.pixel_mean) / sam.pixel_std)
        tokens = teacher.prompt(embedding)
        for c in range(3):
            mask_prompt = F.interpolate(prompt_logits[i, None, c, None], size=(4 * height, 4 * width), mode="bilinear")
            mask, _ = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=dense_positions(sam.prompt_encoder).T.view(1, -1, height, width),
                sparse_prompt_embeddings=tokens[:, c],
                dense_prompt_embeddings=sam.prompt_encoder(points=None, boxes=None, masks=mask_prompt)[1],
                multimask_output=False,
            )
            expected = F.interpolate(mask, size=(40, 40), mode="bilinear")[0, 0]
            torch.testing.assert_close(logits[i, c], expected, rtol=0, atol=1e-12)


def test_images_are_put_on_sams_scale():
    """Mean and deviation are those of `segment_anything`, on 0..255, and the teacher's image is 0..1."""
    teacher = toy_teacher(to_rgb="rgb")
    seen = []
    teacher.sam.image_encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.encode(torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1).expand(-1, -1, 32, 32) / 255)
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32), rtol=0, atol=1e-5)
    teacher.encode(torch.tensor([182.07, 173.4, 160.905]).view(1, 3, 1, 1).expand(-1, -1, 32, 32) / 255)
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32), rtol=0, atol=1e-5)


def test_rows_with_a_graph_and_rows_without_one_are_the_rows_of_one_call():
    teacher = trained(toy_teacher().double())
    image, prompt_logits = toy_batch(batch_size=4, dtype=torch.float64)
    labeled = teacher(image[:2], prompt_logits[:2])
    with torch.no_grad():
        unlabeled = teacher(image[2:], prompt_logits[2:])
    torch.testing.assert_close(torch.cat((labeled, unlabeled)), teacher(image, prompt_logits), rtol=0, atol=1e-12)


def test_adapters_mode_trains_adapters_and_prompt_head_alone():
    teacher = toy_teacher(trainable="adapters")
    assert trainable_names(teacher) == adapter_and_prompt_names(teacher)
    teacher(*toy_batch()).square().mean().backward()
    assert names_with_gradient(teacher) == trainable_names(teacher)


def test_all_mode_trains_what_the_forward_uses_and_nothing_else():
    teacher = toy_teacher(trainable="all")
    assert trainable_names(teacher) >= adapter_and_prompt_names(teacher)
    unused = {f"sam.prompt_encoder.point_embeddings.{i}.weight" for i in range(4)}
    unused |= {"sam.prompt_encoder.not_a_point_embed.weight", "sam.prompt_encoder.no_mask_embed.weight"}
    for mlp in ("iou_prediction_head", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3))):
        unused |= {f"sam.mask_decoder.{mlp}.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert {name for name, _ in teacher.named_parameters()} - trainable_names(teacher) == unused
    teacher(*toy_batch()).square().mean().backward()
    assert names_with_gradient(teacher) == trainable_names(teacher)


def test_no_graph_is_built_before_the_first_adapter():
    teacher = toy_teacher(trainable="adapters")
    seen = {}
    block = teacher.sam.image_encoder.blocks[0]
    modules = {"patches": teacher.sam.image_encoder.patch_embed, "norm": block.norm1, "qkv": block.attn.attention.qkv}
    modules |= {"proj": block.attn.attention.proj, "adapter": block.attn.adapter}
    for name, module in modules.items():
        module.register_forward_hook(lambda *args, name=name: seen.update({name: args[-1].requires_grad}))
    teacher(*toy_batch())
    assert seen == {"patches": False, "norm": False, "qkv": False, "proj": False, "adapter": True}


def test_the_mask_prompt_of_a_class_is_its_own_channel():
    teacher = trained(toy_teacher())
    image, prompt_logits = toy_batch()
    other = prompt_logits.clone()
    other[:, 1] += torch.randn(32, 32)
    before, after = teacher(image, prompt_logits), teacher(image, other)
    assert torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 2], after[:, 2])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_a_kept_embedding_decodes_to_the_same_logits():
    teacher = trained(toy_teacher())
    image, prompt_logits = toy_batch(size=(40, 24))
    embedding = teacher.encode(image)
    assert embedding.shape == (2, 128, 4, 4)
    assert torch.equal(teacher.decode(embedding, prompt_logits), teacher(image, prompt_logits))
    assert teacher.decode(embedding, prompt_logits, size=(10, 12)).shape == (2, 3, 10, 12)


@pytest.mark.parametrize(
    ("to_rgb", "channels", "expected"),
    [
        (0, 2, lambda image: image[:, [0, 0, 0]]),
        (1, 2, lambda image: image[:, [1, 1, 1]]),
        (-1, 2, lambda image: image[:, [1, 1, 1]]),
        ("mean", 4, lambda image: image.mean(1, keepdim=True).repeat(1, 3, 1, 1)),
        ("rgb", 3, lambda image: image),
        (lambda image: 1 - image.repeat(1, 3, 1, 1), 1, lambda image: 1 - image[:, [0, 0, 0]]),
    ],
)
def test_an_image_becomes_three_channels(to_rgb, channels, expected):
    teacher = toy_teacher(to_rgb=to_rgb)
    image = torch.rand(2, channels, 32, 32)
    as_rgb = toy_teacher(to_rgb="rgb")
    torch.testing.assert_close(teacher.encode(image), as_rgb.encode(expected(image)))


@pytest.mark.parametrize(
    ("to_rgb", "channels", "words"),
    [
        (1, 1, "`to_rgb` must be the index of one of the image's 1 channels but is 1"),
        ("rgb", 1, r"`to_rgb` must turn \(2, 1, 32, 32\) into three channels but 'rgb' returns \(2, 1, 32, 32\)"),
        (lambda image: image, 2, r"`to_rgb` must turn \(2, 2, 32, 32\) into three channels"),
    ],
)
def test_an_image_that_cannot_become_three_channels_is_an_error(to_rgb, channels, words):
    with pytest.raises(ValueError, match=words):
        toy_teacher(to_rgb=to_rgb).encode(torch.rand(2, channels, 32, 32))


@pytest.mark.parametrize(
    ("options", "channels", "num_warnings"), [({}, 3, 1), ({}, 5, 1), ({}, 1, 0), ({"to_rgb": 0}, 3, 0)]
)
def test_channels_that_sam_does_not_see_are_warned_of_once_unless_one_was_chosen(
    options, channels, num_warnings, caplog
):
    teacher = toy_teacher(**options)
    image = torch.rand(2, channels, 32, 32)
    for _ in range(2):
        torch.testing.assert_close(teacher.encode(image), toy_teacher(to_rgb=0).encode(image))
    lines = [line for line in caplog.messages if f"SAM sees only the first of the image's {channels} channels" in line]
    assert len(lines) == num_warnings and all("set `to_rgb` to 'rgb' for color images, to 'mean'" in x for x in lines)


def test_teacher_and_all_its_parts_stay_in_eval_mode():
    assert not any(module.training for module in SAMTeacher(2, image_size=32, variant="stand_in").train().modules())


def test_metatensors_come_out_as_plain_tensors():
    teacher = toy_teacher()
    image, prompt_logits = toy_batch()
    logits = teacher(MetaTensor(image), MetaTensor(prompt_logits))
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, teacher(image, prompt_logits))


def test_under_bf16_autocast_logits_are_float32_and_near():
    teacher = trained(toy_teacher())
    image, prompt_logits = toy_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = teacher(image, prompt_logits.bfloat16())
        low.mean().backward()
    assert low.dtype == torch.float32
    assert F.cosine_similarity(low.flatten(), teacher(image, prompt_logits).flatten(), dim=0) > 0.98
    assert names_with_gradient(teacher) == trainable_names(teacher)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 3, 16, 32), (1, 3, 32, 32)])
def test_prompts_that_do_not_fit_the_image_or_the_classes_are_an_error(shape):
    with pytest.raises(ValueError, match=r"`prompt_logits` must have shape \(2, 3, 32, 32\).* but have shape"):
        toy_teacher()(torch.rand(2, 1, 32, 32), torch.zeros(shape))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"trainable": "everything"}, "`trainable` must be 'adapters' or 'all' but is 'everything'"),
        ({"to_rgb": "gray"}, "`to_rgb` must be a channel index, 'mean', 'rgb' or a callable but is 'gray'"),
        ({"num_classes": 0}, "`num_classes` must be at least 1 but is 0"),
        ({"num_classes": "3"}, "`num_classes` must be a whole number but is '3'"),
        ({"num_classes": True}, "`num_classes` must be a whole number but is True"),
        ({"num_prompt_tokens": 1.5}, "`num_prompt_tokens` must be a whole number but is 1.5"),
        ({"cache_dir": "cache"}, "`cache_dir` must be left out unless `encoder` is 'cached' but is 'cache'"),
        ({"image_size": 100}, "`image_size` must be a positive multiple of 16"),
    ],
)
def test_a_wrong_argument_is_an_error(kwargs, words):
    with pytest.raises((TypeError, ValueError), match=words):
        toy_teacher(**kwargs)


def test_it_tells_where_its_weights_are_from(tmp_path):
    path = tmp_path / "stand_in.pt"
    torch.save(randomized(build_sam("stand_in", 64)).state_dict(), path)
    teacher = toy_teacher(checkpoint=path, trainable="adapters")
    assert teacher.pretrained and teacher.checkpoint == str(path)
    assert not toy_teacher().pretrained and toy_teacher().checkpoint is None
    assert toy_teacher(checkpoint=path, pretrained_on="our scans").pretrained_on == "our scans"


@pytest.mark.parametrize(
    ("trainable", "encoder", "frozen"),
    [
        ("adapters", "adapted", "weights, except its adapters, are"),
        ("all", "cached", "image encoder is"),
        ("all", "adapted", None),
    ],
)
def test_a_frozen_sam_without_weights_is_warned_of(trainable, encoder, frozen, caplog):
    with caplog.at_level(logging.WARNING):
        toy_teacher(trainable=trainable, encoder=encoder)
    warned = [f"has no pretrained weights but its {frozen} frozen" in message for message in caplog.messages]
    assert warned == [True] * (frozen is not None)


# --- cached embeddings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("sam") / "stand_in.pt"
    torch.save(build_sam("stand_in", 32).state_dict(), path)
    return path


def cached_teacher(weights, **kwargs) -> SAMTeacher:
    kwargs = {"trainable": "adapters", "encoder": "cached", "cache_dtype": torch.float32} | kwargs
    return toy_teacher(checkpoint=weights, **kwargs)


def uncached_logits(teacher, image, prompt_logits):
    """Encoded in one batch by the frozen encoder, nothing looked up."""
    return teacher.decode(teacher._encode(image.expand(-1, 3, -1, -1)), prompt_logits)


def test_cached_encoder_trains_decoder_adapters_and_prompt_head_alone(weights):
    names = trainable_names(cached_teacher(weights, trainable="all"))
    assert not [name for name in names if name.startswith("sam.image_encoder")]
    teacher = trained_adapters(cached_teacher(weights))
    expected = adapter_and_prompt_names(teacher)
    assert not [name for name in expected if name.startswith("sam.image_encoder")]
    assert not [m for m in teacher.sam.image_encoder.modules() if isinstance(m, Adapter)]
    assert trainable_names(teacher) == expected
    teacher(*toy_batch()).square().mean().backward()
    assert names_with_gradient(teacher) == expected


def trained_adapters(teacher):
    torch.manual_seed(3)
    for module in teacher.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.up.weight, std=0.02)
    return teacher


def test_logits_from_the_cache_equal_those_of_the_frozen_encoder(weights):
    teacher = trained_adapters(cached_teacher(weights))
    image, prompt_logits = toy_batch(batch_size=4)
    expected = uncached_logits(teacher, image, prompt_logits)
    for _ in range(2):  # filling, then looking up
        torch.testing.assert_close(teacher(image, prompt_logits), expected, rtol=0, atol=1e-6)
    assert len(teacher.cache) == 4


def test_cached_encoder_gets_images_of_its_own_size(weights):
    image, prompt_logits = toy_batch(size=(16, 16))
    cached, plain = cached_teacher(weights), toy_teacher(checkpoint=weights, trainable="adapters")
    torch.testing.assert_close(cached.encode(image), plain.encode(image), rtol=0, atol=1e-5)
    assert cached(image, prompt_logits).shape[2:] == (16, 16)


def test_cached_teacher_begins_as_the_one_with_adapters_in_the_encoder(weights):
    """Adapters begin as nothing: both are SAM, with the same prompt head."""
    teacher, adapted = cached_teacher(weights), toy_teacher(checkpoint=weights, trainable="adapters")
    adapted.prompt.load_state_dict(teacher.prompt.state_dict())
    torch.testing.assert_close(teacher(*toy_batch()), adapted(*toy_batch()), rtol=0, atol=1e-6)


def test_half_precision_cache_moves_the_logits_by_thousandths(weights):
    """float16 keeps 11 bits of an embedding; measured here: the largest change of a logit is 1.1e-3 of their spread."""
    teacher = trained_adapters(cached_teacher(weights, cache_dtype=torch.float16))
    image, prompt_logits = toy_batch(batch_size=4)
    expected = uncached_logits(teacher, image, prompt_logits)
    found = teacher(image, prompt_logits)
    assert not torch.equal(found, expected)
    error = ((found - expected).abs().max() / expected.std()).item()
    assert error < 2e-3


def test_folder_of_embeddings_serves_the_next_teacher_and_no_other(weights, tmp_path):
    image, prompt_logits = toy_batch()
    teacher = cached_teacher(weights, cache_dir=tmp_path)
    teacher(image, prompt_logits)
    other = cached_teacher(weights, cache_dir=tmp_path)
    other._encode = lambda rgb: pytest.fail("it was encoded again")
    other.prompt.load_state_dict(teacher.prompt.state_dict())
    assert torch.equal(other(image, prompt_logits), teacher(image, prompt_logits))
    with pytest.raises(ValueError, match="`cache_dir` must hold the embeddings of this encoder"):
        toy_teacher(encoder="cached", cache_dir=tmp_path)


def test_a_state_that_is_loaded_is_the_encoder_that_is_looked_up(weights):
    image, prompt_logits = toy_batch()
    teacher = cached_teacher(weights)
    before = teacher(image, prompt_logits)
    trained(teacher.sam.image_encoder)
    expected = uncached_logits(teacher, image, prompt_logits)
    torch.testing.assert_close(teacher(image, prompt_logits), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-4)


def test_cached_encoder_of_unequal_sides_is_an_error(weights):
    with pytest.raises(ValueError, match="`image_size` must be square for the encoder 'cached'"):
        toy_teacher(encoder="cached", image_size=(32, 48))
    with pytest.raises(ValueError, match="`image` must be square for the encoder 'cached'"):
        cached_teacher(weights)(*toy_batch(size=(32, 24)))
    with pytest.raises(ValueError, match="`encoder` must be 'adapted' or 'cached' but is 'frozen'"):
        toy_teacher(encoder="frozen")


@pytest.mark.parametrize(
    ("low", "high", "is_warned"),
    [(0, 1, False), (-0.4, 1.5, False), (-1, 1, True), (-0.9, 1.9, True), (0, 255, True), (-1000, 1200, True)],
)
def test_images_far_out_of_range_are_warned_of_once(caplog, low, high, is_warned):
    teacher = toy_teacher()
    image, logits = toy_batch()
    for _ in range(2):
        teacher(low + (high - low) * (image - image.min()) / (image.max() - image.min()), logits)
    said = [message for message in caplog.messages if "SAM expects images in 0..1" in message]
    assert len(said) == is_warned and all(f"IntensityWindow({low:.3g}, {high:.3g})" in message for message in said)


def test_blank_image_tells_nothing_of_the_range(caplog):
    teacher, image = toy_teacher(), toy_batch()[0]
    teacher.encode(torch.full_like(image, 0.5))
    teacher.encode(torch.full_like(image, 300.0))
    assert not caplog.messages
    teacher.encode(1000 * image)
    assert ["SAM expects images in 0..1" in message for message in caplog.messages] == [True]
