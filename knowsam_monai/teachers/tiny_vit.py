"""MobileSAM's image encoder: the TinyViT of `timm`, then the neck that SAM's own encoder has."""

from __future__ import annotations

import re

from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMImportError
from knowsam_monai.teachers.segment_anything_import import import_segment_anything

# MobileSAM's name of a tensor -> the name that it has here, each rule in turn
MOBILE_SAM_TO_TIMM = [
    (r"^image_encoder\.(?!neck\.)", "image_encoder.vit."),
    (r"\.patch_embed\.seq\.0\.", ".patch_embed.conv1."),
    (r"\.patch_embed\.seq\.2\.", ".patch_embed.conv2."),
    (r"^(image_encoder\.vit\..*)\.c\.weight$", r"\1.conv.weight"),
    (r"\.vit\.norm_head\.", ".vit.head.norm."),
    (r"\.vit\.head\.(weight|bias)$", r".vit.head.fc.\1"),
    (r"\.vit\.layers\.", ".vit.stages."),
]
DOWNSAMPLE = re.compile(r"(?<=\.vit\.stages\.)(\d+)(?=\.downsample\.)")


class TinyViTEncoder(nn.Module):
    """
    TinyViT with 5 M parameters, whose last stage keeps its resolution, so that a token stands for 16 x 16 pixels.

    It has no table of absolute positions, so it accepts every image size that is a multiple of 16. Its classification
    head is loaded with the rest and never used.

    Args:
        img_size: the larger side of SAM's input, which `segment_anything`'s own functions read.

    Shape:
        - image: (B, 3, H, W), normalized as SAM expects; H and W are multiples of 16.
        - output: (B, 256, H / 16, W / 16)

    Raises:
        ImportError: if `timm` is not installed or cannot be imported.

    Example::

        TinyViTEncoder()(torch.zeros(1, 3, 1024, 1024)).shape       # (1, 256, 64, 64)

    Reference:
        Zhang et al., Faster Segment Anything, arXiv:2306.14289; Wu et al., TinyViT, arXiv:2207.10666.
    """

    def __init__(self, img_size: int = 1024) -> None:
        super().__init__()
        self.img_size = img_size
        try:
            from timm.models.tiny_vit import TinyVit
        except Exception as error:  # a torchvision that does not fit torch raises RuntimeError, OSError ...
            raise KnowSAMImportError(
                f"MobileSAM needs `timm`, which cannot be imported ({error}); get it with "
                "`pip install 'timm>=1.0'` (the extra `mobilesam`), and the torchvision that belongs to your torch."
            ) from error
        norm = import_segment_anything().modeling.common.LayerNorm2d
        self.vit = TinyVit(embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10), drop_path_rate=0.0)
        self.vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(self.vit.num_features, 256, kernel_size=1, bias=False),
            norm(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            norm(256),
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks with attention."""
        return [block for stage in self.vit.stages[1:] for block in stage.blocks]

    def forward(self, image: Tensor) -> Tensor:
        try:
            return self.neck(self.vit.forward_features(image))
        finally:
            # in eval mode, attentions keep the values of a call and its graph
            for module in self.vit.modules():
                if hasattr(module, "attention_bias_cache"):
                    module.attention_bias_cache = {}


def is_of_mobile_sam(state: dict[str, Tensor]) -> bool:
    """Whether tensors have the names of MobileSAM's file.

    Example::

        >>> is_of_mobile_sam({"image_encoder.patch_embed.proj.weight": Tensor()})
        False
    """
    return any(name.startswith("image_encoder.patch_embed.seq.") for name in state)


def from_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of MobileSAM's file to their names in :class:`TinyViTEncoder`.

    Example::

        >>> list(from_mobile_sam({"image_encoder.layers.0.downsample.conv1.c.weight": Tensor()}))
        ['image_encoder.vit.stages.1.downsample.conv1.conv.weight']
    """
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in MOBILE_SAM_TO_TIMM:
            name = re.sub(pattern, replacement, name)
        # timm has it at the beginning of the next stage
        renamed[DOWNSAMPLE.sub(lambda stage: str(int(stage[1]) + 1), name)] = value
    return renamed
