from __future__ import annotations

from ignite.engine import Engine
from monai.utils import CommonKeys as Keys

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.losses.supervised import check_loss_takes


def check_supervision(engine: Engine) -> None:
    """
    Say in one sentence that a bare loss is about to see fewer labels than rows, before it fails on shapes.

    Every method that brings unlabeled rows along registers it with ``IterationEvents.FORWARD_COMPLETED``, which a
    MONAI trainer fires right before its loss.

    Raises:
        ValueError: when the batch has unlabeled rows and the trainer's loss is torch's or MONAI's own.
    """
    image, label = engine.state.output[Keys.IMAGE], engine.state.output.get(Keys.LABEL)
    if label is not None:
        check_loss_takes(getattr(engine, "loss_function", None), num_rows=len(image), num_labels=len(label))


def unlabeled_rows(output: dict) -> slice:
    """
    The rows of a trainer's output that have no label: those after the labeled ones.

    Raises:
        ValueError: when every row has a label, so that a method for unlabeled rows would silently do nothing.
    """
    num_rows, label = len(output[Keys.IMAGE]), output.get(Keys.LABEL)
    num_labeled = 0 if label is None else len(label)
    if num_labeled >= num_rows:
        raise KnowSAMValueError(
            f"`image` must have unlabeled rows after the {num_labeled} labeled ones but has {num_rows} rows; give "
            "unlabeled items no label key, as SemiSupervisedLoader does, or leave this method out."
        )
    return slice(num_labeled, None)
