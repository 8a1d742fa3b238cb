"""What published weights were trained on and under which terms they come, known by the names of their files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch import nn


class Origin(NamedTuple):
    """
    Where a teacher's weights come from; None where it is not known.

    Args:
        pretrained_on: data, with a source.
        license: of the weights.

    Example::

        >>> Origin(pretrained_on="our scans of 2019").license is None
        True
    """

    pretrained_on: str | None = None
    license: str | None = None


# the sources: the papers, and the README or model card beside the weights
PUBLISHED = {
    r"^sam_vit_[blh]_": Origin("SA-1B, natural images (arXiv:2304.02643)", "Apache-2.0"),
    r"^sam2(\.1)?[-_]hiera[-_]": Origin(
        "SA-1B, SA-V and Meta's internal videos, natural images (arXiv:2408.00714)", "Apache-2.0"
    ),
    r"^medsam_vit_b": Origin(
        "public medical sets of 10 modalities (arXiv:2304.12306); look for your test patients in its list", "Apache-2.0"
    ),
    r"^medsam2": Origin(
        "public medical sets and videos (arXiv:2504.03600); look for your test patients in its list", "CC-BY-SA-4.0"
    ),
    r"^procedural$": Origin("procedural images: a stand-in, not SAM", "Apache-2.0"),
}


def origin(teacher: nn.Module) -> Origin:
    """
    What a teacher says of its weights, or else what the name of its checkpoint tells.

    A name proves nothing: a file that was trained on keeps it. Give the teacher `pretrained_on` where you know more.

    Args:
        teacher: with `pretrained_on` and `license`, or with the path of its weights as `checkpoint`, or neither.

    Example::

        >>> from knowsam_monai.networks import SAMTeacher
        >>> origin(SAMTeacher(num_classes=2, image_size=64, variant="vit_t", trainable="all"))
        Origin(pretrained_on=None, license=None)
    """
    checkpoint = getattr(teacher, "checkpoint", None)
    name = "" if checkpoint is None else Path(checkpoint).name.lower()
    known = next((found for pattern, found in PUBLISHED.items() if re.search(pattern, name)), Origin())
    said = (getattr(teacher, "pretrained_on", None), getattr(teacher, "license", None))
    return Origin(*(known_value if value is None else value for value, known_value in zip(said, known)))
