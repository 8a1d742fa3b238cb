"""Checks of what a distiller is given: its teacher and optimizer, images and logits, and the teacher's output."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.wrappers import stepped_parameters


def check_teacher_arguments(teacher: nn.Module, optimizer: Optimizer | None, overlapping: bool) -> None:
    """
    Raise an error if a teacher cannot teach as a distiller is told.

    Args:
        teacher, optimizer, overlapping: as in :class:`~knowsam_monai.distillation.SAMDistiller`.
    """
    if optimizer is not None and set(stepped_parameters(optimizer)).isdisjoint(teacher.parameters()):
        raise KnowSAMValueError(
            "`optimizer` must step parameters of `teacher` but has none of them; build it from "
            "`teacher.parameters()`, or pass None for a teacher that does not learn."
        )
    try:
        inspect.signature(teacher.forward).bind("image", "prompt_logits")
    except ValueError:  # not in Python
        pass
    except TypeError:
        raise KnowSAMTypeError(
            "`teacher` must take an image and the student's logits but takes other arguments; wrap a network in "
            "`NetworkTeacher`."
        ) from None
    if getattr(teacher, "overlapping", overlapping) != overlapping:
        raise KnowSAMValueError(
            f"`overlapping` must be {not overlapping}, as in `teacher`, but is {overlapping}; softmax logits "
            "cannot teach a sigmoid, or vice versa."
        )
    if overlapping and getattr(teacher, "sampling", None) == "entropy":
        raise KnowSAMValueError(
            "`teacher` must draw slices with `sampling` 'uniform' for overlapping regions but has 'entropy', which "
            "assumes a softmax."
        )


def view_at(views: Sequence[Tensor], index: int) -> Tensor:
    """One view of a multi-view student; a plain network has only one."""
    if len(views) == 1:
        return views[0]
    if not -len(views) <= index < len(views):
        raise KnowSAMValueError(
            f"`taught_views` and `prompt_view` must be below {len(views)}, the number of views, but one is {index}; "
            "set `taught_views` to [0] to teach the network's output alone."
        )
    return views[index]


def check_shapes(teacher: nn.Module, image: Tensor, prompt_logits: Tensor) -> None:
    """Raise a ValueError if the student's logits do not fit the image or the teacher's classes."""
    if len(image) != len(prompt_logits) or image.shape[2:] != prompt_logits.shape[2:]:
        raise KnowSAMValueError(
            f"`image` must have the rows and the size of `logits`, {tuple(prompt_logits.shape)}, but has shape "
            f"{tuple(image.shape)}; pass the images of these logits, and interpolate logits that are smaller, "
            "with `attach` or the handler in `logits_of`."
        )
    num_classes = getattr(teacher, "num_classes", prompt_logits.shape[1])
    if prompt_logits.shape[1] != num_classes:
        raise KnowSAMValueError(
            f"`logits` must have {num_classes} channels, the teacher's classes, but have shape "
            f"{tuple(prompt_logits.shape)}; give student and teacher the same number of classes, and `image`, of "
            f"shape {tuple(image.shape)}, a channel: `image[:, None]` if it has none."
        )


def check_output(logits: Tensor, prompt_logits: Tensor, overlapping: bool) -> None:
    """Raise an error if a teacher's output is not logits of the prompt's shape; see `class_logits` for one channel."""
    if not isinstance(logits, Tensor):
        raise KnowSAMTypeError(
            f"`teacher` must return logits but returns a {type(logits).__name__}; return the tensor alone."
        )
    given, expected = tuple(logits.shape), tuple(prompt_logits.shape)
    channels = {given[1], expected[1]}
    is_same = len(channels) == 1 or (channels == {1, 2} and not overlapping)
    if given[:1] + given[2:] != expected[:1] + expected[2:] or not is_same:
        raise KnowSAMValueError(
            f"`teacher` must return logits of the shape of its prompt, {expected}, but returns {given}; give both "
            "networks the same classes, and resize the teacher's logits to the image."
        )
