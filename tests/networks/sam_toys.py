"""Small SAMs built from `segment_anything`'s classes, shared by the tests of the SAM teacher."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn

from knowsam_monai.teachers.sam_variants import SAMVariant
from knowsam_monai.teachers.segment_anything_import import import_segment_anything

TOY_VARIANT = SAMVariant(16, 3, 2, (1,), window_size=3, prompt_dim=32, decoder_mlp_dim=16)


def randomized(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Randomize all parameters: position tables and adapters start at zero, which would hide differences."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * std)
    return module


def toy_encoder(grid: tuple[int, int], window_size: int, dim: int = 16, num_heads: int = 2) -> nn.Module:
    """Upstream's image encoder, patch size 4, windows in the first and the last of three blocks."""
    import_segment_anything()
    from segment_anything.modeling import ImageEncoderViT

    encoder = ImageEncoderViT(
        img_size=4 * max(grid),
        patch_size=4,
        embed_dim=dim,
        depth=3,
        num_heads=num_heads,
        out_chans=8,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window_size,
        global_attn_indexes=(1,),
    )
    encoder.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
    encoder.blocks[1].attn.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, dim // num_heads))
    encoder.blocks[1].attn.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, dim // num_heads))
    return randomized(encoder)
