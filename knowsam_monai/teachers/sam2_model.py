"""SAM 2 of `transformers`: variants, and strict loading of published weights from a local path."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMImportError, KnowSAMValueError, root_cause
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.sam_checkpoint import SAM1_TEACHER, which_model
from knowsam_monai.teachers.weights import (
    PREFIXES,
    TRAINERS_PREFIXES,
    checkpoint_path,
    load_strictly,
    read_state_dict,
    refuse_changes,
)
from knowsam_monai.texts import some

logger = logging.getLogger(__name__)

# the image encoders (Hiera) of Meta's configs sam2.1_hiera_{t,s,b+,l}.yaml, under the names in transformers
SAM2_VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim_per_stage": [96, 192, 384, 768],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 7, 2],
        "global_attention_blocks": [5, 7, 9],
        "window_size_per_stage": [8, 4, 14, 7],
        "window_positional_embedding_background_size": [7, 7],
    },
    "small": {
        "embed_dim_per_stage": [96, 192, 384, 768],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 11, 2],
        "global_attention_blocks": [7, 10, 13],
        "window_size_per_stage": [8, 4, 14, 7],
        "window_positional_embedding_background_size": [7, 7],
    },
    "base_plus": {
        "embed_dim_per_stage": [112, 224, 448, 896],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_size_per_stage": [8, 4, 14, 7],
        "window_positional_embedding_background_size": [14, 14],
    },
    "large": {
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
        "window_positional_embedding_background_size": [7, 7],
    },
}
SIZE_DIVISOR = 32  # the coarsest stage has stride 32; windows of 8 tokens of stride 4 tile the finest stage

PATCH_PROJECTION = "vision_encoder.backbone.patch_embed.projection.weight"
POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

# memory of video frames, unused for single images: Meta's names, then those of transformers
VIDEO_MEMORY = re.compile(
    r"^(memory_attention|memory_encoder|mask_downsample|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
    r"|obj_ptr_proj|obj_ptr_tpos_proj|memory_temporal_positional_encoding|no_memory_positional_encoding"
    r"|no_object_pointer|occlusion_spatial_embedding_parameter|object_pointer_proj"
    r"|temporal_positional_encoding_projection_layer)(\.|$)"
)
# from Meta's tensor names to those of transformers; rules apply in order
META_TO_TRANSFORMERS = [
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.1\.", r"\1.layers.0."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
]


@kept_random_state()
def build_sam2(variant: str | Any = "tiny", checkpoint: str | os.PathLike[str] | None = None) -> nn.Module:
    """
    Build `transformers`' Sam2Model and load published weights strictly. Nothing is downloaded.

    Args:
        variant: "tiny", "small", "base_plus" or "large", or a `transformers.Sam2Config` of your own.
        checkpoint: a folder in the hub's format (`config.json`, `model.safetensors`) or a file in Meta's (.pt), of SAM
            2, SAM 2.1 or MedSAM2. Weights for the memory of video frames are ignored. None: random weights.

    Returns:
        The Sam2Model, in eval mode.

    Raises:
        ValueError: if the variant is unknown, or if the checkpoint is damaged or belongs to another model.
        FileNotFoundError: if the checkpoint is missing.
        ImportError: if `transformers` is not installed.

    Example::

        sam2 = build_sam2("tiny", "models/sam2.1_hiera_tiny.pt")

    Reference:
        Ravi et al., SAM 2: Segment Anything in Images and Videos, arXiv:2408.00714.
    """
    transformers = import_transformers()
    if not isinstance(variant, transformers.Sam2Config) and variant not in list(SAM2_VARIANTS):
        raise KnowSAMValueError(
            f"`variant` must be one of {', '.join(SAM2_VARIANTS)} but is {variant!r}"
            f"{sam2_variant_hint(variant) or '.'}"
        )
    config = _config(transformers, variant) if isinstance(variant, str) else variant
    state = None if checkpoint is None else read_sam2_checkpoint(checkpoint, variant, config)
    sam2 = transformers.Sam2Model(config)
    # always the first mask, as upstream does in training: the others do not learn
    sam2.mask_decoder.dynamic_multimask_via_stability = False
    if state is not None:
        expectation = _expectation(checkpoint, variant)
        load_strictly(sam2, state, expectation, "use a file as published by Meta, MedSAM2 or on the hub")
        logger.info("SAM 2 %s: all %d tensors loaded from %s.", _name(variant), len(state), checkpoint)
    return sam2.eval()


def import_transformers() -> ModuleType:
    """
    Import `transformers` with SAM 2.

    Raises:
        ImportError: if it is missing or too old.
    """
    try:
        import transformers

        transformers.Sam2Model  # noqa: B018  # imported lazily
    except (ImportError, AttributeError) as error:
        raise KnowSAMImportError(
            f"SAM 2 needs `transformers` with Sam2Model, which cannot be imported ({root_cause(error)}); get it with "
            "`pip install 'transformers>=4.57' 'safetensors>=0.4'` (the extra `sam2`). A torchvision that is installed "
            "must belong to your torch."
        ) from error
    return transformers


def read_sam2_checkpoint(checkpoint: str | os.PathLike[str], variant: str | Any, config: Any) -> dict[str, Tensor]:
    """
    Read the tensors of SAM 2's image model, under their names in `transformers`.

    Raises:
        ValueError: if the checkpoint is damaged or belongs to another model or variant.
        FileNotFoundError: if it is missing.
    """
    path = Path(checkpoint_path(checkpoint))
    expectation = _expectation(path, variant)
    if not path.exists():
        raise KnowSAMFileNotFoundError(
            f"{expectation} does not exist; it is not downloaded automatically, so {_command(path, variant)}."
        )
    if path.is_dir():
        refuse_changes(path, expectation)
        _check_config(path, variant, config, expectation)
        path = path / "model.safetensors"
        if not path.is_file():
            raise KnowSAMFileNotFoundError(f"{expectation} has no {path.name}; download the complete folder.")
    state = read_state_dict(path, expectation, prefixes=PREFIXES | TRAINERS_PREFIXES)
    if any(name.startswith("image_encoder.trunk.") for name in state):
        state = _transformers_names(state)
    if PATCH_PROJECTION not in state or any("decoder.hf_" in name for name in state):  # of HQ-SAM 2
        raise KnowSAMValueError(f"{expectation} holds {which_model(state)}; use a file of SAM 2 {_name(variant)}.")
    found = _variant_of(state)
    if isinstance(variant, str) and found is not None and found != variant:
        raise KnowSAMValueError(
            f"{expectation} holds a {found}; set `variant` to {found!r} or use a file of {variant}."
        )
    state = {name: value for name, value in state.items() if not VIDEO_MEMORY.match(name)}
    for name, twin in (POSITIONS, POSITIONS[::-1]):  # one matrix under two names; some files have only one
        if name not in state and twin in state:
            state[name] = state[twin]
    return state


def _config(transformers: ModuleType, variant: str) -> Any:
    numbers = SAM2_VARIANTS[variant]
    dims, heads = numbers["embed_dim_per_stage"], numbers["num_attention_heads_per_stage"]
    backbone = transformers.Sam2HieraDetConfig(hidden_size=dims[0], num_attention_heads=heads[0], **numbers)
    vision = transformers.Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=dims[::-1])
    return transformers.Sam2Config(vision_config=vision)


def _transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in [] if VIDEO_MEMORY.match(name) else META_TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    points = sorted(name for name in renamed if name.startswith("prompt_encoder.point_embeddings."))
    if points:  # four embeddings with one row each
        renamed["prompt_encoder.point_embed.weight"] = torch.cat([renamed.pop(name) for name in points])
    return renamed


def _variant_of(state: dict[str, Tensor]) -> str | None:
    blocks = {name.split(".")[3] for name in state if name.startswith("vision_encoder.backbone.blocks.")}
    size = (state[PATCH_PROJECTION].shape[0], len(blocks))
    sizes = {(n["embed_dim_per_stage"][0], sum(n["blocks_per_stage"])): name for name, n in SAM2_VARIANTS.items()}
    return sizes.get(size)


def _check_config(folder: Path, variant: str | Any, config: Any, expectation: str) -> None:
    """Compare the backbone configs: window sizes and global attention do not show in tensor shapes."""
    single = sorted(file.name for file in folder.glob("*.pt"))
    if single and not (folder / "config.json").is_file():
        raise KnowSAMValueError(
            f"{expectation} is a folder without config.json but with {some(single)}; name that file instead."
        )
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, found = content["model_type"], {}
        if model in ("sam2", "sam2_video"):
            backbone = (content.get("vision_config") or {}).get("backbone_config") or {}
            found = backbone_numbers(import_transformers().Sam2HieraDetConfig.from_dict(backbone))
    except FileNotFoundError:
        raise KnowSAMValueError(f"{expectation} has no config.json; download the complete folder.") from None
    except Exception as error:  # of JSON and of transformers' own checks
        raise KnowSAMValueError(f"{expectation} has a damaged config.json; download it again.") from error
    if not found:
        remedy = f"use {SAM1_TEACHER} and Meta's .pth for SAM 1" if model == "sam" else "use the folder of a SAM 2"
        raise KnowSAMValueError(f"{expectation} holds a {model!r}; {remedy}.")
    variant_found = next((name for name, numbers in SAM2_VARIANTS.items() if numbers == found), None)
    remedy = f"set `variant` to {variant_found!r}" if variant_found else "pass its Sam2Config as `variant`"
    for key, value in backbone_numbers(config.vision_config.backbone_config).items():
        if found[key] != value:
            raise KnowSAMValueError(
                f"{expectation} has {key} {found[key]} instead of {value}; {remedy}, or use a folder of "
                f"{_name(variant)}."
            )


def backbone_numbers(backbone: Any) -> dict[str, list[int]]:
    """The numbers of a `Sam2HieraDetConfig` that tell variants apart; not all of them show in tensor shapes."""
    return {key: list(getattr(backbone, key)) for key in SAM2_VARIANTS["tiny"]}


def sam2_variant_hint(variant: Any) -> str:
    """
    A question that ends an error about a variant, for names that Meta's files and configs have; else empty.

    Example::

        >>> sam2_variant_hint("base+")
        "; did you mean 'base_plus'?"
    """
    name = re.sub(r"^(sam2(\.1)?[-_])?(hiera[-_])?", "", str(variant).lower())
    name = name.replace("+", "_plus").replace("-", "_").replace("__", "_")
    meant = {"t": "tiny", "s": "small", "b": "base_plus", "b_plus": "base_plus", "base": "base_plus", "l": "large"}
    meant |= {name: name for name in SAM2_VARIANTS}
    return f"; did you mean {meant[name]!r}?" if name in meant else ""


def _command(path: Path, variant: str | Any) -> str:
    """How to get a missing file or folder."""
    if not isinstance(variant, str):
        return "give the path of a folder or file that exists"
    if "medsam2" in path.name.lower():
        return f"get it with `hf download wanglab/MedSAM2 {path.name} --local-dir {path.parent}`"
    if path.suffix in (".pt", ".pth"):
        url = f"https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_{variant}.pt"
        return f"get it with `curl --fail --location --create-dirs --output {path} {url}`"
    return f"get it with `hf download facebook/sam2.1-hiera-{variant.replace('_', '-')} --local-dir {path}`"


def _name(variant: str | Any) -> str:
    return variant if isinstance(variant, str) else "of a custom config"


def _expectation(checkpoint: str | os.PathLike[str], variant: str | Any) -> str:
    return f"`checkpoint` must hold the weights of a SAM 2 {_name(variant)} but {os.fspath(checkpoint)}"
