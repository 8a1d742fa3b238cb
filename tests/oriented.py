"""A tiny image and a loader of random ones, for tests of orientations."""

from __future__ import annotations

import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose

from knowsam_monai.data import SemiSupervisedLoader

BOTH = {"keys": ["image", "label"], "allow_missing_keys": True}
SQUARE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])


def items(num: int, labeled: bool) -> list[dict]:
    rows = [{"image": MetaTensor(torch.rand(1, 8, 8))} for _ in range(num)]
    return [{**row, "label": row["image"].round()} for row in rows] if labeled else rows


def loader(*transforms, num_workers: int = 0) -> SemiSupervisedLoader:
    torch.manual_seed(0)
    pipelines = [Compose(transforms), Compose(transforms)]
    datasets = [Dataset(items(4, labeled), pipeline) for labeled, pipeline in zip((True, False), pipelines)]
    return SemiSupervisedLoader(*datasets, 2, 2, num_workers=num_workers)
