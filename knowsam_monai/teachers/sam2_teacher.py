"""SAM 2 as a teacher: adapters, learnable prompts, and one mask for each class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam_monai.arguments import check_types
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.adapter import add_adapters
from knowsam_monai.teachers.prompt import LearnablePrompt
from knowsam_monai.teachers.prompted_teacher import PromptedTeacher, check_image_size
from knowsam_monai.teachers.sam2_encoder import encode_sam2_image
from knowsam_monai.teachers.sam2_model import SIZE_DIVISOR, backbone_numbers, build_sam2
from knowsam_monai.teachers.sam_decoder import token_centers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of Meta's SAM2Transforms, for images in 0..1

# parameters that a single mask from prompt tokens and a mask prompt does not use
UNUSED_IN_SAM2 = (
    "prompt_encoder.point_embed.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.no_mask_embed.",
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.pred_obj_score_head.",
    "mask_decoder.output_hypernetworks_mlps.1.",
    "mask_decoder.output_hypernetworks_mlps.2.",
    "mask_decoder.output_hypernetworks_mlps.3.",
)


class Sam2Teacher(PromptedTeacher):
    """
    SAM 2 (2.1, MedSAM2) with adapters and learnable prompts, prompted by a student's logits, for single images.

    ``Y_s[c] = D(E(x), tokens_c(E(x)), mask prompt = logits[c])``, as in :class:`knowsam_monai.teachers.SAMTeacher`. One
    decoder call predicts one mask for each class of each image. The mask prompt is the class's *detached raw* logits,
    resized bilinearly to 4 x the token grid. The masks are resized bilinearly to the image's size in logit space. It
    uses SAM 2's additions: the high-resolution features, the object-score token, and the no-memory embedding of a
    single image. All modules are those of `transformers`' Sam2Model; the first mask token is read.

    An embedding is one tensor (B, 4 D, h, w): the high-resolution features are folded onto the token grid and precede
    the image embedding. ``encoder="cached"`` caches it as SAMTeacher does, in four times the space.

    Args:
        num_classes: C, background included; for a sigmoid student its channels, one for each region.
        image_size: height and width of SAM 2's input, multiples of 32; other images are resized to it.
            Published weights were trained at 1024, MedSAM2 at 512.
        variant: "tiny", "small", "base_plus" or "large", or a `transformers.Sam2Config`. MedSAM2 is a "tiny".
        checkpoint: a folder in the hub's format or a file in Meta's (.pt), see
            :func:`knowsam_monai.teachers.sam2_model.build_sam2`. Nothing is downloaded. None: random weights.
        trainable: "adapters" trains only the adapters and the prompt head; "all" trains every parameter that the
            forward uses, for a SAM 2 without pretrained weights.
        to_rgb: conversion to three channels: the index of a channel to repeat, "mean" of the channels, "rgb" for images
            with three channels, or a callable (B, channels, H, W) -> (B, 3, H, W) such as a CT window. None: the first
            channel, with a warning if there are others.
        num_prompt_tokens: prompt tokens of each class (2 in KnowSAM).
        encoder: "adapted", or "cached": frozen and without adapters, each image encoded once.
        cache_dir: folder for the embeddings; None keeps them in memory.
        cache_dtype: torch.float16 or torch.float32, the precision of cached embeddings.
        pretrained_on: training data of the weights; None: recognized by the checkpoint's path.

    Attributes:
        num_classes, image_size, variant, checkpoint, pretrained, pretrained_on, license, encoder: as constructed.
        cache: the embeddings of a "cached" encoder, else None.

    Shape:
        - image: (B, channels, H, W), 0..1 (another range causes one warning)
        - prompt_logits: (B, C, H, W)
        - output: (B, C, H, W), float32 (float64 for a float64 teacher)

    Raises:
        ValueError: if an argument is invalid, or if ``image`` and ``prompt_logits`` do not fit.
        FileNotFoundError: if the checkpoint is missing.
        ImportError: if `transformers` is not installed.

    Example::

        teacher = Sam2Teacher(num_classes=4, variant="tiny", checkpoint="models/sam2.1_hiera_tiny.pt")
        teacher(torch.rand(2, 1, 256, 256), prompt_logits=torch.zeros(2, 4, 256, 256)).shape     # (2, 4, 256, 256)

    Reference:
        Ravi et al., SAM 2, arXiv:2408.00714; Huang et al., KnowSAM, arXiv:2412.13742, eq. 6 to 8.
    """

    display_name = "SAM 2"
    stand_in = False

    @kept_random_state()
    @check_types
    def __init__(
        self,
        num_classes: int,
        image_size: int | Sequence[int] = (256, 256),
        variant: str | Any = "tiny",
        checkpoint: str | os.PathLike[str] | None = None,
        trainable: str = "adapters",
        to_rgb: int | str | Callable[[Tensor], Tensor] | None = None,
        num_prompt_tokens: int = 2,
        encoder: str = "adapted",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dtype: torch.dtype = torch.float16,
        pretrained_on: str | None = None,
    ) -> None:
        size = check_image_size(image_size, SIZE_DIVISOR)
        super().__init__(
            *(num_classes, num_prompt_tokens, size, to_rgb, trainable, encoder, checkpoint, cache_dir, pretrained_on)
        )
        self.variant = variant if isinstance(variant, str) else "custom config"
        self.sam = build_sam2(variant, checkpoint)
        dim = self.sam.mask_decoder.hidden_size
        blocks = self.sam.vision_encoder.backbone.blocks if encoder == "adapted" else ()
        add_adapters(blocks, self.sam.mask_decoder.transformer, dim)
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.prompt = LearnablePrompt(num_classes, dim, num_prompt_tokens)
        self._set_up(
            nn.ModuleList([self.sam.vision_encoder, self.sam.mask_decoder.conv_s0, self.sam.mask_decoder.conv_s1]),
            UNUSED_IN_SAM2,
            facts={
                "variant": f"SAM 2 {self.variant}",
                "backbone": backbone_numbers(self.sam.config.vision_config.backbone_config),
                "image_size": self.image_size,
                "pixel_mean_and_std": [MEAN, STD],
            },
            embedding_shape=(4 * dim, self.image_size[0] // 16, self.image_size[1] // 16),
            cache_dir=cache_dir,
            cache_dtype=cache_dtype,
        )

    def _encode(self, rgb: Tensor) -> Tensor:
        normalized = (rgb - self.pixel_mean) / self.pixel_std
        finest, finer, coarse = encode_sam2_image(self.sam.vision_encoder, normalized)
        finest = F.pixel_unshuffle(self.sam.mask_decoder.conv_s0(finest), 4)  # (B, 2 D, h, w)
        finer = F.pixel_unshuffle(self.sam.mask_decoder.conv_s1(finer), 2)  # (B, D, h, w)
        return torch.cat((finest, finer, coarse), dim=1)

    def _decode(self, embedding: Tensor, masks: Tensor) -> Tensor:
        dim = embedding.shape[1] // 4
        finest, finer, coarse = embedding.split((2 * dim, dim, dim), dim=1)
        coarse = coarse + self.sam.no_memory_embedding.view(1, dim, 1, 1)

        def for_each_class(x: Tensor) -> Tensor:
            return x.repeat_interleave(self.num_classes, dim=0)

        decoded, *_ = self.sam.mask_decoder(
            image_embeddings=for_each_class(coarse),
            image_positional_embeddings=self._positions(*coarse.shape[2:]),
            sparse_prompt_embeddings=self.prompt(coarse).flatten(0, 1)[:, None],  # (B * C, 1, tokens, D)
            dense_prompt_embeddings=self.sam.prompt_encoder.mask_embed(masks.flatten(0, 1)[:, None]),
            multimask_output=False,
            high_resolution_features=[
                for_each_class(F.pixel_shuffle(finest, 4)),
                for_each_class(F.pixel_shuffle(finer, 2)),
            ],
        )
        return decoded.view(*masks.shape[:2], *decoded.shape[-2:])

    def _positions(self, height: int, width: int) -> Tensor:
        """Encode the positions of the token grid, (1, D, h, w); upstream's is for the square grid of its config."""
        layer = self.sam.shared_image_embedding
        centers = token_centers(height, width, layer.positional_embedding)
        with torch.autocast(centers.device.type, enabled=False):  # large angles need full precision
            return layer(centers).permute(2, 0, 1)[None]
