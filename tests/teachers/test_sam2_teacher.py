from __future__ import annotations

import json
import re
import socket

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.teachers import Sam2Teacher, SAMTeacher
from knowsam_monai.teachers.adapter import Adapter
from knowsam_monai.teachers.sam2_model import SAM2_VARIANTS, build_sam2
from knowsam_monai.teachers.sam2_teacher import MEAN, STD
from tests.teachers.sam2_toys import DIM, meta_state, toy_config, toy_model

transformers = pytest.importorskip("transformers", reason="SAM 2 needs the extra `sam2`")
safetensors = pytest.importorskip("safetensors.torch")


def toy_teacher(num_classes=3, image_size=64, **options):
    torch.manual_seed(0)
    return Sam2Teacher(num_classes, image_size, toy_config(), **options)


@pytest.fixture
def folder(tmp_path):
    """A small SAM 2 as the hub stores it."""
    toy_model().save_pretrained(tmp_path / "sam2-toy")
    return tmp_path / "sam2-toy"


def pixels(image):
    return (image.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class PaddingPoints(nn.Module):
    """The prompt that Sam2Model takes where it is given none: two points that are no points."""

    def __init__(self, embedding, num_classes):
        super().__init__()
        self.embedding, self.num_classes = embedding, num_classes

    def forward(self, image_embedding):
        return self.embedding.weight.expand(len(image_embedding), self.num_classes, 2, -1)


def test_with_adapters_at_zero_it_is_upstreams_whole_forward_image_by_image(folder):
    """Image encoder, no-memory embedding, high-resolution features, object-score token, mask prompt, decoder."""
    upstream = transformers.Sam2Model.from_pretrained(folder, local_files_only=True).eval()
    upstream.mask_decoder.dynamic_multimask_via_stability = False
    teacher = toy_teacher(checkpoint=folder)
    teacher.prompt = PaddingPoints(upstream.prompt_encoder.not_a_point_embed, 3)
    torch.manual_seed(1)
    image, prompts = torch.rand(2, 1, 64, 64), torch.randn(2, 3, 64, 64) * 4
    with torch.no_grad():
        got = teacher(image, prompts)
        for i in range(2):
            for c in range(3):
                mask = F.interpolate(prompts[i : i + 1, c : c + 1], size=(16, 16), mode="bilinear")
                output = upstream(pixel_values=pixels(image[i : i + 1]), input_masks=mask, multimask_output=False)
                expected = F.interpolate(output.pred_masks[:, 0], size=(64, 64), mode="bilinear")[0, 0]
                assert expected.std() > 0.01
                assert (got[i, c] - expected).abs().max() < 1e-5


def test_learnable_prompts_go_to_upstreams_decoder_as_sparse_prompts(folder):
    upstream = transformers.Sam2Model.from_pretrained(folder, local_files_only=True).eval()
    upstream.mask_decoder.dynamic_multimask_via_stability = False
    teacher = toy_teacher(checkpoint=folder)
    image, prompts = torch.rand(1, 1, 64, 64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got = teacher(image, prompts)
        embeddings = upstream.get_image_embeddings(pixels(image))
        tokens = teacher.prompt(embeddings[-1])
        for c in range(3):
            mask = F.interpolate(prompts[:, c : c + 1], size=(16, 16), mode="bilinear")
            expected = upstream.mask_decoder(
                image_embeddings=embeddings[-1],
                image_positional_embeddings=upstream.get_image_wide_positional_embeddings(),
                sparse_prompt_embeddings=tokens[:, c : c + 1],
                dense_prompt_embeddings=upstream.prompt_encoder.mask_embed(mask),
                multimask_output=False,
                high_resolution_features=embeddings[:-1],
            )[0][:, 0]
            assert (got[:, c : c + 1] - F.interpolate(expected, size=(64, 64), mode="bilinear")).abs().max() < 1e-5


@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("size", [(64, 64), (48, 40), (17, 31)])
@pytest.mark.parametrize("image_size", [64, (64, 96)])
def test_logits_have_the_images_size_and_a_mask_for_each_class(num_classes, size, image_size):
    logits = toy_teacher(num_classes, image_size)(torch.rand(2, 1, *size), torch.randn(2, num_classes, *size))
    assert logits.shape == (2, num_classes, *size)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_a_teacher_in_double_precision_and_under_autocast():
    image, prompts = torch.rand(1, 1, 64, 64), torch.randn(1, 3, 64, 64)
    teacher = toy_teacher()
    with torch.no_grad():
        single = teacher(image, prompts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = teacher(image, prompts)
        double = teacher.double()(image.double(), prompts.double())
    assert half.dtype == torch.float32 and (half - single).abs().max() < 0.1 * single.abs().max()
    assert double.dtype == torch.float64 and (double - single).abs().max() < 1e-4


def trainable(teacher):
    return {name for name, parameter in teacher.named_parameters() if parameter.requires_grad}


def of_adapters(teacher):
    adapters = {name for name, module in teacher.named_modules() if isinstance(module, Adapter)}
    return {name for name, _ in teacher.named_parameters() if name.rsplit(".", 2)[0] in adapters}


@pytest.mark.parametrize("encoder", ["adapted", "cached"])
def test_adapters_and_prompts_alone_learn_from_the_sam_loss(encoder):
    teacher = toy_teacher(encoder=encoder)
    for module in teacher.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.up.weight, std=0.1)
    student = nn.Conv2d(1, 3, 3, padding=1)
    optimizer = torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], lr=1e-3)
    distiller = SAMDistiller(teacher, optimizer, gate="none")
    image, label = torch.rand(2, 1, 64, 64), torch.randint(3, (1, 1, 64, 64))
    result = distiller(image, student(image), label)
    result.sam_loss.backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    learning = {name for name, parameter in teacher.named_parameters() if parameter.grad is not None}
    expected = of_adapters(teacher) | {f"prompt.{name}" for name, _ in teacher.prompt.named_parameters()}
    assert learning == trainable(teacher) == expected
    in_encoder = {name for name in expected if name.startswith("sam.vision_encoder")}
    assert bool(in_encoder) == (encoder == "adapted")


