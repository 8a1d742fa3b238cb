from __future__ import annotations

import pytest
import torch

from knowsam_monai.teachers.adapter import add_adapters
from knowsam_monai.teachers.sam import build_sam
from knowsam_monai.teachers.sam_decoder import decode_masks, dense_positions, embed_masks
from tests.networks.sam_toys import randomized

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = [(128, 128), (64, 96), (16, 16), (1024, 16)]


def toy_sam(image_size, dtype):
    torch.manual_seed(0)
    return randomized(build_sam("stand_in", image_size), std=0.1).to(dtype)


def prompts(sam, num_images=2, num_prompts=3):
    height, width = sam.prompt_encoder.image_embedding_size
    dtype = sam.prompt_encoder.no_mask_embed.weight.dtype
    embedding = torch.randn(num_images, 128, height, width, dtype=dtype)
    masks = 5 * torch.randn(num_images, num_prompts, 4 * height, 4 * width, dtype=dtype)
    return embedding, masks, torch.randn(num_images, num_prompts, 2, 128, dtype=dtype)


def ours(sam, embedding, masks, tokens):
    return decode_masks(
        decoder=sam.mask_decoder,
        embedding=embedding,
        positions=dense_positions(sam.prompt_encoder),
        prompt_tokens=tokens,
        mask_tokens=embed_masks(sam.prompt_encoder, masks.flatten(0, 1)).unflatten(0, masks.shape[:2]),
    )


def upstream(sam, embedding, masks, tokens):
    """`segment_anything` as published: one image a call."""
    grid = embedding.shape[2:]
    rows = []
    for i in range(len(embedding)):
        low_resolution_masks, _ = sam.mask_decoder(
            image_embeddings=embedding[i, None],
            image_pe=dense_positions(sam.prompt_encoder).T.reshape(1, -1, *grid),
            sparse_prompt_embeddings=tokens[i],
            dense_prompt_embeddings=sam.prompt_encoder.mask_downscaling(masks[i, :, None]),
            multimask_output=False,
        )
        rows.append(low_resolution_masks[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("image_size", SIZES)
def test_one_call_for_all_classes_of_all_images_equals_upstream(image_size, dtype):
    sam = toy_sam(image_size, dtype)
    inputs = prompts(sam)
    with torch.no_grad():
        torch.testing.assert_close(ours(sam, *inputs), upstream(sam, *inputs), rtol=0, atol=TOLERANCE[dtype])


def test_equals_upstream_with_adapters_that_have_learned():
    sam = toy_sam((32, 48), torch.float64)
    add_adapters(sam.image_encoder.blocks, sam.mask_decoder.transformer, sam.prompt_encoder.embed_dim)
    randomized(sam.double(), std=0.1)
    inputs = prompts(sam)
    torch.testing.assert_close(ours(sam, *inputs), upstream(sam, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("image_size", SIZES)
def test_dense_positions_are_upstreams(image_size):
    sam = toy_sam(image_size, torch.float32)
    theirs = sam.prompt_encoder.get_dense_pe().flatten(2)[0].T
    torch.testing.assert_close(dense_positions(sam.prompt_encoder), theirs, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(dense_positions(sam.prompt_encoder), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("image_size", SIZES)
def test_mask_embedding_is_upstreams(image_size, dtype):
    sam = toy_sam(image_size, dtype)
    _, masks, _ = prompts(sam)
    theirs = sam.prompt_encoder(points=None, boxes=None, masks=masks.flatten(0, 1)[:, None])[1]
    torch.testing.assert_close(
        embed_masks(sam.prompt_encoder, masks.flatten(0, 1)),
        theirs.flatten(2).transpose(1, 2),
        rtol=0,
        atol=TOLERANCE[dtype],
    )


def test_gradients_equal_upstreams():
    sam = toy_sam((32, 48), torch.float64)
    inputs = [x.requires_grad_() for x in prompts(sam)]
    decoder = sam.mask_decoder
    modules = [decoder.transformer, decoder.output_upscaling, decoder.output_hypernetworks_mlps[0]]
    modules += [decoder.mask_tokens, decoder.iou_token, sam.prompt_encoder.mask_downscaling]
    used = inputs + [parameter for module in modules for parameter in module.parameters()]
    masks = upstream(sam, *inputs)
    weight = torch.randn_like(masks)
    theirs = torch.autograd.grad((masks * weight).sum(), used)
    mine = torch.autograd.grad((ours(sam, *inputs) * weight).sum(), used)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_image_sees_another():
    sam = toy_sam((32, 32), torch.float64)
    inputs = prompts(sam, num_images=3)
    together = ours(sam, *inputs)
    alone = torch.cat([ours(sam, *(x[i, None] for x in inputs)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
