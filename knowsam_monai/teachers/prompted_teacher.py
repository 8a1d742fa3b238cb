"""Base class of promptable teachers: conversion to RGB, shape checks, and cached embeddings."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice, check_counts
from knowsam_monai.teachers.adapter import Adapter
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from knowsam_monai.teachers.intensity_window import is_sam_range
from knowsam_monai.teachers.provenance import origin
from knowsam_monai.teachers.weights import checkpoint_path
from knowsam_monai.tensors import without_meta

logger = logging.getLogger(__name__)


def check_image_size(image_size: int | Sequence[int], divisor: int) -> tuple[int, int]:
    """
    Return (height, width) of an encoder's input after checking it.

    Raises:
        ValueError: if they are not positive multiples of `divisor`.

    Example::

        >>> check_image_size(256, divisor=16)
        (256, 256)
    """
    size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(size) != 2 or any(type(side) is not int or side <= 0 or side % divisor for side in size):
        raise KnowSAMValueError(
            f"`image_size` must be a positive multiple of {divisor}, or two of them, but is {image_size!r}; "
            "images are resized to it, so choose the nearest multiple."
        )
    return size


class PromptedTeacher(nn.Module):
    """
    ``decode(encode(image), prompt_logits)``, always in eval mode.

    Subclasses override ``_encode(rgb)``, which maps images (B, 3, *image_size) in 0..1 to an embedding, and
    ``_decode(embedding, masks)``, which maps it and mask prompts (B, C, 4 h, 4 w) to masks. A subclass's constructor
    sets `sam` and `variant` and ends with ``_set_up``. With a `cache` each image is encoded once.
    The arguments are those of SAMTeacher, with `image_size` as (height, width).
    """

    display_name: str  # for warnings
    sam: nn.Module
    variant: str

    @check_types
    def __init__(
        self,
        num_classes: int,
        num_prompt_tokens: int,
        image_size: tuple[int, int],
        to_rgb: int | str | Callable[[Tensor], Tensor] | None,
        trainable: str,
        encoder: str,
        checkpoint: str | os.PathLike[str] | None,
        cache_dir: str | os.PathLike[str] | None,
        pretrained_on: str | None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, num_prompt_tokens=num_prompt_tokens)
        check_choice("trainable", trainable, ("adapters", "all"))
        check_choice("encoder", encoder, ("adapted", "cached"))
        if encoder == "cached" and image_size[0] != image_size[1]:
            raise KnowSAMValueError(f"`image_size` must be square for the encoder 'cached' but is {image_size}.")
        if cache_dir is not None and encoder != "cached":
            raise KnowSAMValueError(
                f"`cache_dir` must be left out unless `encoder` is 'cached' but is {os.fspath(cache_dir)!r}; leave it "
                "out, or set `encoder` to 'cached'."
            )
        if isinstance(to_rgb, str) and to_rgb not in ("mean", "rgb"):
            raise KnowSAMValueError(f"`to_rgb` must be a channel index, 'mean', 'rgb' or a callable but is {to_rgb!r}.")
        self.num_classes = num_classes
        self.image_size = image_size
        self.to_rgb = 0 if to_rgb is None else to_rgb
        self._may_drop_channels = to_rgb is not None  # or a warning told so
        self.trainable = trainable
        self.encoder = encoder
        self.checkpoint = None if checkpoint is None else checkpoint_path(checkpoint)
        self.pretrained_on, self.license = pretrained_on, None
        self.pretrained_on, self.license = origin(self)
        self.cache: EmbeddingCache | None = None
        self._checked_range = False

    def _set_up(
        self,
        image_encoder: nn.Module,
        unused: tuple[str, ...],
        facts: dict[str, object],
        embedding_shape: Sequence[int],
        cache_dir: str | os.PathLike[str] | None,
        cache_dtype: torch.dtype,
    ) -> None:
        """
        Freeze what does not train, and prepare the cache of a "cached" encoder.

        Args:
            image_encoder: the modules of `sam` that encode an image.
            unused: beginnings of the names of the parameters of `sam` that the forward does not use.
            facts, embedding_shape, cache_dir, cache_dtype: see :class:`EmbeddingCache`.
        """
        for name, parameter in self.sam.named_parameters():
            parameter.requires_grad_(self.trainable == "all" and not name.startswith(unused))
        for module in self.sam.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(True)
        if self.encoder == "cached":
            image_encoder.requires_grad_(False)
            self.cache = EmbeddingCache(image_encoder, facts, embedding_shape, cache_dir, cache_dtype)
        self.eval()
        if not self.pretrained and (self.trainable == "adapters" or self.encoder == "cached"):
            logger.warning(
                "%s %s has no pretrained weights but its %s frozen, so it learns nothing useful; set `checkpoint`, or "
                "train all of it with `trainable='all'` and `encoder='adapted'`.",
                self.display_name,
                self.variant,
                "image encoder is" if self.trainable == "all" else "weights, except its adapters, are",
            )

    @property
    def pretrained(self) -> bool:
        """Whether the weights were loaded from a checkpoint."""
        return self.checkpoint is not None

    def train(self, mode: bool = True) -> PromptedTeacher:
        """Stay in eval mode: targets must not depend on dropout or batch statistics."""
        return super().train(False)

    def forward(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        if image.ndim != 4:
            raise KnowSAMValueError(
                f"`image` must have shape (B, channels, H, W) but has {tuple(image.shape)}; wrap the teacher in "
                "SliceTeacher for volumes."
            )
        if prompt_logits.shape != (len(image), self.num_classes, *image.shape[2:]):
            raise KnowSAMValueError(
                f"`prompt_logits` must have shape {(len(image), self.num_classes, *image.shape[2:])}, for an image of "
                f"shape {tuple(image.shape)} and {self.num_classes} classes, but have shape "
                f"{tuple(prompt_logits.shape)}; give teacher and student the same `num_classes`."
            )
        return self.decode(self.encode(image), prompt_logits, size=image.shape[2:])

    def encode(self, image: Tensor) -> Tensor:
        """Encode images (B, channels, H, W) to embeddings (B, D, h, w) on the token grid."""
        rgb = self._convert_to_rgb(without_meta(image))
        if not self._checked_range and not rgb.is_meta:
            self._check_range(rgb)
        if self.cache is None:
            return self._resize_and_encode(rgb)
        if rgb.shape[2] != rgb.shape[3]:
            raise KnowSAMValueError(
                f"`image` must be square for the encoder 'cached' but has shape {tuple(image.shape)}."
            )
        return self.cache(rgb, self._resize_and_encode)

    def decode(self, embedding: Tensor, prompt_logits: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Decode embeddings of ``encode`` to logits (B, C, *size); `size` defaults to that of the prompts."""
        prompts = without_meta(prompt_logits).detach().to(next(self.sam.mask_decoder.parameters()).dtype)
        height, width = embedding.shape[2:]
        masks = self._decode(embedding, F.interpolate(prompts, size=(4 * height, 4 * width), mode="bilinear"))
        masks = masks.to(prompts.dtype)  # half precision under autocast
        return F.interpolate(masks, size=tuple(size or prompt_logits.shape[2:]), mode="bilinear")

    @abstractmethod
    def _encode(self, rgb: Tensor) -> Tensor:
        """Encode images (B, 3, *image_size) in 0..1."""

    @abstractmethod
    def _decode(self, embedding: Tensor, masks: Tensor) -> Tensor:
        """Decode mask prompts on 4 x the token grid, (B, C, 4 h, 4 w), to mask logits of any size."""

    def _resize_and_encode(self, rgb: Tensor) -> Tensor:
        if rgb.shape[2:] != self.image_size:
            rgb = F.interpolate(rgb, size=self.image_size, mode="bilinear")
        return self._encode(rgb)

    def _convert_to_rgb(self, image: Tensor) -> Tensor:
        channels = image.shape[1]
        if channels > 1 and not self._may_drop_channels:
            self._may_drop_channels = True
            logger.warning(
                "%s sees only the first of the image's %d channels; set `to_rgb` to 'rgb' for color images, to 'mean', "
                "to the index of a channel (0 for the first), or to a function that makes three of them.",
                self.display_name,
                channels,
            )
        if callable(self.to_rgb):
            rgb = self.to_rgb(image)
        elif self.to_rgb == "mean":
            rgb = image.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        elif self.to_rgb == "rgb":
            rgb = image
        else:
            if not -channels <= self.to_rgb < channels:
                raise KnowSAMValueError(
                    f"`to_rgb` must be the index of one of the image's {channels} channels but is {self.to_rgb}; "
                    "the first is 0."
                )
            rgb = image[:, self.to_rgb, None].expand(-1, 3, -1, -1)
        if rgb.ndim != 4 or rgb.shape[:2] != (len(image), 3):
            raise KnowSAMValueError(
                f"`to_rgb` must turn {tuple(image.shape)} into three channels but {self.to_rgb!r} returns "
                f"{tuple(rgb.shape)}; choose a channel index or 'mean' for images that are not RGB."
            )
        return rgb

    def _check_range(self, rgb: Tensor) -> None:
        """Augmented images may exceed 0..1 slightly; CT or normalized images exceed it by far."""
        low, high = rgb.aminmax()
        if not (high - low).isfinite():
            raise KnowSAMValueError("`image` must have finite values only but has NaN or infinity; repair it.")
        if low == high:  # a blank image tells nothing
            return
        self._checked_range = True
        if not is_sam_range(rgb):
            logger.warning(
                "%s expects images in 0..1 but the first are in %.4g..%.4g; scale them, or set `to_rgb` to your range, "
                "such as IntensityWindow(%.3g, %.3g), for CT to the window of an organ.",
                *(self.display_name, low, high, low, high),
            )
