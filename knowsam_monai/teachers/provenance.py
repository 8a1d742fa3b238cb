"""Training data and licenses of published weights, recognized by file name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch import nn


class Origin(NamedTuple):
    """
    Provenance of a teacher's weights; None if unknown.

    Args:
        pretrained_on: the training data and its source.
        license: license of the weights.

    Example::

        >>> Origin(pretrained_on="our scans of 2019").license is None
        True
    """

    pretrained_on: str | None = None
    license: str | None = None


# sources: the papers, and the README or model card of the weights
PUBLISHED = {
    r"^sam_vit_[blh]_": Origin("SA-1B, natural images (arXiv:2304.02643)", "Apache-2.0"),
    r"^sam2(\.1)?[-_]hiera[-_]": Origin(
        "SA-1B, SA-V and Meta's internal videos, natural images (arXiv:2408.00714)", "Apache-2.0"
    ),
    r"^medsam_vit_b": Origin(
        "public medical sets of 10 modalities (arXiv:2304.12306); check its list for your test patients", "Apache-2.0"
    ),
    r"^medsam2": Origin(
        "public medical sets and videos (arXiv:2504.03600); check its list for your test patients", "CC-BY-SA-4.0"
    ),
    r"^procedural$": Origin("procedural images: a stand-in, not SAM", "Apache-2.0"),
}


def origin(teacher: nn.Module) -> Origin:
    """
    Provenance of a teacher's weights: from its attributes, or else from the file name of its checkpoint.

    A file name proves nothing, since fine-tuned weights often keep it. Set `pretrained_on` if you know more.

    Args:
        teacher: with the attributes `pretrained_on` and `license`, with the path `checkpoint`, or with none of them.

    Example::

        >>> from knowsam_monai.teachers import SAMTeacher
        >>> origin(SAMTeacher(num_classes=2, image_size=64, variant="stand_in", trainable="all"))
        Origin(pretrained_on=None, license=None)
    """
    checkpoint = getattr(teacher, "checkpoint", None)
    name = "" if checkpoint is None else Path(checkpoint).name.lower()
    known = next((found for pattern, found in PUBLISHED.items() if re.search(pattern, name)), Origin())
    stated = (getattr(teacher, "pretrained_on", None), getattr(teacher, "license", None))
    return Origin(*(by_name if value is None else value for value, by_name in zip(stated, known)))
