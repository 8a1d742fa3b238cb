"""Co-training of two views, also known as Cross Pseudo Supervision (CPS)."""

from __future__ import annotations

from collections.abc import Sequence

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError, check_choice
from knowsam_monai.handlers.supervision import check_exclusive_classes, has_deep_supervision, unlabeled_rows
from knowsam_monai.losses import EntropyLoss, MutualConsistencyLoss
from knowsam_monai.losses.ramp_up import Weight, check_weights, weight_at
from knowsam_monai.tensors import unstack_views


class MultiViewCoTraining:
    """
    Two sub-networks of a multi-view student teach each other; an entropy term makes both more confident.

    .. math:: L + \\lambda_m(t) L_{mut} + w_{ent} L_{ent}

    The handler writes `mutual_loss` and `entropy_loss`, weighted and detached, into ``engine.state.output``.

    With :class:`knowsam_monai.networks.StackedNetworks` of two networks, hard targets, ``views=(0, 1)`` and
    ``entropy_weight=0``, this is Cross Pseudo Supervision (CPS). The public ACDC code of CPS (SSL4MIS) uses the
    unlabeled rows only and the weight ``SigmoidRampUp(max_iterations, max=0.1)``.

    Args:
        mutual_weight: lambda_m, a number or a function of the iteration such as
            :class:`knowsam_monai.losses.SigmoidRampUp`. The paper (eq. 14):
            exp(-5 (1 - t/t_max)^2). 0 switches the term off.
        entropy_weight: w_ent, a number or a function of the iteration, for entropies in units of log C; the paper: 0.9.
            0 switches the term off.
        target: "hard" (the paper, as in CPS) or "soft" (the authors' code).
        views: which two views learn from each other; (1, 2) are U-Net and V-Net.
        rows: rows in the mutual loss, "all" (both papers) or "unlabeled".

    Shape:
        pred: (B, V, C, *spatial), views stacked along dimension 1.

    Raises:
        ValueError: if an argument is not as described; at the first step if the student lacks these views, or if
            `rows` is "unlabeled" and the batch has no unlabeled rows.

    Example::

        SupervisedTrainer(..., network=MultiViewNet(), train_handlers=[MultiViewCoTraining(SigmoidRampUp(50000))])
        cps = MultiViewCoTraining(SigmoidRampUp(30000, max=0.1), entropy_weight=0, views=(0, 1))     # StackedNetworks

    Reference: Huang et al., IEEE TMI 2025, arXiv:2412.13742, eq. 5, 13 and 14. Chen et al., CVPR 2021 (CPS).
    """

    @check_types
    def __init__(
        self,
        mutual_weight: Weight = 1.0,
        entropy_weight: Weight = 0.9,
        target: str = "hard",
        views: Sequence[int] = (1, 2),
        rows: str = "all",
    ) -> None:
        if len(set(views)) != 2 or len(views) != 2 or min(views) < 0:
            raise KnowSAMValueError(f"`views` must be the numbers of two different views, from 0 on, but is {views}.")
        check_weights(mutual_weight=mutual_weight, entropy_weight=entropy_weight)
        check_choice("rows", rows, ("all", "unlabeled"))
        self.mutual_weight = mutual_weight
        self.entropy_weight = entropy_weight
        self.views = tuple(views)
        self.rows = rows
        self.mutual_loss = MutualConsistencyLoss(target=target)
        self.entropy_loss = EntropyLoss()

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_exclusive_classes)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def started(self, engine: Engine) -> None:
        """Refuse a student whose outputs are heads of deep supervision."""
        if has_deep_supervision(engine.network):
            raise KnowSAMValueError(
                f"`views` must be views of a multi-view student such as MultiViewNet or StackedNetworks but "
                f"{type(engine.network).__name__} stacks heads of its deep supervision; leave co-training out (in a "
                "bundle: --train#method#_disabled_ True)."
            )

    def __call__(self, engine: Engine) -> None:
        output = engine.state.output
        views = unstack_views(output[Keys.PRED], output[Keys.IMAGE])
        if max(self.views) >= len(views) == 2:
            raise KnowSAMValueError(
                f"`views` must be (0, 1) for a student of two views but is {self.views}; published CPS also has "
                "`entropy_weight=0`."
            )
        if max(self.views) >= len(views):
            raise KnowSAMValueError(
                f"`pred` must have the stacked views {self.views} but has {len(views)}; co-training needs a multi-view "
                "student such as MultiViewNet or StackedNetworks (in a bundle: add --train#method#_disabled_ True, or "
                "a method for one view, as in --with network_plain,mean_teacher)."
            )
        first, second = (views[v] for v in self.views)
        mutual_weight, entropy_weight = (
            weight_at(weight, engine.state.iteration) for weight in (self.mutual_weight, self.entropy_weight)
        )
        terms = {}
        if mutual_weight:
            rows = slice(None) if self.rows == "all" else unlabeled_rows(output)
            terms["mutual_loss"] = mutual_weight * self.mutual_loss(first[rows], second[rows])
        if entropy_weight:
            terms["entropy_loss"] = entropy_weight * (self.entropy_loss(first) + self.entropy_loss(second))
        for name, term in terms.items():
            output[Keys.LOSS] = output[Keys.LOSS] + term
            output[name] = term.detach()
