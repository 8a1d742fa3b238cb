from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from knowsam_monai.teachers.adapter import AdaptedAttention, AdaptedMLP, Adapter, add_adapters
from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_decoder import decode_masks, dense_positions
from knowsam_monai.teachers.sam_encoder import encode_image
from tests.networks.sam_toys import randomized


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return randomized(build_sam("stand_in", image_size=48), std=0.1)


def our_forward(sam):
    torch.manual_seed(1)
    embedding = encode_image(sam.image_encoder, torch.randn(2, 3, 48, 48))
    return decode_masks(
        decoder=sam.mask_decoder,
        embedding=embedding,
        positions=dense_positions(sam.prompt_encoder),
        prompt_tokens=torch.randn(2, 3, 2, 128),
        mask_tokens=torch.randn(2, 3, 36, 128),
    )


def upstream_forward(sam):
    torch.manual_seed(1)
    masks, _ = sam.mask_decoder(
        image_embeddings=sam.image_encoder(torch.randn(1, 3, 48, 48)),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.randn(3, 2, 128),
        dense_prompt_embeddings=torch.randn(3, 128, 6, 6),
        multimask_output=False,
    )
    return masks


def test_adapter_starts_as_zero_or_with_skip_as_identity():
    x = torch.randn(3, 8)
    assert torch.equal(Adapter(dim=8, skip=False)(x), torch.zeros(3, 8))
    assert torch.equal(Adapter(dim=8, skip=True)(x), x)


def test_adapter_is_a_bottleneck_of_a_quarter():
    shapes = {name: tuple(parameter.shape) for name, parameter in Adapter(dim=64, skip=True).named_parameters()}
    assert shapes == {"down.weight": (16, 64), "down.bias": (16,), "up.weight": (64, 16), "up.bias": (64,)}


def test_adapter_by_hand():
    adapter = Adapter(dim=4, skip=True)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
        adapter.down.bias.zero_()
        adapter.up.weight.copy_(torch.tensor([[1.0], [0.0], [0.0], [2.0]]))
    gelu = -0.158655  # GELU(-1), the negative of the normal distribution's 15.9 % below -1
    out = adapter(torch.tensor([-3.0, 2.0, 30.0, 40.0]))
    torch.testing.assert_close(out, torch.tensor([-3.0 + gelu, 2.0, 30.0, 40.0 + 2 * gelu]))


def test_mlp_adapter_is_added_with_half_its_value():
    mlp = AdaptedMLP(nn.Linear(8, 8), dim=8)
    randomized(mlp)
    x = torch.randn(5, 8)
    torch.testing.assert_close(mlp(x), mlp.mlp(x) + 0.5 * mlp.adapter(x))


def test_mlp_adapter_reads_what_the_norm_inside_of_an_mlp_gives():
    """As in TinyViT, whose blocks have no norm before their MLP."""
    mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    mlp.norm = mlp[0]
    adapted = AdaptedMLP(mlp, dim=8)
    randomized(adapted)
    x = 100 * torch.randn(5, 8)
    torch.testing.assert_close(adapted(x), mlp(x) + 0.5 * adapted.adapter(mlp.norm(x)))


def test_attention_adapter_sees_the_attentions_output():
    attention = AdaptedAttention(nn.Linear(8, 8), dim=8)
    randomized(attention)
    x = torch.randn(5, 8)
    torch.testing.assert_close(attention(x), attention.adapter(attention.attention(x)))


@pytest.mark.parametrize("forward", [our_forward, upstream_forward])
def test_with_adapters_at_zero_sam_is_bit_for_bit_sam_without(sam, forward):
    without = forward(sam)
    add_adapters(sam.image_encoder.blocks, sam.mask_decoder.transformer, sam.prompt_encoder.embed_dim)
    assert torch.equal(forward(sam), without)


@pytest.mark.parametrize("forward", [our_forward, upstream_forward])
def test_every_adapter_changes_the_output(sam, forward):
    add_adapters(sam.image_encoder.blocks, sam.mask_decoder.transformer, sam.prompt_encoder.embed_dim)
    before = forward(sam)
    adapters = [module for module in sam.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight)
        after = forward(sam)
        assert not torch.allclose(after, before)
        nn.init.zeros_(adapter.up.weight)


def test_adapters_sit_where_the_method_puts_them(sam):
    add_adapters(sam.image_encoder.blocks, sam.mask_decoder.transformer, sam.prompt_encoder.embed_dim)
    adapters = {name: module.skip for name, module in sam.named_modules() if isinstance(module, Adapter)}
    expected = {}
    for i in range(4):
        expected[f"image_encoder.blocks.{i}.attn.adapter"] = True
        expected[f"image_encoder.blocks.{i}.mlp.adapter"] = False
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}"
        for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            expected[f"{layer}.{attention}.adapter"] = True
        expected[f"{layer}.mlp.adapter"] = False
    expected["mask_decoder.transformer.final_attn_token_to_image.adapter"] = True
    assert adapters == expected
