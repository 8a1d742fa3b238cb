"""Uncertainty-guided data augmentation (UGDA), which mixes labeled and unlabeled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor
from torch.nn import functional as F

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice
from knowsam_monai.handlers.supervision import autocast_of, check_exclusive_classes, weight_now
from knowsam_monai.losses import entropy_map
from knowsam_monai.losses.ramp_up import Weight, check_weights
from knowsam_monai.tensors import class_logits, class_numbers, predicted_label, unstack_views, without_meta


class UncertaintyGuidedMixing:
    """
    Uncertainty-guided data augmentation (UGDA): train on labeled and unlabeled images mixed where one is uncertain.

    The entropy map of the student's first view, the fused one, is averaged over a grid of cells. In each pair of a
    labeled and an unlabeled row, labeled content replaces the most uncertain cells of the unlabeled image, and
    unlabeled content the most uncertain cells of the labeled image. The labels are mixed alike, from true labels and
    pseudo-labels. The mixed images take a second forward and backward pass, so only one graph exists at a time; the sum
    of the gradients is the same. The i-th labeled row is paired with the i-th unlabeled row, since the loader shuffles
    both. The handler writes `mixing_loss`, weighted and detached, into ``engine.state.output``.

    Args:
        loss: ``f(pred, label)`` on the mixed rows, usually the trainer's supervised loss.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning; the authors'
            code: 12,000 of 50,000.
        weight: factor of the loss, a number or a function of the iteration; 0 switches the term off.
        grid_size: cells along each spatial axis, one number for all axes or one for each.
        num_cells: cells replaced in each image, 5 of 16; the same share in 3D is 20 of 64.
        pseudo_label: "teacher" (SAM's argmax, the paper) or "student". With a gate g, "teacher" is the argmax of
            g p_sam + (1 - g) p_student, and of p_student where SAM's output is NaN. Without a teacher, or with one that
            draws slices (``SliceTeacher(slices=k)``) and so has no logits of whole volumes, it means "student".

    Raises:
        ValueError: if `num_cells` is not below the number of cells, `pseudo_label` is unknown, or (at the first step)
            `grid_size` does not have one number for each axis of the image.

    Example::

        loss = PartiallyLabeledLoss()
        handlers = [MultiViewCoTraining(), SAMDistillation(distiller), UncertaintyGuidedMixing(loss, start=12000)]
        SupervisedTrainer(..., loss_function=loss, train_handlers=handlers)

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 11 (cells of *highest* entropy).
    """

    @check_types
    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        start: int = 0,
        weight: Weight = 1.0,
        grid_size: int | Sequence[int] = 4,
        num_cells: int = 5,
        pseudo_label: str = "teacher",
    ) -> None:
        grid_size = int(grid_size) if isinstance(grid_size, Integral) else tuple(grid_size)
        _check_cells(num_cells, grid=(grid_size,) * 3 if isinstance(grid_size, int) else grid_size)
        check_weights(weight=weight)
        check_choice("pseudo_label", pseudo_label, ("teacher", "student"))
        self.loss = loss
        self.start = start
        self.weight = weight
        self.grid_size = grid_size
        self.num_cells = num_cells
        self.pseudo_label = pseudo_label
        self._weight_now = 0.0  # at this iteration

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_exclusive_classes)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.ask_for_teacher)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def ask_for_teacher(self, engine: Engine) -> None:
        """Ask `SAMDistillation` for the teacher's logits of the unlabeled rows, if this step mixes."""
        self._weight_now = weight_now(engine, self.weight, self.start)
        if self.pseudo_label == "teacher" and self._weight_now:
            engine.state.output["teacher_logits"] = None

    def __call__(self, engine: Engine) -> None:
        output = engine.state.output
        image, label = output[Keys.IMAGE], output[Keys.LABEL]
        self.grid(image)  # raises at the first step if the grid does not fit, not thousands of steps later
        if not self._weight_now:
            return
        logits = unstack_views(output[Keys.PRED], image)[0].detach()
        pseudo_logits = logits
        if self.pseudo_label == "teacher" and output.get("teacher_logits") is not None:
            pseudo_logits = gated(output["teacher_logits"], logits, output.get("gate_weight", logits.new_ones(())))
        mixed_image, mixed_label = self.mix(image, label, logits, pseudo_logits)
        # free the first graph before the second one is built
        output[Keys.PRED] = output[Keys.PRED].detach()
        output[Keys.LOSS] = output[Keys.LOSS].detach()

        scaler = engine.scaler if engine.amp else None
        with autocast_of(engine):
            pred = engine.inferer(mixed_image, engine.network)
            loss = self._weight_now * self.loss(pred, mixed_label).mean()
        output["mixing_loss"] = loss.detach()
        loss = loss / engine.accumulation_steps
        (loss if scaler is None else scaler.scale(loss)).backward()

    @torch.no_grad()
    def mix(self, image: Tensor, label: Tensor, logits: Tensor, pseudo_logits: Tensor) -> tuple[Tensor, Tensor]:
        """
        Mix rows i and B_l + i, for P = min(B_l, B - B_l) pairs.

        Args:
            image: (B, channels, *spatial), labeled rows first.
            label: (B_l, 1, *spatial).
            logits: (B, C, *spatial); their entropy selects the cells.
            pseudo_logits: (B, C, *spatial); their argmax is the pseudo-label.

        Returns:
            Images (2 P, channels, *spatial) and labels (2 P, 1, *spatial); the P mostly unlabeled images come first.
        """
        image, label = without_meta(image), class_numbers(label)
        logits, pseudo_logits = without_meta(logits), without_meta(pseudo_logits)
        num_labeled = len(label)
        num_pairs = min(num_labeled, len(image) - num_labeled)
        if num_pairs == 0:
            raise KnowSAMValueError("`image` must have labeled and unlabeled rows but has only one kind.")
        labeled, unlabeled = slice(num_pairs), slice(num_labeled, num_labeled + num_pairs)
        both = (image[labeled], label[labeled])
        others = (image[unlabeled], predicted_label(pseudo_logits[unlabeled]).to(label.dtype))

        labeled_mask, unlabeled_mask = (self.uncertain_mask(logits[rows]) for rows in (labeled, unlabeled))
        mixed = [
            torch.cat([torch.where(unlabeled_mask, ours, theirs), torch.where(labeled_mask, theirs, ours)])
            for ours, theirs in zip(both, others)
        ]
        return mixed[0], mixed[1]

    def uncertain_mask(self, logits: Tensor) -> Tensor:
        """The cells of highest mean entropy, a bool mask (P, 1, *spatial), for logits (P, C, *spatial)."""
        spatial, grid = logits.shape[2:], self.grid(logits)
        pool = F.adaptive_avg_pool2d if len(spatial) == 2 else F.adaptive_avg_pool3d
        cells = pool(entropy_map(logits.float()), grid).flatten(1)
        mask = torch.zeros_like(cells).scatter_(1, cells.topk(self.num_cells, dim=1).indices, 1.0)
        return F.interpolate(mask.reshape(-1, 1, *grid), size=spatial, mode="nearest") > 0

    def grid(self, image: Tensor) -> tuple[int, ...]:
        """Cells along each spatial axis of an image (B, channels, *spatial)."""
        spatial = image.shape[2:]
        grid = (self.grid_size,) * len(spatial) if isinstance(self.grid_size, int) else self.grid_size
        if len(grid) != len(spatial) or any(cells > size for cells, size in zip(grid, spatial)):
            raise KnowSAMValueError(
                f"`grid_size` must be at most the image's size {tuple(spatial)}, one number for each axis, but is "
                f"{grid}; volumes have three axes, slices two."
            )
        _check_cells(self.num_cells, grid)
        return grid


def _check_cells(num_cells: int, grid: Sequence[int]) -> None:
    if not 0 < num_cells < math.prod(grid):
        raise KnowSAMValueError(
            f"`num_cells` must be between 1 and {math.prod(grid) - 1}, for a grid of {' x '.join(map(str, grid))} "
            f"cells, but is {num_cells}."
        )


def gated(teacher_logits: Tensor, student_logits: Tensor, gate_weight: Tensor) -> Tensor:
    """
    Logits of g p_sam + (1 - g) p_student, (B, C, *spatial); its log-odds for one channel. g is 0-dimensional.

    If g is 0, and at pixels where the teacher is NaN, these are exactly the student's logits; if g is 1, exactly the
    teacher's. If only one of them has a single channel, all have two.
    """
    if teacher_logits.shape[1] != student_logits.shape[1]:  # one channel beside the two classes of a softmax
        teacher_logits, student_logits = class_logits(teacher_logits), class_logits(student_logits)
    teacher, student = class_logits(teacher_logits).log_softmax(1), class_logits(student_logits).log_softmax(1)
    gate_weight = gate_weight.to(teacher.dtype) * ~teacher.isnan().any(1, keepdim=True)
    mixed = torch.logaddexp(teacher + gate_weight.log(), student + (1 - gate_weight).log())
    mixed = mixed if teacher_logits.shape[1] > 1 else mixed[:, 1:] - mixed[:, :1]
    one_sided = torch.where(gate_weight == 1, without_meta(teacher_logits), without_meta(student_logits))
    return torch.where((gate_weight == 0) | (gate_weight == 1), one_sided, mixed)
