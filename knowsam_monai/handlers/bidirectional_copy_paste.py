"""Bidirectional copy-paste (BCP)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.transforms import KeepLargestConnectedComponent
from monai.utils import CommonKeys as Keys
from torch import Tensor

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.handlers.supervision import autocast_of, check_ignores, check_one_channel
from knowsam_monai.losses.ramp_up import Weight, check_weights, weight_at
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.seeds import derive_seed
from knowsam_monai.tensors import class_numbers, predicted_label

PSEUDO_LABEL = "pseudo_label"


class BidirectionalCopyPaste:
    """
    BCP: before each step, replace the batch with mixtures of labeled and unlabeled images.

    A random box M covers 2/3 of each axis. Row i is paired with row B_l + i. Half of the pairs give

    .. math::
        x = M x_u + (1 - M) x_l \\qquad \\text{and the others} \\qquad x = M x_l + (1 - M) x_u

    The loss is that of the labeled pixels plus `weight` times that of the unlabeled ones against q: the argmax of the
    averaged student, reduced to the largest component of each class:

    .. math:: L(f(x), y) + w L(f(x), q)

    The new batch has the true labels, and `ignore_index` at all other pixels. The trainer's own loss is therefore the
    first term, and SAM learns from true labels only. The handler adds the second term and writes it, weighted and
    detached, as `pseudo_label_loss` into ``engine.state.output``. Both losses must ignore `ignore_index`; for SAM use
    ``SAMDistiller(sam_loss=dice_ce_loss(num_classes, ignore_index=255))``. The new batch has `image` and `label` only.
    Cached SAM embeddings do not fit mixed images, so SAM's encoder must be "adapted".

    The first `pretraining` iterations mix *labeled* rows with each other, so all pixels have true labels. The averaged
    student starts from the student at the end of pre-training. The public code instead continues with the model that
    was best on validation during pre-training. It also computes the loss of each direction (in pre-training, of the
    inside and the outside of the box) separately and adds the two; here they are one batch, so its (Dice + CE) / 2
    corresponds to Dice + CE here. Its averaged student is in train mode (``ema_mode="train"``).

    Args:
        ema_student: the averaged student; BCP: ``EMAStudent(network, optimizer, warm_up=False, buffers="average")``.
        loss: the trainer's own loss, ``f(pred, label)`` on all rows, which ignores `ignore_index`:
            ``PartiallyLabeledLoss(dice_ce_loss(num_classes, ignore_index=255))``.
        pretraining: iterations of pre-training, 0 for none; self-training starts with the next iteration. Published:
            10,000 of 40,000 (ACDC), 2,000 of 17,000 (LA).
        weight: w, for the unlabeled pixels, a number or a function of the iteration; published: 0.5.
        box_fraction: fraction of each axis that the box covers; published: 2/3.
        ignore_index: label value of pixels without a true label.
        ema_mode: "eval", "dropout" or "train", see :meth:`knowsam_monai.networks.EMAStudent.logits`.
        seed: the box is a function of the seed and the iteration.

    Raises:
        ValueError: if an argument is out of range; at the start, if a loss is known not to ignore `ignore_index`; at a
            step, if a batch lacks the rows to mix.

    Example::

        loss = PartiallyLabeledLoss(dice_ce_loss(num_classes=4, ignore_index=255))
        ema_student = EMAStudent(network, optimizer, warm_up=False, buffers="average")
        SupervisedTrainer(..., loss_function=loss, train_handlers=[BidirectionalCopyPaste(ema_student, loss)])

    Reference: Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023,
    arXiv:2305.00673.
    """

    @check_types
    def __init__(
        self,
        ema_student: EMAStudent,
        loss: Callable[[Tensor, Tensor], Tensor],
        pretraining: int = 10000,
        weight: Weight = 0.5,
        box_fraction: float = 2 / 3,
        ignore_index: int = 255,
        ema_mode: str = "eval",
        seed: int = 0,
    ) -> None:
        if not 0 < box_fraction < 1:
            raise KnowSAMValueError(f"`box_fraction` must be between 0 and 1 but is {box_fraction}; published: 2/3.")
        if pretraining < 0:
            raise KnowSAMValueError(f"`pretraining` must be 0 iterations or more but is {pretraining}.")
        check_weights(weight=weight)
        ema_student.check_mode(ema_mode)
        self.ema_student = ema_student
        self.loss = loss
        self.pretraining = pretraining
        self.weight = weight
        self.box_fraction = box_fraction
        self.ignore_index = ignore_index
        self.ema_mode = ema_mode
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.state.ignore_index = self.ignore_index  # for SAMDistillation
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_STARTED, self.replace_batch)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.ema_student.unfollow)

    def started(self, engine: Engine) -> None:
        """Refuse losses that do not ignore the pixels without a true label, and the average of another student."""
        self.ema_student.check_trainer(engine)
        check_ignores("loss_function", getattr(engine, "loss_function", None), self.ignore_index)
        check_ignores("loss", self.loss, self.ignore_index)

    def __call__(self, engine: Engine) -> None:
        output, batch = engine.state.output, engine.state.batch
        if PSEUDO_LABEL not in batch:
            return
        weight = weight_at(self.weight, engine.state.iteration)
        term = weight * self.loss(output[Keys.PRED], batch[PSEUDO_LABEL]).mean()
        output[Keys.LOSS] = output[Keys.LOSS] + term
        output["pseudo_label_loss"] = term.detach()

    @torch.no_grad()
    def replace_batch(self, engine: Engine) -> None:
        """Replace ``engine.state.batch`` with mixed rows."""
        batch, iteration = engine.state.batch, engine.state.iteration
        if not isinstance(batch, Mapping) or Keys.LABEL not in batch:
            raise KnowSAMValueError("`batch` must be a dictionary with `image` and `label` but is not.")
        image, label = (
            class_numbers(batch[key]).to(engine.state.device, non_blocking=engine.non_blocking)
            for key in (Keys.IMAGE, Keys.LABEL)
        )
        label = label.byte() if label.dtype == torch.bool else label
        check_one_channel(label, image)
        limits = None if label.is_floating_point() else torch.iinfo(label.dtype)
        if limits is not None and not limits.min <= self.ignore_index <= limits.max:
            raise KnowSAMValueError(
                f"`label` must have a type that holds the `ignore_index` {self.ignore_index} but has {label.dtype}; "
                "use int64 labels."
            )
        box_mask = self.box_mask(image, iteration)
        if iteration <= self.pretraining + 1:
            self.ema_student.restart()  # the average starts from the student at the end of pre-training
        if iteration <= self.pretraining:
            engine.state.batch = self.mix_labeled(image, label, box_mask)
            return
        self.ema_student.follow()
        num_pairs = min(len(label), len(image) - len(label))
        if num_pairs == 0:
            raise KnowSAMValueError("`image` must have labeled and unlabeled rows but has only one kind.")
        unlabeled_image = image[len(label) :][:num_pairs]
        with autocast_of(engine):
            pseudo_logits = self.ema_student.logits(unlabeled_image, self.ema_mode, engine.inferer)
        pseudo_label = self.pseudo_label(pseudo_logits)
        engine.state.batch = self.mix(
            (image[:num_pairs], label[:num_pairs]), (unlabeled_image, pseudo_label.to(label.dtype)), box_mask
        )

    def mix_labeled(self, image: Tensor, label: Tensor, box_mask: Tensor) -> dict[str, Tensor]:
        """Mix labeled rows: the first half of them inside the box, the second half outside."""
        half = len(label) // 2
        if half == 0:
            raise KnowSAMValueError(
                f"`label` must have 2 rows or more in pre-training but has {len(label)}; pre-training mixes them."
            )
        first, second = slice(half), slice(half, 2 * half)
        return {
            key: torch.where(box_mask, x[first], x[second]) for key, x in ((Keys.IMAGE, image), (Keys.LABEL, label))
        }

    def mix(
        self, labeled: tuple[Tensor, Tensor], unlabeled: tuple[Tensor, Tensor], box_mask: Tensor
    ) -> dict[str, Tensor]:
        """
        Mix P labeled rows with P unlabeled ones.

        Args:
            labeled: image (P, channels, *spatial) and label (P, 1, *spatial).
            unlabeled: image and pseudo-label of the same shapes. box_mask: (1, 1, *spatial), bool.

        Returns:
            Image, label and pseudo-label of P rows; in the first (P + 1) // 2 rows the box is unlabeled.
        """
        (image, label), (unlabeled_image, pseudo_label) = labeled, unlabeled
        box_is_unlabeled = torch.arange(len(image), device=image.device) < (len(image) + 1) // 2
        true_mask = box_mask != box_is_unlabeled.reshape(-1, *[1] * (image.ndim - 1))
        ignored = torch.full_like(label, self.ignore_index)
        return {
            Keys.IMAGE: torch.where(true_mask, image, unlabeled_image),
            Keys.LABEL: torch.where(true_mask, label, ignored),
            PSEUDO_LABEL: torch.where(true_mask, ignored, pseudo_label),
        }

    def pseudo_label(self, logits: Tensor) -> Tensor:
        """The argmax of logits (B, C, *spatial), with only the largest component of each class, (B, 1, *spatial)."""
        num_classes = max(logits.shape[1], 2)
        keep = KeepLargestConnectedComponent(applied_labels=range(1, num_classes), is_onehot=False)
        return torch.stack([torch.as_tensor(keep(row)) for row in predicted_label(logits).to(torch.uint8)])

    def box_mask(self, image: Tensor, iteration: int) -> Tensor:
        """The box of an iteration, a bool mask (1, 1, *spatial)."""
        draw = random.Random(derive_seed(self.seed, iteration))
        mask = torch.zeros((1, 1, *image.shape[2:]), dtype=torch.bool, device=image.device)
        box = mask
        for axis, size in enumerate(image.shape[2:], start=2):
            length = max(1, int(size * self.box_fraction))
            box = box.narrow(axis, draw.randrange(size - length + 1), length)
        box.fill_(True)
        return mask