def test_a_whole_teacher_trains_what_its_forward_uses():
    teacher = toy_teacher(trainable="all")
    teacher(torch.rand(1, 1, 64, 64), torch.randn(1, 3, 64, 64)).square().mean().backward()
    learning = {name for name, parameter in teacher.named_parameters() if parameter.grad is not None}
    assert learning == trainable(teacher)
    frozen = {name for name, _ in teacher.named_parameters()} - learning
    assert all(re.search("point_embed|no_mask_embed|iou_pred|obj_score_head|mlps.[123]", name) for name in frozen)
    assert "sam.no_memory_embedding" in learning and "sam.mask_decoder.conv_s0.weight" in learning


def test_every_attention_and_mlp_of_encoder_and_decoder_has_an_adapter():
    adapters = [module for module in toy_teacher().modules() if isinstance(module, Adapter)]
    assert len(adapters) == 5 * 2 + 2 * 4 + 1


def test_a_cached_encoder_encodes_an_image_once_and_keeps_the_high_resolution_features(tmp_path):
    teacher = toy_teacher(encoder="cached", cache_dir=tmp_path, cache_dtype=torch.float32)
    image, prompts = torch.rand(2, 1, 64, 64), torch.randn(2, 3, 64, 64)
    first = teacher(image, prompts)
    assert len(teacher.cache) == 2
    teacher.sam.vision_encoder.forward = None  # not asked again
    assert torch.equal(teacher(image, prompts), first)
    plain = toy_teacher()
    plain.prompt = teacher.prompt
    assert (plain(image, prompts) - first).abs().max() < 1e-5


def test_the_cache_is_another_when_the_high_resolution_projections_change():
    teacher = toy_teacher(encoder="cached")
    image = torch.rand(1, 1, 64, 64)
    before = teacher.encode(image)
    with torch.no_grad():
        teacher.sam.mask_decoder.conv_s1.weight.add_(1)
    assert not torch.equal(teacher.encode(image), before)


