"""FixMatch."""

from __future__ import annotations

from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor

from knowsam_monai import ranks
from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.handlers.supervision import check_exclusive_classes, unlabeled_rows
from knowsam_monai.losses import PseudoLabelLoss
from knowsam_monai.losses.ramp_up import Weight, check_weights, weight_at
from knowsam_monai.tensors import unstack_views, without_meta
from knowsam_monai.wrappers import plain_network

IMAGE_STRONG = "image_strong"


class FixMatch:
    """
    FixMatch for segmentation: confident pseudo-labels of an image supervise its strongly augmented version.

    .. math::
        L + \\frac{w(t)}{N} \\sum_i [\\max_c q_{ic} \\ge \\tau] \\, CE(f_\\theta(x_{strong})_i, \\arg\\max_c q_{ic}),
        \\qquad q = \\text{stopgrad softmax} f_\\theta(x)

    The sum runs over the pixels of the unlabeled rows. Pixels below the threshold are ignored (in SSL4MIS they become
    background). q is the trainer's own prediction, in train mode. The strong images take one more forward pass, of the
    unlabeled rows only. ``engine.state.batch["image_strong"]`` holds them, for all rows or for the unlabeled ones; they
    differ from `image` in intensity only, not in geometry. The handler writes `pseudo_label_loss` (weighted) and
    `sure_fraction` (of the pixels), detached, into ``engine.state.output``. In a multi-view student, view 0 teaches and
    learns.

    Args:
        weight: w, a number or a function of the iteration; the paper uses 1.
        threshold: tau, 0..1; the paper uses 0.95.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning.

    Raises:
        ValueError: if an argument is not as described, or a batch lacks unlabeled rows or a matching `image_strong`.

    Example::

        SupervisedTrainer(..., train_handlers=[FixMatch()])

    Reference: Sohn et al., NeurIPS 2020, arXiv:2001.07685, eq. 4; Yang et al., UniMatch, CVPR 2023, arXiv:2208.09910.
    """

    @check_types
    def __init__(self, weight: Weight = 1.0, threshold: float = 0.95, start: int = 0) -> None:
        check_weights(weight=weight)
        self.weight = weight
        self.start = start
        self.loss = PseudoLabelLoss(threshold)

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_exclusive_classes)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output, iteration = engine.state.output, engine.state.iteration
        weight = weight_at(self.weight, iteration, self.start)
        if not weight and iteration > 1:
            return
        rows = unlabeled_rows(output)
        image = self.strong_image(engine, rows)
        if not weight:  # the first step only checks that the batch has strong images
            return
        weak_logits = unstack_views(output[Keys.PRED], output[Keys.IMAGE])[0][rows].detach()
        # DistributedDataParallel expects one forward per backward; its hooks see the sum of both
        network = plain_network(engine.network) if ranks.is_distributed() else engine.network
        strong_logits = unstack_views(engine.inferer(image, network), image)[0]
        pseudo_label, sure_mask = self.loss.pseudo_label(weak_logits)
        term = weight * self.loss.masked(strong_logits, pseudo_label, sure_mask)
        output[Keys.LOSS] = output[Keys.LOSS] + term
        output["pseudo_label_loss"] = term.detach()
        output["sure_fraction"] = sure_mask.float().mean()

    def strong_image(self, engine: Engine, rows: slice) -> Tensor:
        """The strongly augmented images of the unlabeled rows, (B_u, channels, *spatial), on the trainer's device."""
        image, batch = without_meta(engine.state.output[Keys.IMAGE]), engine.state.batch
        strong = batch.get(IMAGE_STRONG) if isinstance(batch, dict) else None
        if strong is None:
            raise KnowSAMValueError(
                f"`{IMAGE_STRONG}` must be in the batch but is not; add a copy of `image` with stronger intensity "
                "augmentation to every item."
            )
        strong = without_meta(strong).to(image, non_blocking=engine.non_blocking)
        strong = strong[rows] if len(strong) == len(image) else strong
        if strong.shape != image[rows].shape:
            raise KnowSAMValueError(
                f"`{IMAGE_STRONG}` must have the shape {tuple(image[rows].shape)} of the unlabeled images but has "
                f"{tuple(strong.shape)}; let strong augmentation change intensities only."
            )
        return strong
