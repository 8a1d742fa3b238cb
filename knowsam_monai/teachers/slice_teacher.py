"""A teacher of volumes: SAM on their slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.teachers.slice_selection import SliceSelection, draw_axis, draw_by_entropy, draw_uniform
from knowsam_monai.tensors import without_meta

SAMPLINGS = ("uniform", "entropy")


class SliceTeacher(nn.Module):
    """
    A 2D teacher of 3D students: the volume goes to SAM as slices, the logits come back as a volume.

    .. math:: Y = \\frac{1}{|A|} \\sum_{a \\in A} \\text{stack}_a (f(x_{a,i}, z_{a,i}))_i

    x_{a,i} is slice i of the volume along axis a, z_{a,i} the student's logits of that slice, f the 2D teacher, which
    resizes to SAM's input and back. All slices of all rows along an axis are one batch. Called as it is, it does every
    slice; that is what validation and the "agreement" gate see.

    With `slices` = k, :class:`~knowsam_monai.distillation.SAMDistiller` asks :meth:`draw_slices` for k
    slices of each volume a step. Image, logits and label are cut down to them and the teacher does no others:
    distillation and SAM's loss act on these slices alone, as on thin volumes of k slices. Of several axes one
    is drawn a step, so the cost stays that of k slices. Draws are functions of (seed, iteration, row of the batch over
    all ranks), the axis of (seed, iteration).

    Args:
        sam_teacher: ``f(image, prompt_logits) -> logits`` in 2D, no row seeing another: :class:`SAMTeacher`.
        axes: the spatial axis that the slices are stacked along, 0..2 or -3..-1, or several of them. -1, the default,
            is the last: the through-plane axis of a volume (H, W, D).
        slices: k; None is all slices along all axes, their logits averaged.
        sampling: "uniform": one slice of each of k equal parts of the depth. "entropy": without repetition, in
            proportion to the mean entropy of the student's prediction in a slice.
        seed: of the draws, 0 or more.

    Shape:
        - image: (B, channels, H, W, D). prompt_logits: (B, C, H, W, D).
        - output: (B, C, H, W, D)

    Raises:
        ValueError: when an argument is none of the above, the teacher's encoder is "cached", `image` is no volume, or
            it has fewer than `slices` slices.

    Example::

        >>> from knowsam_monai.networks import SAMTeacher
        >>> sam_teacher = SAMTeacher(num_classes=2, image_size=64, variant="vit_t", trainable="all")
        >>> teacher = SliceTeacher(sam_teacher, slices=8)
        >>> teacher(torch.rand(1, 1, 32, 32, 16), torch.zeros(1, 2, 32, 32, 16)).shape
        torch.Size([1, 2, 32, 32, 16])
    """

    def __init__(
        self,
        sam_teacher: nn.Module,
        axes: int | Sequence[int] = -1,
        slices: int | None = None,
        sampling: str = "uniform",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if slices is not None and (type(slices) is not int or slices < 1):
            raise KnowSAMValueError(
                f"`slices` must be a number of slices, 1 or more, or None for all, but is {slices!r}."
            )
        if sampling not in SAMPLINGS:
            raise KnowSAMValueError(f"`sampling` must be one of {', '.join(SAMPLINGS)} but is {sampling!r}.")
        if getattr(sam_teacher, "encoder", "adapted") == "cached":
            raise KnowSAMValueError(
                "`sam_teacher` must have the encoder 'adapted' but has 'cached'; slices of random patches never come "
                "again, so nothing that was kept would be used."
            )
        self.sam_teacher = sam_teacher
        self.axes = _spatial_axes(axes)
        self.slices = slices
        self.sampling = sampling
        self.seed = seed
        self.num_draws = 0
        self.eval()
        # what is said of a teacher: its classes, and what its weights are
        said = (
            "num_classes",
            "image_size",
            "variant",
            "checkpoint",
            "pretrained",
            "stand_in",
            "pretrained_on",
            "license",
        )
        for name in said:
            if hasattr(sam_teacher, name):
                setattr(self, name, getattr(sam_teacher, name))

    def get_extra_state(self) -> Tensor:
        """The number of draws, from which a loop that names no iteration goes on after a resume."""
        return torch.tensor(self.num_draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.num_draws = int(state)

    def train(self, mode: bool = True) -> SliceTeacher:
        """Stay in eval mode, as the 2D teacher does."""
        return super().train(False)

    def forward(self, image: Tensor, prompt_logits: Tensor, axes: int | Sequence[int] | None = None) -> Tensor:
        """
        Teach every slice of the volumes given, which may be thin ones.

        Args:
            axes: what to slice along instead of the teacher's own axes.
        """
        image, prompt_logits = without_meta(image), without_meta(prompt_logits)
        _check_volume(image)
        logits = [
            self._teach_along(axis, image, prompt_logits)
            for axis in (self.axes if axes is None else _spatial_axes(axes))
        ]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)

    def draw_slices(self, prompt_logits: Tensor, iteration: int | None = None) -> SliceSelection | None:
        """
        The slices that a step is about; None where it is about all.

        Args:
            prompt_logits: the student's (B, C, H, W, D) for the whole batch.
            iteration: 0 or more; the same one draws the same slices. None: the number of draws so far.
        """
        if self.slices is None:
            return None
        _check_volume(prompt_logits)
        self.num_draws += 1
        iteration = self.num_draws if iteration is None else iteration
        axis = draw_axis(self.axes, self.seed, iteration)
        num_rows, size = len(prompt_logits), prompt_logits.shape[axis + 2]
        if size < self.slices:
            raise KnowSAMValueError(
                f"`slices` must be at most {size}, the slices of the volume along axis {axis}, but is {self.slices}; "
                "take fewer, or None for all."
            )
        if self.sampling == "entropy":
            index = draw_by_entropy(prompt_logits, axis, self.slices, self.seed, iteration)
        else:
            index = draw_uniform(size, self.slices, num_rows, self.seed, iteration)
        return SliceSelection(axis, index.to(prompt_logits.device))

    def _teach_along(self, axis: int, image: Tensor, prompt_logits: Tensor) -> Tensor:
        """(B, channels, *spatial) to B * n images, n being the slices along the axis, and their logits back."""
        images, prompts = (x.movedim(axis + 2, 1).flatten(0, 1) for x in (image, prompt_logits))
        return self.sam_teacher(images, prompts).unflatten(0, (len(image), -1)).movedim(1, axis + 2)


def _check_volume(tensor: Tensor) -> None:
    if tensor.ndim != 5:
        raise KnowSAMValueError(
            f"`image` must be volumes (B, channels, H, W, D) but is of shape {tuple(tensor.shape)}; for images take "
            "the 2D teacher as it is."
        )


def _spatial_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    named = (axes,) if isinstance(axes, int) else tuple(axes)
    spatial = tuple(axis + 3 if axis < 0 else axis for axis in named)
    if len(spatial) == 0 or len(set(spatial)) < len(spatial) or not set(spatial) <= {0, 1, 2}:
        raise KnowSAMValueError(f"`axes` must be one or more different spatial axes, 0..2 or -3..-1, but is {axes}.")
    return spatial