def test_a_folder_of_embeddings_belongs_to_the_windows_of_its_encoder_too(tmp_path):
    """Two configs whose tensors have the same shapes."""
    toy_teacher(encoder="cached", cache_dir=tmp_path)
    config = toy_config()
    config.vision_config.backbone_config.global_attention_blocks = []
    with pytest.raises(ValueError, match="`cache_dir` must"):
        Sam2Teacher(3, 64, config, encoder="cached", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "huge"}, "`variant` must be one of tiny, small, base_plus, large but is 'huge'"),
        ({"variant": "vit_b"}, "`variant` must be one of tiny, small, base_plus, large but is 'vit_b'."),
        ({"variant": ["tiny"]}, "`variant` must be one of tiny, small, base_plus, large but is ['tiny']."),
        ({"variant": "hiera_b+"}, "but is 'hiera_b+'; did you mean 'base_plus'?"),
        ({"cache_dir": "cache"}, "`cache_dir` must be left out unless `encoder` is 'cached' but is 'cache'"),
        ({"image_size": 48}, "`image_size` must be a positive multiple of 32"),
        ({"image_size": (64, 64, 64)}, "`image_size` must be a positive multiple of 32"),
        ({"trainable": "some"}, "`trainable` must be 'adapters' or 'all'"),
        ({"to_rgb": "gray"}, "`to_rgb` must be a channel index, 'mean', 'rgb' or a callable"),
        ({"encoder": "frozen"}, "`encoder` must be 'adapted' or 'cached'"),
        ({"encoder": "cached", "image_size": (64, 96)}, "`image_size` must be square for the encoder 'cached'"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_built(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sam2Teacher(num_classes=3, **options)


def test_a_teacher_that_knows_nothing_is_warned_of(caplog, folder):
    toy_teacher()
    assert "SAM 2 custom config has no pretrained weights" in caplog.text
    caplog.clear()
    assert toy_teacher(checkpoint=folder).pretrained
    toy_teacher(trainable="all")
    assert "learns nothing useful" not in caplog.text


@pytest.mark.parametrize("variant", SAM2_VARIANTS)
def test_the_published_sizes_are_metas(variant):
    """Parameters of the image model: the README's 38.9, 46, 80.8 and 224.4 M less 7.47 M for the memory of videos."""
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in build_sam2(variant).parameters())
    published = {"tiny": 38.9, "small": 46, "base_plus": 80.8, "large": 224.4}[variant]
    assert published - num_parameters / 1e6 == pytest.approx(7.47, abs=0.05)


# files


def test_a_folder_of_the_hub_loads_every_tensor(folder, caplog):
    caplog.set_level("INFO")
    loaded, model = build_sam2(toy_config(), folder).state_dict(), toy_model().state_dict()
    assert set(loaded) == set(model) and all(torch.equal(loaded[name], model[name]) for name in model)
    assert f"all {len(model)} tensors loaded from {folder}" in caplog.text


def test_no_hub_is_asked(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("something connects")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    build_sam2(toy_config(), folder)
    with pytest.raises(FileNotFoundError, match="facebook/sam2.1-hiera-tiny does not exist; it is not downloaded"):
        build_sam2("tiny", "facebook/sam2.1-hiera-tiny")


def test_a_video_models_folder_loads_without_its_memory(folder):
    """The hub's own folders are of Sam2VideoModel, and some hold the matrix of positions once."""
    state = safetensors.load_file(folder / "model.safetensors")
    state.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    for name in ("memory_attention.layer_norm.weight", "object_pointer_proj.proj_in.weight", "no_object_pointer"):
        state[name] = torch.zeros(4)
    state["memory_temporal_positional_encoding"] = torch.zeros(7, 1, 1, 4)
    safetensors.save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sam2_video"}))
    loaded = build_sam2(toy_config(), folder)
    assert torch.equal(
        loaded.prompt_encoder.shared_embedding.positional_embedding, loaded.shared_image_embedding.positional_embedding
    )


def test_metas_file_loads_tensor_for_tensor(tmp_path):
    state = meta_state()
    torch.save({"model": state}, tmp_path / "sam2.1_hiera_toy.pt")
    loaded = build_sam2(toy_config(), tmp_path / "sam2.1_hiera_toy.pt").state_dict()
    pairs = {
        "image_encoder.trunk.blocks.2.mlp.layers.1.bias": "vision_encoder.backbone.blocks.2.mlp.proj_out.bias",
        "image_encoder.trunk.blocks.1.proj.weight": "vision_encoder.backbone.blocks.1.proj.weight",
        "image_encoder.trunk.blocks.4.norm2.weight": "vision_encoder.backbone.blocks.4.layer_norm2.weight",
        "image_encoder.neck.convs.3.conv.weight": "vision_encoder.neck.convs.3.weight",
        "sam_prompt_encoder.point_embeddings.2.weight": "prompt_encoder.point_embed.weight",
        "sam_prompt_encoder.mask_downscaling.4.bias": "prompt_encoder.mask_embed.layer_norm2.bias",
        "sam_prompt_encoder.mask_downscaling.6.weight": "prompt_encoder.mask_embed.conv3.weight",
        "sam_mask_decoder.transformer.layers.1.norm4.weight": "mask_decoder.transformer.layers.1.layer_norm4.weight",
        "sam_mask_decoder.transformer.layers.0.self_attn.out_proj.bias": (
            "mask_decoder.transformer.layers.0.self_attn.o_proj.bias"
        ),
        "sam_mask_decoder.transformer.norm_final_attn.bias": "mask_decoder.transformer.layer_norm_final_attn.bias",
        "sam_mask_decoder.output_hypernetworks_mlps.2.layers.1.weight": (
            "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight"
        ),
        "sam_mask_decoder.output_hypernetworks_mlps.2.layers.0.weight": (
            "mask_decoder.output_hypernetworks_mlps.2.proj_in.weight"
        ),
        "sam_mask_decoder.output_upscaling.3.weight": "mask_decoder.upscale_conv2.weight",
        "no_mem_embed": "no_memory_embedding",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (
            "shared_image_embedding.positional_embedding"
        ),
    }
    for meta, ours in pairs.items():
        expected = loaded[ours][2:3] if "point_embeddings" in meta else loaded[ours]
        assert torch.equal(state[meta], expected), meta
    used = [name for name in state if not name.startswith(("mask_down", "memory_", "maskmem", "no_obj", "obj_ptr"))]
    assert len(used) - 1 - 3 + 1 == len(loaded)  # less a position of memory, four points are one, one matrix is two


def test_a_file_of_several_gpus_and_of_half_precision_is_accepted_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    state = {f"module.{name}": value.half() for name, value in meta_state().items()}
    torch.save({"model": state}, tmp_path / "checkpoint.pt")
    loaded = build_sam2(toy_config(), tmp_path / "checkpoint.pt")
    assert loaded.no_memory_embedding.dtype == torch.float32
    assert "checkpoint.pt was saved from several GPUs" in caplog.text
    assert "checkpoint.pt holds torch.float16, which is converted to float32" in caplog.text


def encoder_names(dim, num_blocks):
    blocks = {f"image_encoder.trunk.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(num_blocks)}
    return blocks | {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(dim, 3, 7, 7)}


@pytest.mark.parametrize(
    ("state", "variant", "message"),
    [
        (encoder_names(96, 12), "base_plus", "holds a tiny; set `variant` to 'tiny' or use a file of base_plus"),
        (encoder_names(144, 48), "tiny", "holds a large; set `variant` to 'large' or use a file of tiny"),
        (encoder_names(96, 16), "tiny", "holds a small; set `variant` to 'small'"),
        (encoder_names(96, 12), "tiny", "holds another model (lacks `"),
        (
            {"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)},
            "tiny",
            "SAM 1, for SAMTeacher (in the bundles: without the overlay teacher_sam2.json) with `variant` 'vit_b'",
        ),
        (
            {"vision_encoder.patch_embed.projection.weight": torch.zeros(768, 3, 16, 16)},
            "tiny",
            "holds SAM 1 in the format of `transformers`; SAMTeacher reads Meta's .pth",
        ),
        (
            {"mask_decoder.hf_token.weight": torch.zeros(1, 256)},
            "tiny",
            "holds HQ-SAM, which has additional decoder layers",
        ),
        (
            {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)},
            "tiny",
            "teacher_sam2.json) with `variant` 'mobile_sam'",
        ),
        ({"conv.weight": torch.zeros(1)}, "tiny", "holds another model (its tensors are `conv.weight`)"),
        ({"trunk.blocks.0.attn.qkv.lora_A.weight": torch.zeros(1)}, "tiny", "holds a LoRA or the like, changes"),
        ({"blocks.0.hada_w1_a": torch.zeros(1)}, "tiny", "holds a LoRA or the like, changes"),
        (
            {"image_encoder.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)},
            "tiny",
            "holds a SAM of another width, 384 channels, which is not supported; use a file of SAM 2 tiny",
        ),
        ({"epoch": 3}, "tiny", "holds a dict of `epoch`; save the model's plain `state_dict()`"),
        ({}, "tiny", "holds a dict of nothing"),
        ([1], "tiny", "holds a list; save"),
    ],
)
def test_another_models_file_is_named_with_the_right_variant(tmp_path, state, variant, message):
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build_sam2(variant, path)
    assert f"`checkpoint` must hold the weights of a SAM 2 {variant} but {path} holds" in str(error.value)
    assert "\n" not in str(error.value)


def test_hq_sam2s_file_has_no_place(tmp_path):
    state = meta_state() | {"sam_mask_decoder.hf_token.weight": torch.zeros(1, DIM)}
    torch.save(state, tmp_path / "sam2.1_hq.pt")
    with pytest.raises(ValueError, match="holds HQ-SAM 2, which has additional decoder layers"):
        build_sam2(toy_config(), tmp_path / "sam2.1_hq.pt")


def test_sam2_given_to_sam1_is_named(tmp_path):
    torch.save({"model": encoder_names(96, 12)}, tmp_path / "sam2.1_hiera_tiny.pt")
    with pytest.raises(
        ValueError, match=r"tiny.pt holds SAM 2, for Sam2Teacher \(in the bundles: the overlay teacher_sam2.json\)"
    ):
        SAMTeacher(num_classes=2, checkpoint=tmp_path / "sam2.1_hiera_tiny.pt")
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)}, tmp_path / "mobile_sam.pt")
    with pytest.raises(ValueError, match="mobile_sam.pt holds a mobile_sam; set `variant` to 'mobile_sam'"):
        SAMTeacher(num_classes=2, checkpoint=tmp_path / "mobile_sam.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_torn_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=f"{name} .*(truncated|not a checkpoint|not a safetensors file)"):
        build_sam2("tiny", tmp_path / name)


def test_a_folder_of_another_variant_or_model_is_named(tmp_path, folder):
    backbone = transformers.Sam2HieraDetConfig(blocks_per_stage=[1, 2, 11, 2], global_attention_blocks=[7, 10, 13])
    vision = transformers.Sam2VisionConfig(backbone_config=backbone)
    transformers.Sam2Config(vision_config=vision).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"blocks_per_stage \[1, 2, 11, 2\] instead of .*set `variant` to 'small'"):
        build_sam2("tiny", tmp_path / "small")
    with pytest.raises(FileNotFoundError, match="small has no model.safetensors; download the complete folder"):
        build_sam2("small", tmp_path / "small")
    with pytest.raises(ValueError, match="embed_dim_per_stage .*pass its Sam2Config as `variant`"):
        build_sam2("tiny", folder)
    backbone = transformers.Sam2HieraDetConfig(window_size_per_stage=[8, 4, 7, 7])  # else a tiny
    vision = transformers.Sam2VisionConfig(backbone_config=backbone)
    transformers.Sam2Config(vision_config=vision).save_pretrained(tmp_path / "windows")
    with pytest.raises(ValueError, match=r"window_size_per_stage \[8, 4, 7, 7\] .*pass its Sam2Config as `variant`"):
        build_sam2("tiny", tmp_path / "windows")
    transformers.SamConfig().save_pretrained(tmp_path / "sam1")
    with pytest.raises(ValueError, match="holds a 'sam'; use SAMTeacher .* and Meta's .pth for SAM 1"):
        build_sam2("tiny", tmp_path / "sam1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no config.json"):
        build_sam2("tiny", tmp_path / "empty")
    (tmp_path / "empty" / "sam2.1_hiera_tiny.pt").touch()
    with pytest.raises(ValueError, match="without config.json but with `sam2.1_hiera_tiny.pt`; name that file"):
        build_sam2("tiny", tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        *("[", "[]", '{"model_type": "sam2", "vision_config": [1]}'),
        '{"model_type": "sam2", "vision_config": {"backbone_config": "x"}}',
        '{"model_type": "sam2", "vision_config": {"backbone_config": {"blocks_per_stage": 7}}}',
    ],
)
def test_damaged_config_of_the_hub_is_one_sentence(tmp_path, content):
    toy_config().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        build_sam2(toy_config(), tmp_path)
    assert str(error.value).endswith(f"but {tmp_path} has a damaged config.json; download it again.")


