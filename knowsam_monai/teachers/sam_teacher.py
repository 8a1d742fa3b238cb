"""SAM as a teacher: adapters, learnable prompts, and one mask for each class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from knowsam_monai.arguments import check_types
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.adapter import add_adapters
from knowsam_monai.teachers.prompt import LearnablePrompt
from knowsam_monai.teachers.prompted_teacher import PromptedTeacher, check_image_size
from knowsam_monai.teachers.sam import SIZE_DIVISOR, build_sam
from knowsam_monai.teachers.sam_decoder import decode_masks, dense_positions, embed_masks
from knowsam_monai.teachers.sam_encoder import encode_image
from knowsam_monai.teachers.tiny_vit import TinyViTEncoder

# parameters that a single mask from prompt tokens and a mask prompt does not use
UNUSED_IN_SAM = (
    "image_encoder.vit.head.",
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.no_mask_embed.",
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.output_hypernetworks_mlps.1.",
    "mask_decoder.output_hypernetworks_mlps.2.",
    "mask_decoder.output_hypernetworks_mlps.3.",
)


class SAMTeacher(PromptedTeacher):
    """Segment Anything with adapters and learnable prompts, prompted by a student's logits.

    ``Y_s[c] = D(E(x), tokens_c(E(x)), mask prompt = logits[c])``. One decoder call predicts one mask for each class of
    each image; these masks, resized bilinearly to the image's size, are the teacher's logits. The mask prompt is the
    class's *detached raw* logits, resized bilinearly to 4 x the token grid, without a sigmoid. The teacher stays in
    eval mode. Its rows are independent: labeled rows with a graph and unlabeled rows without one may run separately.

    With ``encoder="cached"`` SAM's image encoder is frozen, has no adapters, and encodes each image once, so a step
    only costs the decoder. The cache pays off if exactly the same images repeat: SAM then sees 2D square images before
    intensity augmentation, in the eight orientations of :class:`knowsam_monai.data.RandOrientationd`.

    Initial random weights depend on torch's seed. Building and calling the teacher restore all global generators, so a
    student starts with the same weights and sees the same data with and without it.

    Args:
        num_classes: C, background included; for a sigmoid student its channels, one for each region.
        image_size: height and width of SAM's input, multiples of 16; other images are resized to it.
        variant: "vit_b", "vit_l", "vit_h", "mobile_sam", or "stand_in" (small, without published weights), see
            :func:`build_sam`.
        checkpoint: SAM's weights, or "procedural" for the stand-in that is not SAM (``stand_in``). None: random
            weights; with "adapters" they stay random, which is only good for tests.
        trainable: "adapters" trains only the adapters and the prompt head; "all" trains every parameter that the
            forward uses, for a SAM without pretrained weights.
        to_rgb: conversion to three channels: the index of a channel to repeat, "mean" of the channels, "rgb" for images
            with three channels, or a callable (B, channels, H, W) -> (B, 3, H, W) such as a CT window. None: the first
            channel, with a warning if there are others.
        num_prompt_tokens: prompt tokens of each class (2 in the paper).
        encoder: "adapted" (the paper), or "cached": frozen and without adapters, each image encoded once.
        cache_dir: folder for the embeddings; None keeps them in memory. See :class:`EmbeddingCache`.
        cache_dtype: torch.float16 or torch.float32, the precision of cached embeddings.
        pretrained_on: training data of the weights; None: recognized by the checkpoint's path.

    Attributes:
        num_classes, image_size, variant, checkpoint, pretrained, stand_in, pretrained_on, license, encoder: as
            constructed.
        cache: the embeddings of a "cached" encoder, else None.

    Shape:
        - image: (B, channels, H, W), 0..1 (another range causes one warning); scaled and normalized here as SAM
          expects
        - prompt_logits: (B, C, H, W)
        - output: (B, C, H, W), float32 (float64 for a float64 teacher)

    Raises:
        ValueError: if an argument is invalid, or if ``image`` and ``prompt_logits`` do not fit.
        FileNotFoundError: if the checkpoint is missing.

    Example::

        >>> teacher = SAMTeacher(num_classes=4, image_size=64, variant="stand_in", trainable="all")
        >>> teacher(torch.rand(2, 1, 64, 64), prompt_logits=torch.zeros(2, 4, 64, 64)).shape
        torch.Size([2, 4, 64, 64])

    Reference:
        Huang et al., KnowSAM, arXiv:2412.13742, eq. 6 to 8; adapters: Wu et al., arXiv:2304.12620.
    """

    display_name = "SAM"

    @kept_random_state()
    @check_types
    def __init__(
        self,
        num_classes: int,
        image_size: int | Sequence[int] = (256, 256),
        variant: str = "vit_b",
        checkpoint: str | os.PathLike[str] | None = None,
        trainable: str = "adapters",
        to_rgb: int | str | Callable[[torch.Tensor], torch.Tensor] | None = None,
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
        self.variant = variant
        self.sam = build_sam(variant, self.image_size, checkpoint)
        dim = self.sam.prompt_encoder.embed_dim
        blocks = self.sam.image_encoder.blocks if encoder == "adapted" else ()
        add_adapters(blocks, self.sam.mask_decoder.transformer, dim)
        self.prompt = LearnablePrompt(num_classes, dim, num_prompt_tokens)
        self._set_up(
            self.sam.image_encoder,
            UNUSED_IN_SAM,
            facts={
                "variant": variant,
                "image_size": self.image_size,
                "pixel_mean_and_std": [x.flatten().tolist() for x in (self.sam.pixel_mean, self.sam.pixel_std)],
            },
            embedding_shape=(dim, *self.sam.prompt_encoder.image_embedding_size),
            cache_dir=cache_dir,
            cache_dtype=cache_dtype,
        )

    @property
    def stand_in(self) -> bool:
        """Whether the weights are not SAM's, as in every checkpoint of ``stand_in``."""
        return self.pretrained and self.variant == "stand_in"

    def _encode(self, rgb: torch.Tensor) -> torch.Tensor:
        normalized = (rgb * 255 - self.sam.pixel_mean) / self.sam.pixel_std
        encoder = self.sam.image_encoder
        return encoder(normalized) if isinstance(encoder, TinyViTEncoder) else encode_image(encoder, normalized)

    def _decode(self, embedding: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        prompt_encoder = self.sam.prompt_encoder
        return decode_masks(
            decoder=self.sam.mask_decoder,
            embedding=embedding,
            positions=dense_positions(prompt_encoder),
            prompt_tokens=self.prompt(embedding),
            mask_tokens=embed_masks(prompt_encoder, masks.flatten(0, 1)).unflatten(0, masks.shape[:2]),
        )
