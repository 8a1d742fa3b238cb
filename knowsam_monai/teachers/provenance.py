"""Training data and licenses of published weights, recognized by their path."""

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
    r"^sam_vit_[blh](_|$)": Origin("SA-1B, natural images (arXiv:2304.02643)", "Apache-2.0"),
    r"(^|--)sam2(\.1)?[-_]hiera[-_]": Origin(
        "SA-1B, SA-V and Meta's internal videos, natural images (arXiv:2408.00714)", "Apache-2.0"
    ),
    r"(^|--)medsam[-_]vit[-_]b": Origin(
        "public medical sets of 10 modalities (arXiv:2304.12306); check its list for your test patients", "Apache-2.0"
    ),
    r"(^|--)medsam2": Origin(
        "public medical sets and videos (arXiv:2504.03600); check its list for your test patients", "CC-BY-SA-4.0"
    ),
    r"^mobile_sam": Origin("a hundredth of SA-1B, from SAM's vit_h (arXiv:2306.14289)", "Apache-2.0"),
    r"^procedural$": Origin("procedural images: a stand-in, not SAM", "Apache-2.0"),
}


def origin(teacher: nn.Module) -> Origin:
    """
    Provenance of a teacher's weights: from its attributes, or else from the path of its checkpoint.

    Published weights are recognized by the name of the file or of a folder in its path, so that a file in a folder of
    the hub is recognized too. A name proves nothing, since fine-tuned weights often keep it. Set `pretrained_on` if you
    know more.

    Args:
        teacher: with the attributes `pretrained_on` and `license`, with the path `checkpoint`, or with none of them.

    Example::

        >>> from knowsam_monai.teachers import SAMTeacher
        >>> origin(SAMTeacher(num_classes=2, image_size=64, variant="stand_in", trainable="all"))
        Origin(pretrained_on=None, license=None)
    """
    checkpoint = getattr(teacher, "checkpoint", None)
    names = [] if checkpoint is None else [part.lower() for part in reversed(Path(checkpoint).parts)]
    known = next(
        (known for name in names for pattern, known in PUBLISHED.items() if re.search(pattern, name)), Origin()
    )
    stated = (getattr(teacher, "pretrained_on", None), getattr(teacher, "license", None))
    return Origin(*(known_value if value is None else value for value, known_value in zip(stated, known)))


def named(teacher: nn.Module) -> str:
    """
    A teacher's class and variant.

    Example::

        >>> named(nn.Identity())
        'Identity'
    """
    inner = getattr(teacher, "sam_teacher", teacher)
    name = f"{type(inner).__name__} {getattr(inner, 'variant', '')}".rstrip()
    return name if inner is teacher else f"{name} on slices"


def describe(teacher: nn.Module) -> str:
    """
    A teacher in one line: class, variant, weights, their training data and license.

    Args:
        teacher: any module; what neither it nor the name of its checkpoint states is called unknown.

    Example::

        >>> describe(nn.Identity())
        'Identity, NOT pretrained: random weights'
    """
    name = named(teacher)
    if not getattr(teacher, "pretrained", False):
        return f"{name}, NOT pretrained: random weights"
    checkpoint = getattr(teacher, "checkpoint", None)
    weights = "pretrained" if checkpoint is None else f"weights of {Path(checkpoint).name}"
    pretrained_on, license = origin(teacher)
    return f"{name}, {weights}, trained on {pretrained_on or 'unknown data'}, license {license or 'unknown'}"
