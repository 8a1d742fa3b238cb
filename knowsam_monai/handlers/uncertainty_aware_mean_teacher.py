"""Uncertainty-aware Mean Teacher (UA-MT)."""

from __future__ import annotations

import math

from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import check_choice, check_counts
from knowsam_monai.handlers.supervision import check_exclusive_classes, unlabeled_rows, weight_now
from knowsam_monai.losses import SigmoidRampUp, SoftmaxMSELoss, entropy_map
from knowsam_monai.losses.ramp_up import Weight, check_weights
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.noisy_passes import NoisyPasses
from knowsam_monai.tensors import class_logits, unstack_views, without_meta


class UncertaintyAwareMeanTeacher:
    """
    UA-MT: Mean Teacher on the pixels where the averaged student is certain.

    .. math::
        \\bar p = \\frac1T \\sum_{k=1}^{T} \\text{softmax} f_{\\theta'}(x + \\eta_k), \\qquad
        m = [H(\\bar p) < (\\tfrac34 + \\tfrac14 e^{-5 (1 - t/t_{max})^2}) \\log C]

    .. math::
        L + w(t) \\frac{\\sum m \\sum_c (p_c - q_c)^2}{C \\sum m}, \\qquad
        q = \\text{softmax} f_{\\theta'}(x + \\eta_0)

    p is the student's prediction; q is one more noisy pass, not the mean. x are the unlabeled rows. If no pixel is
    certain, the term is 0. The handler writes `consistency_loss` (weighted) and `certain_fraction` (of the pixels),
    detached, into ``engine.state.output``. Only view 0 of a multi-view student takes part.

    The public code (SSL4MIS, ACDC) always uses log 2 and 2 in place of log C and C (``num_classes=2``), and runs the
    averaged student in train mode, with the statistics of the batch (``ema_mode="train"``). The paper sums over all
    rows (``rows="all"``); the code, and the default here, over the unlabeled ones. Unlike its Mean Teacher, the code
    starts the term at once.

    Args:
        ema_student: the averaged student; the handler attaches it too.
        max_iterations: t_max, the length of the run.
        weight: w, a number or a function of the iteration. SSL4MIS: ``SigmoidRampUp(max_iterations, max=0.1)``.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. Averaging starts
            at once.
        num_passes: T, 1 or more.
        passes_at_once: number of the T + 1 passes that run as one batch; None: all. Fewer need less memory.
        num_classes: C in threshold and divisor, 2 or more; None: the student's.
        rows: "unlabeled" or "all".
        ema_mode: "dropout" (normalization uses its running statistics), "eval" or "train", see
            :meth:`knowsam_monai.networks.EMAStudent.logits`.
        noise_std: standard deviation of the noise eta, for images in 0..1.
        noise_clip: the noise is clipped to +- this value.
        seed: noise and dropout are functions of the seed and the iteration.

    Raises:
        ValueError: if an argument is not as described, or a batch has no unlabeled rows.

    Example::

        weight = SigmoidRampUp(30000, max=0.1)
        handler = UncertaintyAwareMeanTeacher(EMAStudent(network, optimizer), max_iterations=30000, weight=weight)
        SupervisedTrainer(..., network=network, optimizer=optimizer, train_handlers=[handler])

    Reference: Yu et al., "Uncertainty-aware Self-ensembling Model", MICCAI 2019, arXiv:1907.07034.
    """

    @check_types
    def __init__(
        self,
        ema_student: EMAStudent,
        max_iterations: int,
        weight: Weight = 0.1,
        start: int = 0,
        num_passes: int = 8,
        passes_at_once: int | None = None,
        num_classes: int | None = None,
        rows: str = "unlabeled",
        ema_mode: str = "dropout",
        noise_std: float = 0.1,
        noise_clip: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_weights(weight=weight)
        check_choice("rows", rows, ("unlabeled", "all"))
        check_counts(num_passes=num_passes)
        self.ema_student = ema_student
        self.weight = weight
        self.start = start
        self.num_passes = num_passes
        self.num_classes = num_classes
        self.rows = rows
        self.ramp_up = SigmoidRampUp(max_iterations)
        self.passes = NoisyPasses(ema_student, ema_mode, noise_std, noise_clip, seed, passes_at_once)
        self.loss = SoftmaxMSELoss(num_classes)

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer, and the averaged student with it."""
        self.ema_student.attach(engine)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_exclusive_classes)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output, iteration = engine.state.output, engine.state.iteration
        weight = weight_now(engine, self.weight, self.start, needs_unlabeled=self.rows != "all")
        if not weight:
            return
        rows = slice(None) if self.rows == "all" else unlabeled_rows(output)
        image = without_meta(output[Keys.IMAGE])[rows]
        student_logits = unstack_views(output[Keys.PRED], output[Keys.IMAGE])[0][rows]
        passes = self.passes(image, iteration, self.num_passes + 1, engine.inferer)
        target_logits, certain_mask = passes[0], self.certain_mask(passes[1:], iteration)
        term = weight * self.loss(student_logits, target_logits, certain_mask)
        output[Keys.LOSS] = output[Keys.LOSS] + term
        output["consistency_loss"] = term.detach()
        output["certain_fraction"] = certain_mask.float().mean()

    def certain_mask(self, logits: Tensor, iteration: int) -> Tensor:
        """Where the mean of T passes is certain, a bool mask (B, 1, *spatial), for logits (T, B, C, *spatial)."""
        log_probs = class_logits(logits.flatten(0, 1)).log_softmax(dim=1).unflatten(0, logits.shape[:2])
        uncertainty_map = entropy_map(log_probs.logsumexp(dim=0))  # softmax removes the factor T of the mean
        num_classes = log_probs.shape[2] if self.num_classes is None else self.num_classes
        return uncertainty_map < (0.75 + 0.25 * self.ramp_up(iteration)) * math.log(num_classes)
