"""Mean Teacher."""

from __future__ import annotations

from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import check_choice
from knowsam_monai.handlers.supervision import check_exclusive_classes, unlabeled_rows, weight_now
from knowsam_monai.losses import SoftmaxMSELoss
from knowsam_monai.losses.ramp_up import Weight, check_weights
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.networks.noisy_passes import NoisyPasses
from knowsam_monai.tensors import unstack_views, without_meta


class MeanTeacher:
    """
    Mean Teacher: the student learns to agree with the average of its past weights, which sees a noisy image.

    .. math:: L + w(t) \\cdot \\text{mean} (\\text{softmax} f_\\theta(x) - \\text{softmax} f_{\\theta'}(x + \\eta))^2

    x are the unlabeled rows. The handler writes `consistency_loss`, weighted and detached, into
    ``engine.state.output``. Only view 0 of a multi-view student takes part.

    The defaults are those of SSL4MIS, the public benchmark code, on ACDC, except for the ramp-up of `weight`, which
    needs the length of the run. The paper includes the labeled rows (``rows="all"``) and raises alpha to 0.999 after
    its ramp-up; SSL4MIS uses the unlabeled rows only. Both run the averaged student in train mode, in which batch
    normalization uses the statistics of the batch (``ema_mode="train"``); the default here uses dropout with the
    running statistics. SSL4MIS raises the weight every 150 iterations; here it rises at every iteration.

    Args:
        ema_student: the averaged student; the handler attaches it too.
        weight: w, a number or a function of the iteration. SSL4MIS: ``SigmoidRampUp(max_iterations, max=0.1)``.
        start: first iteration with the term, counted from 1; 0 and 1 both mean from the beginning. The default is
            that of SSL4MIS, 1,000 of 30,000 (its first term comes one iteration later). Averaging starts at once.
        rows: "unlabeled" or "all".
        ema_mode: "dropout", "eval" (no dropout) or "train", see
            :meth:`~knowsam_monai.networks.EMAStudent.logits`.
        noise_std: standard deviation of the noise eta, for images in 0..1.
        noise_clip: the noise is clipped to +- this value.
        seed: noise and dropout are functions of the seed and the iteration.

    Raises:
        ValueError: if `rows`, `ema_mode` or the noise is not as described, or a batch has no unlabeled rows.

    Example::

        handler = MeanTeacher(EMAStudent(network, optimizer), weight=SigmoidRampUp(30000, max=0.1))
        SupervisedTrainer(..., network=network, optimizer=optimizer, train_handlers=[handler])

    Reference: Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780.
    """

    @check_types
    def __init__(
        self,
        ema_student: EMAStudent,
        weight: Weight = 0.1,
        start: int = 1000,
        rows: str = "unlabeled",
        ema_mode: str = "dropout",
        noise_std: float = 0.1,
        noise_clip: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_weights(weight=weight)
        check_choice("rows", rows, ("unlabeled", "all"))
        self.ema_student = ema_student
        self.weight = weight
        self.start = start
        self.rows = rows
        self.passes = NoisyPasses(ema_student, ema_mode, noise_std, noise_clip, seed)
        self.loss = SoftmaxMSELoss()

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
        target_logits = self.passes(image, iteration, inferer=engine.inferer)[0]
        term = weight * self.loss(student_logits, target_logits)
        output[Keys.LOSS] = output[Keys.LOSS] + term
        output["consistency_loss"] = term.detach()
