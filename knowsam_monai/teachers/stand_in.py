"""The stand-in for SAM's weights: `stand_in`, pretrained on procedural images. It is not SAM."""

from __future__ import annotations

import logging
from pathlib import Path

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError

logger = logging.getLogger(__name__)

STAND_IN = "procedural"
WEIGHTS = Path(__file__).parent / "weights" / "stand_in.pt"


def stand_in_checkpoint(variant: str) -> Path:
    """Return the file behind ``checkpoint="procedural"``, with a warning that it is not SAM.

    Raises:
        ValueError: if the variant is not ``stand_in``.
        FileNotFoundError: if the weights do not exist; the message contains the command that trains them.

    Example::

        sam = build_sam("stand_in", image_size=128, checkpoint="procedural")
    """
    if variant != "stand_in":
        raise KnowSAMValueError(
            f"`checkpoint` must be a file with SAM's weights for {variant} but is {STAND_IN!r}, which exists for "
            "stand_in only; set `variant` to 'stand_in' or `checkpoint` to a file."
        )
    if not WEIGHTS.is_file():
        raise KnowSAMFileNotFoundError(
            f"`checkpoint` {STAND_IN!r} needs {WEIGHTS}, which does not exist; create it in the project's root with "
            f"`python -m pretraining.pretrain_stand_in --output {WEIGHTS}`."
        )
    logger.warning("The teacher is a stand-in pretrained on procedural images, NOT SAM.")
    return WEIGHTS
