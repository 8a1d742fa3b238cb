"""SAM variants: their sizes and the locations of their published weights."""

from __future__ import annotations

from typing import NamedTuple


class SAMVariant(NamedTuple):
    """Sizes of one SAM. Those of vit_b, vit_l and vit_h are `segment_anything`'s.

    The first four describe a ViT; they are 0 or empty if the image encoder is another network.
    """

    embed_dim: int = 0
    depth: int = 0
    num_heads: int = 0
    global_attention_blocks: tuple[int, ...] = ()
    patch_size: int = 16
    window_size: int = 14
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    url: str | None = None
    md5: str | None = None


# for who names one as MobileSAM's authors do
VIT_T = "MobileSAM, which its authors call vit_t, is 'mobile_sam' here, and this package's small SAM is 'stand_in'"

_META = "https://dl.fbaipublicfiles.com/segment_anything"

SAM_VARIANTS = {
    "vit_b": SAMVariant(
        768,
        12,
        12,
        (2, 5, 8, 11),
        url=f"{_META}/sam_vit_b_01ec64.pth",
        md5="01ec64d29a2fca3f0661936605ae66f8",
    ),
    "vit_l": SAMVariant(
        1024,
        24,
        16,
        (5, 11, 17, 23),
        url=f"{_META}/sam_vit_l_0b3195.pth",
        md5="0b3195507c641ddb6910d2bb5adee89c",
    ),
    "vit_h": SAMVariant(
        1280,
        32,
        16,
        (7, 15, 23, 31),
        url=f"{_META}/sam_vit_h_4b8939.pth",
        md5="4b8939a88964f0f4ff5f5b2642c598a6",
    ),
    "mobile_sam": SAMVariant(url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt"),
    # a small SAM for CPUs: 16 x 16 tokens for 128 x 128 pixels, as the others have for 256 x 256
    "stand_in": SAMVariant(160, 4, 5, (1, 3), patch_size=8, window_size=8, prompt_dim=128, decoder_mlp_dim=512),
}
