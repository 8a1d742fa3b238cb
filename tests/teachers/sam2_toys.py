"""A small SAM 2 of `transformers`' own classes, and the module tree of Meta's, whose names its files have."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

DIM = 32
WIDTHS, BLOCKS, WINDOWS = [16, 32, 64, 128], [1, 1, 2, 1], [8, 4, 6, 3]


def toy_config(image_size=64):
    transformers = pytest.importorskip("transformers", reason="SAM 2 needs the extra `sam2`")
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=WIDTHS[0],
        embed_dim_per_stage=WIDTHS,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        blocks_per_stage=BLOCKS,
        global_attention_blocks=[3],
        window_size_per_stage=WINDOWS,
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=WIDTHS[::-1],
        fpn_hidden_size=DIM,
        backbone_feature_sizes=[[image_size // stride] * 2 for stride in (4, 8, 16)],
    )
    return transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(hidden_size=DIM, image_size=image_size),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(hidden_size=DIM, mlp_dim=16, iou_head_hidden_dim=DIM),
    )


def toy_model(image_size=64):
    """With every value at random: position tables and the no-memory embedding start at zero."""
    config = toy_config(image_size)
    from transformers import Sam2Model

    torch.manual_seed(0)
    model = Sam2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    matrix = torch.randn(2, DIM // 2)
    model.shared_image_embedding.positional_embedding.copy_(matrix)
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)
    return model


def meta_state() -> dict[str, torch.Tensor]:
    """The state dict of Meta's SAM2Base in this size, attribute by attribute as its sources name them."""
    torch.manual_seed(1)
    trunk = nn.Module()
    trunk.pos_embed = nn.Parameter(torch.randn(1, WIDTHS[0], 7, 7))
    trunk.pos_embed_window = nn.Parameter(torch.randn(1, WIDTHS[0], WINDOWS[0], WINDOWS[0]))
    trunk.patch_embed = _module(proj=nn.Conv2d(3, WIDTHS[0], 7, 4, 3))
    trunk.blocks = nn.ModuleList()
    before = WIDTHS[0]
    for width, count in zip(WIDTHS, BLOCKS):
        for _ in range(count):
            trunk.blocks.append(_block(before, width))
            before = width
    convs = nn.ModuleList(nn.Sequential() for _ in WIDTHS)
    for conv, width in zip(convs, WIDTHS[::-1]):
        conv.add_module("conv", nn.Conv2d(width, DIM, 1))

    prompts = _module(
        pe_layer=nn.Module(),
        point_embeddings=nn.ModuleList(nn.Embedding(1, DIM) for _ in range(4)),
        not_a_point_embed=nn.Embedding(1, DIM),
        no_mask_embed=nn.Embedding(1, DIM),
        mask_downscaling=nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            nn.GroupNorm(1, 4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            nn.GroupNorm(1, 16),
            nn.GELU(),
            nn.Conv2d(16, DIM, 1),
        ),
    )
    prompts.pe_layer.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, DIM // 2))
    decoder = _module(
        transformer=_module(
            layers=nn.ModuleList(_two_way_block() for _ in range(2)),
            final_attn_token_to_image=_attention(DIM // 2),
            norm_final_attn=nn.LayerNorm(DIM),
        ),
        iou_token=nn.Embedding(1, DIM),
        mask_tokens=nn.Embedding(4, DIM),
        obj_score_token=nn.Embedding(1, DIM),
        output_upscaling=nn.Sequential(
            nn.ConvTranspose2d(DIM, DIM // 4, 2, 2),
            nn.GroupNorm(1, DIM // 4),
            nn.GELU(),
            nn.ConvTranspose2d(DIM // 4, DIM // 8, 2, 2),
        ),
        conv_s0=nn.Conv2d(DIM, DIM // 8, 1),
        conv_s1=nn.Conv2d(DIM, DIM // 4, 1),
        output_hypernetworks_mlps=nn.ModuleList(_mlp(DIM, DIM, DIM, DIM // 8) for _ in range(4)),
        iou_prediction_head=_mlp(DIM, DIM, DIM, 4),
        pred_obj_score_head=_mlp(DIM, DIM, DIM, 1),
    )
    sam2 = _module(
        image_encoder=_module(trunk=trunk, neck=_module(convs=convs)),
        sam_prompt_encoder=prompts,
        sam_mask_decoder=decoder,
        mask_downsample=nn.Conv2d(1, 1, 4, 4),
        memory_encoder=_module(out_proj=nn.Conv2d(4, 4, 1)),
        memory_attention=_module(norm=nn.LayerNorm(4)),
        obj_ptr_proj=_mlp(4, 4, 4, 4),
        obj_ptr_tpos_proj=nn.Linear(4, 4),
    )
    sam2.no_mem_embed = nn.Parameter(torch.randn(1, 1, DIM))
    for name in ("no_mem_pos_enc", "maskmem_tpos_enc", "no_obj_ptr", "no_obj_embed_spatial"):
        setattr(sam2, name, nn.Parameter(torch.randn(1, 4)))
    return sam2.state_dict()


def _module(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _mlp(*widths: int) -> nn.Module:
    return _module(layers=nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:])))


def _block(before: int, width: int) -> nn.Module:
    block = _module(
        norm1=nn.LayerNorm(before),
        attn=_module(qkv=nn.Linear(before, 3 * width), proj=nn.Linear(width, width)),
        norm2=nn.LayerNorm(width),
        mlp=_mlp(width, 4 * width, width),
    )
    if before != width:
        block.proj = nn.Linear(before, width)
    return block


def _attention(inner: int) -> nn.Module:
    projections = {f"{name}_proj": nn.Linear(DIM, inner) for name in "qkv"}
    return _module(**projections, out_proj=nn.Linear(inner, DIM))


def _two_way_block() -> nn.Module:
    return _module(
        self_attn=_attention(DIM),
        cross_attn_token_to_image=_attention(DIM // 2),
        cross_attn_image_to_token=_attention(DIM // 2),
        mlp=_mlp(DIM, 16, DIM),
        **{f"norm{i}": nn.LayerNorm(DIM) for i in range(1, 5)},
    )