@pytest.mark.parametrize("teacher", [SAMTeacher, Sam2Teacher])
def test_folder_of_peft_is_named(tmp_path, teacher):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"but {tmp_path} holds a LoRA or the like, .*; merge it"):
        teacher(num_classes=2, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (lambda x: (x * 100).to(torch.int8), "tensors of torch.int8, quantized"),
        (lambda x: x.to(torch.float8_e4m3fn), "tensors of torch.float8_e4m3fn, quantized"),
        (lambda x: x.to(torch.complex64), "tensors of torch.complex64, quantized or of another unsupported type"),
        (lambda x: x.to_sparse(), "tensors of torch.sparse_coo, quantized"),
        (lambda x: x.to(torch.int64), "holds another model (has whole numbers in `"),
    ],
)
def test_tensors_that_would_load_wrongly_are_refused(tmp_path, convert, found):
    torch.save({name: convert(value) for name, value in meta_state().items()}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=re.escape(found)):
        build_sam2(toy_config(), tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model_state_dict": state},
        lambda state: {name: value.double() for name, value in state.items()},
    ],
)
def test_files_of_trainers_and_of_double_precision_are_accepted_and_noted(tmp_path, caplog, wrap):
    caplog.set_level("INFO")
    state = meta_state()
    torch.save(wrap(state), tmp_path / "wrapped.pt")
    loaded = build_sam2(toy_config(), tmp_path / "wrapped.pt")
    assert torch.equal(loaded.no_memory_embedding, state["no_mem_embed"])
    assert "tensors loaded from" in caplog.text
    if wrap(state).keys() == state.keys():
        assert "holds torch.float64, which is converted to float32." in caplog.text


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("", ValueError, "`checkpoint` must be a path or None but is ''"),
        (3, TypeError, "`checkpoint` must be a path or None but is 3"),
        ("m/sam2.1.pt", FileNotFoundError, "--output m/sam2.1.pt https://dl.fbaipublicfiles.com/segment_anything_2/"),
        ("m/MedSAM2_latest.pt", FileNotFoundError, "`hf download wanglab/MedSAM2 MedSAM2_latest.pt --local-dir m`"),
        ("m/tiny", FileNotFoundError, "`hf download facebook/sam2.1-hiera-tiny --local-dir m/tiny`"),
    ],
)
def test_checkpoint_that_is_missing_is_named_with_its_command(checkpoint, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Sam2Teacher(num_classes=2, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("name", "pretrained_on", "license"),
    [
        ("sam2.1_hiera_toy.pt", "SA-1B, SA-V", "Apache-2.0"),
        ("MedSAM2_latest.pt", "public medical sets and videos", "CC-BY-SA-4.0"),
        ("my_weights.pt", None, None),
    ],
)
def test_what_the_weights_were_trained_on_is_known_by_their_name(tmp_path, name, pretrained_on, license):
    torch.save(meta_state(), tmp_path / name)
    teacher = toy_teacher(checkpoint=tmp_path / name)
    assert teacher.license == license
    assert teacher.pretrained_on is None if pretrained_on is None else pretrained_on in teacher.pretrained_on
    assert toy_teacher(checkpoint=tmp_path / name, pretrained_on="our scans").pretrained_on == "our scans"
