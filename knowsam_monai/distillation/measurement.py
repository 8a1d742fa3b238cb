"""A measurement of the gate on a batch of training: which rows it judges, and both models on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowsam_monai import ranks
from knowsam_monai.distillation.gate import LabeledImages
from knowsam_monai.distillation.inputs import view_at
from knowsam_monai.distillation.wiring import takes_more_than_images
from knowsam_monai.errors import KnowSAMError, error_line
from knowsam_monai.labeled_rows import Rows, knows_labels, labeled_slice, other_rows, take_rows
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.tensors import (
    all_in_eval_mode,
    are_probabilities,
    at_least_float32,
    class_numbers,
    eval_mode_logits,
    unstack_views,
    without_meta,
)


@kept_random_state()
def measure_gate(
    distiller: nn.Module,
    network: nn.Module | Callable,
    student: Callable[[Tensor], Any],
    image: Tensor,
    label: Tensor | None,
    labeled_rows: Rows,
    turn: int,
    sam_image: Tensor | None,
    logits_of: Callable[[Any], Tensor] | None,
    run: int | None = None,
    is_due: bool = True,
) -> None:
    """
    Measure the gate of a distiller, if the batch has rows that are of use to it.

    Args:
        distiller: a :class:`~knowsam_monai.distillation.SAMDistiller`.
        network: is put in eval mode for the measurement; a function is called as it is.
        student, image, label, labeled_rows, turn, sam_image, logits_of: as in
            :meth:`~knowsam_monai.distillation.SAMDistiller.measure_agreement`.
        run, is_due: as in :meth:`~knowsam_monai.distillation.TeacherGate.is_of_use`.
    """
    gate = distiller.gate
    if gate.mode == "none":
        return
    gate.must_lead = not distiller.learns
    image = without_meta(image)
    distiller.join(image.device)
    sam_image = image if sam_image is None else without_meta(sam_image)
    rows = labeled_slice(labeled_rows, label, len(image))
    judged_rows = _judged_rows(distiller, image, label, rows)
    is_counted = len(take_rows(image, judged_rows)) > 0
    labeled = _labeled_images(distiller, image, sam_image, label, labeled_rows, rows)
    kinds = {"unlabeled"} if is_counted else set()
    kinds |= {"labeled"} if labeled is not None else set()
    distiller.wiring.count_measurement(distiller, kinds, labeled_rows is None)
    if not ranks.is_distributed() and (not gate.is_of_use(kinds, run, is_due) or not kinds):
        return
    judged_rows = judged_rows if is_counted else slice(1)
    with all_in_eval_mode(network) if isinstance(network, nn.Module) else nullcontext():
        gate.measure_agreement(
            partial(_student_logits, distiller, student, logits_of),
            distiller.ask_teacher,
            take_rows(image, judged_rows).clone(),  # a network may change its input in place
            turn,
            is_counted,
            take_rows(sam_image, judged_rows).clone(),
            labeled,
            [axis % 3 - 3 for axis in getattr(distiller.teacher, "axes", ())],
        )


def _judged_rows(distiller: nn.Module, image: Tensor, label: Tensor | None, rows: slice) -> slice | list[int]:
    """The rows on which both models are compared: those from which the teacher does not learn."""
    others = other_rows(rows, len(image))
    if len(take_rows(image, others)) > 0:
        return others
    if not distiller.learns:
        return slice(None)  # the student has learned from them, but nothing better is left
    if label is None or distiller.ignore_index is None:
        return []
    is_partial = (without_meta(label) == distiller.ignore_index).flatten(1).any(1)
    return [row for row, has_ignored in zip(range(len(image))[rows], is_partial.tolist()) if has_ignored]


def _student_logits(
    distiller: nn.Module,
    student: Callable[[Tensor], Any],
    logits_of: Callable[[Any], Tensor] | None,
    image: Tensor,
) -> Tensor:
    """The student's logits of the view that prompts the teacher."""
    try:
        output = student(image)
    except KnowSAMError:
        raise
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise takes_more_than_images(error_line(error)) from error
    remedy = "pick the logits with `logits_of`, as in `logits_of=lambda output: output[0]`"
    views = unstack_views(eval_mode_logits(output, logits_of, image), image, "student(image)", remedy)
    logits = view_at(views, distiller.prompt_view)
    is_sigmoid = distiller.overlapping or logits.shape[1] == 1
    if is_sigmoid and distiller.gate.saw_logits and are_probabilities(logits.flatten(0, 1)[:, None]):
        # in eval mode this student applies its sigmoid; softmax probabilities rank classes just as well
        return torch.logit(at_least_float32(logits), eps=1e-6)
    return logits


def _labeled_images(
    distiller: nn.Module,
    image: Tensor,
    sam_image: Tensor,
    label: Tensor | None,
    labeled_rows: Rows,
    rows: slice,
) -> LabeledImages | None:
    """The rows whose labels the student may see; None if there are none, or all have one and nobody says which."""
    if label is None or not knows_labels(label, labeled_rows, rows, len(image), distiller.ignore_index):
        return None
    label = class_numbers(label[rows] if len(label) == len(image) else label)
    channels = getattr(distiller.teacher, "num_classes", label.shape[1]) if distiller.overlapping else 1
    if label.shape[1:] != (channels, *image.shape[2:]):  # a teacher that learns has an error of its own for this
        distiller.wiring.warn(
            f"the gate compares nothing on the labeled rows: the labels must have shape (rows, {channels}, "
            f"{', '.join(map(str, image.shape[2:]))}) but have {tuple(label.shape)}."
        )
        return None
    return LabeledImages(image[rows].clone(), sam_image[rows].clone(), label, distiller.ignore_index)
