"""A teacher for volumes: a 2D teacher on their slices."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice
from knowsam_monai.teachers.slice_selection import SliceSelection, draw_axis, draw_by_entropy, draw_uniform
from knowsam_monai.tensors import without_meta

# attributes that describe a teacher and the provenance of its weights
DESCRIPTION = (
    *("num_classes", "overlapping", "image_size", "variant", "checkpoint"),
    *("pretrained", "stand_in", "pretrained_on", "license"),
)


class SliceTeacher(nn.Module):
    """
    Teach 3D students with a 2D teacher: run it on slices of volumes and stack its logits.

    .. math:: Y = \\frac{1}{|A|} \\sum_{a \\in A} \\text{stack}_a (f(x_{a,i}, z_{a,i}))_i

    x_{a,i} is slice i of the volume along axis a, z_{a,i} are the student's logits of that slice, and f is the 2D
    teacher. All slices of all rows along an axis form one batch. A plain call processes all slices, as in validation
    and for the gate.

    With `slices` = k, :class:`~knowsam_monai.distillation.SAMDistiller` draws k slices of each volume per step with
    :meth:`draw_slices`. The teacher, distillation and SAM's loss then only use these thin volumes. If there are several
    axes, each step draws one of them, so a step costs k slices. The slices are functions of (seed, iteration, row of
    the batch over all ranks), the axis is a function of (seed, iteration).

    Args:
        sam_teacher: a 2D teacher ``f(image, prompt_logits) -> logits`` with independent rows, such as
            :class:`SAMTeacher`.
        axes: one or several spatial axes along which to slice, 0..2 or -3..-1. The default -1 is the through-plane axis
            of a volume (H, W, D).
        slices: k. None uses all slices along all axes and averages their logits.
        sampling: "uniform" draws one slice from each of k equal parts of the depth. "entropy" draws without
            replacement, in proportion to the mean entropy of the student's prediction in a slice.
        seed: seed of the draws, 0 or more.

    Shape:
        - image: (B, channels, H, W, D). prompt_logits: (B, C, H, W, D).
        - output: (B, C, H, W, D)

    Raises:
        ValueError: if an argument is invalid, if the teacher's encoder is "cached", if `image` is not a volume, or if
            it has fewer than `slices` slices.

    Example::

        >>> from knowsam_monai.teachers import SAMTeacher
        >>> sam_teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", trainable="all")
        >>> teacher = SliceTeacher(sam_teacher, slices=8)
        >>> teacher(torch.rand(1, 1, 32, 32, 16), torch.zeros(1, 2, 32, 32, 16)).shape
        torch.Size([1, 2, 32, 32, 16])
    """

    @check_types
    def __init__(
        self,
        sam_teacher: nn.Module,
        axes: int | Sequence[int] = -1,
        slices: int | None = None,
        sampling: str = "uniform",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if slices is not None and slices < 1:
            raise KnowSAMValueError(f"`slices` must be a number of slices, 1 or more, or None for all but is {slices}.")
        check_choice("sampling", sampling, ("uniform", "entropy"))
        if getattr(sam_teacher, "encoder", "adapted") == "cached":
            raise KnowSAMValueError(
                "`sam_teacher` must have the encoder 'adapted' but has 'cached'; slices of random patches do not "
                "repeat, so the cache would be useless."
            )
        self.sam_teacher = sam_teacher
        self.axes = _spatial_axes(axes)
        self.slices = slices
        self.sampling = sampling
        self.seed = seed
        self.num_draws = 0
        self.eval()
        for name in DESCRIPTION:
            if hasattr(sam_teacher, name):
                setattr(self, name, getattr(sam_teacher, name))

    def get_extra_state(self) -> Tensor:
        """The number of draws, with which a loop that passes no iteration resumes."""
        return torch.tensor(self.num_draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.num_draws = int(state)

    def train(self, mode: bool = True) -> SliceTeacher:
        """Stay in eval mode, like the 2D teacher."""
        return super().train(False)

    def forward(self, image: Tensor, prompt_logits: Tensor, axes: int | Sequence[int] | None = None) -> Tensor:
        """
        Process every slice of the given volumes, which may be thin.

        Args:
            axes: replaces the teacher's own axes.
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
        Draw the slices that a step uses; None if both losses use every slice.

        Args:
            prompt_logits: the student's logits (B, C, H, W, D) of the whole batch.
            iteration: 0 or more; equal iterations draw equal slices. None uses the number of draws so far.
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
                "use fewer, or None for all."
            )
        if self.sampling == "entropy":
            index = draw_by_entropy(prompt_logits, axis, self.slices, self.seed, iteration)
        else:
            index = draw_uniform(size, self.slices, num_rows, self.seed, iteration)
        return SliceSelection(axis, index.to(prompt_logits.device, non_blocking=True))

    def _teach_along(self, axis: int, image: Tensor, prompt_logits: Tensor) -> Tensor:
        """Process all slices along an axis, and stack their logits to a volume; no more at once than a step draws."""
        images, prompts = (x.movedim(axis + 2, 1).flatten(0, 1) for x in (image, prompt_logits))
        at_once = len(images) if self.slices is None else self.slices * len(image)
        logits = [self.sam_teacher(*part) for part in zip(images.split(at_once), prompts.split(at_once))]
        logits = logits[0] if len(logits) == 1 else torch.cat(logits)
        return logits.unflatten(0, (len(image), -1)).movedim(1, axis + 2)


def _check_volume(tensor: Tensor) -> None:
    if tensor.ndim != 5:
        raise KnowSAMValueError(
            f"`image` must have shape (B, channels, H, W, D) but has {tuple(tensor.shape)}; for images use the 2D "
            "teacher itself."
        )


def _spatial_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    given = (int(axes),) if isinstance(axes, Integral) else tuple(axes)
    spatial = tuple(axis + 3 if axis < 0 else axis for axis in given)
    if len(spatial) == 0 or len(set(spatial)) < len(spatial) or not set(spatial) <= {0, 1, 2}:
        raise KnowSAMValueError(f"`axes` must be one or more different spatial axes, 0..2 or -3..-1, but is {axes}.")
    return spatial
