"""What promptable teachers have in common: three channels in, prompts of each class, and a kept embedding."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from knowsam_monai.tensors import without_meta

logger = logging.getLogger(__name__)


class PromptedTeacher(nn.Module):
    """
    ``decode(encode(image), prompt_logits)``, always in eval mode.

    A subclass has ``_encode(rgb)``, from images (B, 3, H, W) of `image_size` in 0..1 to one embedding, and
    ``decode(embedding, prompt_logits, size)``. With a `cache` each image is encoded once.

    Args:
        num_classes: C, background included (1 for a sigmoid student).
        image_size: (height, width) of what the encoder sees.
        to_rgb: how an image becomes three channels: the index of the channel to repeat, "mean" of the channels, "rgb"
            to take three as they are, or a callable (B, channels, H, W) -> (B, 3, H, W).
    """

    called = "The teacher"  # in warnings

    def __init__(
        self, num_classes: int, image_size: tuple[int, int], to_rgb: int | str | Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        if not callable(to_rgb) and not isinstance(to_rgb, int) and to_rgb not in ("mean", "rgb"):
            raise KnowSAMValueError(f"`to_rgb` must be a channel index, 'mean', 'rgb' or a callable but is {to_rgb!r}.")
        self.num_classes = num_classes
        self.image_size = image_size
        self.to_rgb = to_rgb
        self.cache: EmbeddingCache | None = None
        self._saw_image = False

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> PromptedTeacher:
        """Stay in eval mode: a teacher makes targets, and neither dropout nor batch statistics belong in them."""
        return super().train(False)

    def forward(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        if image.ndim != 4:
            raise KnowSAMValueError(
                f"`image` must be (B, channels, H, W) but is of shape {tuple(image.shape)}; volumes go through "
                "SliceTeacher(sam_teacher)."
            )
        if prompt_logits.shape != (len(image), self.num_classes, *image.shape[2:]):
            raise KnowSAMValueError(
                f"`prompt_logits` must be of shape {(len(image), self.num_classes, *image.shape[2:])}, for an image of "
                f"shape {tuple(image.shape)} and {self.num_classes} classes, but are of shape "
                f"{tuple(prompt_logits.shape)}; `num_classes` of teacher and student must agree."
            )
        return self.decode(self.encode(image), prompt_logits, size=image.shape[2:])

    def encode(self, image: Tensor) -> Tensor:
        """The embedding of images (B, channels, H, W): (B, channels of the embedding, h, w) on the token grid."""
        rgb = self._three_channels(without_meta(image))
        if not self._saw_image and not rgb.is_meta:
            self._saw_image = True
            self._warn_of_range(rgb)
        if self.cache is None:
            return self._resized_and_encoded(rgb)
        if rgb.shape[2] != rgb.shape[3]:
            raise KnowSAMValueError(
                f"`image` must be square for the encoder 'cached' but is of shape {tuple(image.shape)}."
            )
        return self.cache(rgb, self._resized_and_encoded)

    @abstractmethod
    def decode(self, embedding: Tensor, prompt_logits: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Logits (B, C, *size) from embeddings of ``encode``, kept or fresh; by default of the prompts' size."""

    @abstractmethod
    def _encode(self, rgb: Tensor) -> Tensor:
        """The embedding of images (B, 3, *image_size), 0..1."""

    def _resized_and_encoded(self, rgb: Tensor) -> Tensor:
        if rgb.shape[2:] != self.image_size:
            rgb = F.interpolate(rgb, size=self.image_size, mode="bilinear")
        return self._encode(rgb)

    def _three_channels(self, image: Tensor) -> Tensor:
        channels = image.shape[1]
        if callable(self.to_rgb):
            rgb = self.to_rgb(image)
        elif self.to_rgb == "mean":
            rgb = image.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        elif self.to_rgb == "rgb":
            rgb = image
        else:
            if not -channels <= self.to_rgb < channels:
                raise KnowSAMValueError(
                    f"`to_rgb` must be a channel of the image, which has {channels}, but is {self.to_rgb}; "
                    "the first is 0."
                )
            rgb = image[:, self.to_rgb, None].expand(-1, 3, -1, -1)
        if rgb.ndim != 4 or rgb.shape[:2] != (len(image), 3):
            raise KnowSAMValueError(
                f"`to_rgb` must make three channels of {tuple(image.shape)} but {self.to_rgb!r} makes "
                f"{tuple(rgb.shape)}; choose a channel index or 'mean' for images that are not RGB."
            )
        return rgb

    def _warn_of_range(self, rgb: Tensor) -> None:
        """Augmented intensities may be somewhat out of 0..1; those of CT, or normalized ones, are far out."""
        low, high = rgb.aminmax()
        if low < -1 or high > 2:
            logger.warning(
                "%s expects images in 0..1 but the first are in %.4g..%.4g: scale them, or give `to_rgb` a callable "
                "that does (IntensityWindow for CT).",
                self.called,
                low,
                high,
            )
