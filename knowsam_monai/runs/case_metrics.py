from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric
from monai.transforms import KeepLargestConnectedComponent
from torch import Tensor

from knowsam_monai import ranks
from knowsam_monai.files import write_csv
from knowsam_monai.runs.checks import check_writable
from knowsam_monai.runs.validation_case import (
    Spacing,
    case_names,
    check_class_names,
    class_dice,
    of_all_processes,
    validation_cases,
)
from knowsam_monai.texts import shortened

logger = logging.getLogger(__name__)

METRICS = ("dice", "jaccard", "hd95_mm", "asd_mm", "hd95_voxel", "asd_voxel")
COMPONENTS = ("all", "largest")


class CaseMetrics:
    """
    Write Dice, Jaccard, HD95 and ASD of every case and class as CSV, for whole volumes on the label's own grid.

    Every metric is reported for the full prediction (``components`` = all) and for the largest 3D connected component
    of each class (largest; corners connect). Distances are reported in mm, if the spacing is known, and in voxels.

    - Dice: ``2 |P n T| / (|P| + |T|)``, Jaccard: ``|P n T| / |P u T|``. They are nan, and excluded from means, if label
      and prediction are both empty.
    - HD95: MONAI's, the larger of the two directed 95th percentiles (medpy pools both directions instead).
    - ASD: symmetric, the mean over the distances of both surfaces to the other (medpy's ``asd`` is one-way).
    - A distance to or from an empty set is nan, and counted in ``num_undefined``.
    - Each case counts once, under a unique name: its file's, or ``case_000`` and so on without a file, with a number if
      two cases have the same file. A case that a sampler repeats is recognized by its image and label.
    - A volume of one slice is measured in 2D, because in 3D all of its voxels would belong to the surface.

    ``metrics_raw.csv`` has a row for each case, class and filter. A field is empty if it needs an unknown spacing;
    num_undefined counts the row's nan.
    ``metrics_summary.csv`` has mean, standard deviation (population), median, count and num_undefined of each metric,
    class and filter. Its class ``mean`` is the mean over each case's classes first, then over the cases.

    Args:
        output_dir: folder of the two files, created if missing.
        class_names: names of classes 1, 2, ... (no background).
        spacing: "meta" uses the spacing in each case's metadata; mm along each axis for files that have lost it; None
            if unknown. Units of NIfTI headers other than mm are not converted.
        split: the cases' part of the data set, for the head of the table; None leaves it out.

    Shape:
        ``pred`` and ``label`` of the evaluator's output: (1, *spatial) class numbers or (C, *spatial) one-hot,
        decollated (MONAI's default) or as a batch.

    Raises:
        ValueError: if `class_names` is empty, a single string or contains a name twice; during a run, if label and
            prediction do not match.
        OSError: when the run starts, if `output_dir` cannot be written.

    Example::

        SupervisedEvaluator(..., val_handlers=[CaseMetrics("eval", ["RV", "myocardium", "LV"])])
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str],
        spacing: Spacing = "meta",
        split: str | None = None,
    ) -> None:
        self.output_dir = str(output_dir)
        self.class_names = check_class_names(class_names, reserved=["mean"])
        self.spacing = spacing
        self.split = split
        self._cases: dict[str, tuple[tuple[float, ...] | None, np.ndarray]] = {}  # by path
        self._contents: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI evaluator, after its postprocessing."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Forget the cases of an earlier run, and check that the folder can be written."""
        self._cases, self._contents = {}, {}
        check_writable(output_dir=self.output_dir)

    def __call__(self, engine: Engine) -> None:
        for case in validation_cases(engine, len(self.class_names) + 1, spacing=self.spacing, seen=self._contents):
            values = case_metrics(case.preds["pred"], case.label, len(self.class_names) + 1, case.spacing)
            self._cases[case.path], self._contents[case.path] = (case.spacing, values), case.content

    def completed(self, engine: Engine) -> None:
        """Gather the cases of all ranks; the first rank writes both files and logs a table."""
        cases = of_all_processes(self._cases, self._contents)
        if ranks.rank() != 0 or not cases:
            return
        names = case_names(list(cases))
        values = np.stack([values for _, values in cases.values()])  # (cases, components, classes, metrics)
        spacings = [spacing for spacing, _ in cases.values()]
        raw, summary = self._raw_rows(names, spacings, values), self._summary_rows(spacings, values)
        for name, rows in (("raw", raw), ("summary", summary)):
            write_csv(os.path.join(self.output_dir, f"metrics_{name}.csv"), rows)
        for line in self._table(summary, len(cases)):
            logger.info("%s", line)
        logger.info("The metrics of every case are in %s.", os.path.join(self.output_dir, "metrics_raw.csv"))

    def _raw_rows(self, names: list[str], spacings: list, values: np.ndarray) -> list[dict]:
        rows = []
        for (n, name), (k, components), (c, class_name) in product(
            enumerate(names), enumerate(COMPONENTS), enumerate(self.class_names)
        ):
            metrics = dict(zip(METRICS, values[n, k, c].tolist()))
            undefined = sum(math.isnan(v) for m, v in metrics.items() if spacings[n] is not None or "_mm" not in m)
            if spacings[n] is None:
                metrics.update(hd95_mm="", asd_mm="")
            spacing = "" if spacings[n] is None else "x".join(f"{edge:g}" for edge in spacings[n])
            rows.append(
                {"case": name, "class": class_name, "components": components}
                | {m: v if v == "" else f"{v:.6f}" for m, v in metrics.items()}
                | {"spacing_mm": spacing, "num_undefined": undefined}
            )
        return rows

    def _summary_rows(self, spacings: list, values: np.ndarray) -> list[dict]:
        known = np.array([spacing is not None for spacing in spacings])
        rows = []
        for (m, metric), (k, components), (c, class_name) in product(
            enumerate(METRICS), enumerate(COMPONENTS), enumerate([*self.class_names, "mean"])
        ):
            of_cases = values[known if metric.endswith("_mm") else slice(None), k, :, m]  # (cases, classes)
            per_case = _nanmean(of_cases) if class_name == "mean" else of_cases[:, c]
            defined = per_case[~np.isnan(per_case)]
            statistics = [f(defined) if len(defined) else math.nan for f in (np.mean, np.std, np.median)]
            undefined = int(np.isnan(of_cases if class_name == "mean" else per_case).sum())
            rows.append(
                {"metric": metric, "class": class_name, "components": components}
                | {s: f"{v:.6f}" for s, v in zip(("mean", "std", "median"), statistics)}
                | {"count": len(defined), "num_undefined": undefined}
            )
        return rows

    def _table(self, summary: list[dict], num_cases: int) -> list[str]:
        """Mean and standard deviation over the cases; undefined distances are counted, not averaged."""
        rows = {(row["class"], row["components"], row["metric"]): row for row in summary}
        has_mm = any(row["count"] for row in summary if row["metric"].endswith("_mm"))
        shown = [m for m in METRICS if m != "jaccard" and (has_mm or not m.endswith("_mm"))]
        names = {name: shortened(name, 40) for name in (*self.class_names, "mean")}
        width = max(map(len, (*names.values(), "class")))
        header = f"{'class':<{width}}  components" + "".join(f"{m.replace('_', ' '):>16}" for m in shown)
        split = "" if self.split is None else f" of the {self.split} split"
        what = f"1 case{split}" if num_cases == 1 else f"{num_cases} cases{split}, mean and standard deviation"
        lines = [f"Metrics of {what}", header + "   undefined"]
        for name, components in product(names, COMPONENTS):
            line = f"{names[name]:<{width}}  {components:<10}"
            for metric in shown:
                row, digits = rows[name, components, metric], 3 if metric == "dice" else 2
                mean, std = (f"{float(row[statistic]):.{digits}f}" for statistic in ("mean", "std"))
                text = f"{mean} ± {std}" if row["count"] > 1 else mean if row["count"] else "-"
                line += f"{text:>16}"
            lines.append(line + f"{rows[name, components, 'hd95_voxel']['num_undefined']:>12}")
        return lines


def case_metrics(pred: Tensor, label: Tensor, num_classes: int, spacing: tuple[float, ...] | None = None) -> np.ndarray:
    """
    All metrics of one case.

    Args:
        pred: (*spatial), class numbers.
        label: (*spatial), class numbers.
        num_classes: C, background included.
        spacing: mm along each axis; if None, the distances in mm are nan.

    Shape:
        - output: (2, C - 1, 6), for the full prediction and its largest components, in the order of ``METRICS``
    """
    if label.ndim == 3 and list(label.shape).count(1) == 1:
        axis = list(label.shape).index(1)
        pred, label = pred.select(axis, 0), label.select(axis, 0)
        spacing = spacing and (*spacing[:axis], *spacing[axis + 1 :])
    largest = KeepLargestConnectedComponent(applied_labels=list(range(1, num_classes)), is_onehot=False)(
        pred[None].clone()
    )[0]
    values = np.full((len(COMPONENTS), num_classes - 1, len(METRICS)), math.nan)
    for k, filtered in enumerate((pred, torch.as_tensor(largest).long())):
        dice = class_dice(filtered, label, num_classes).numpy()
        values[k, :, 0], values[k, :, 1] = dice, dice / (2 - dice)
        for c in range(1, num_classes):
            masks = [(x == c)[None, None] for x in (filtered, label)]
            if k and torch.equal(filtered == c, pred == c):
                values[k, c - 1] = values[0, c - 1]
            elif all(mask.any() for mask in masks):
                values[k, c - 1, 4:] = _distances(*masks, None)
                values[k, c - 1, 2:4] = math.nan if spacing is None else _distances(*masks, spacing)
    return values


def _distances(pred: Tensor, label: Tensor, spacing: tuple[float, ...] | None) -> list[float]:
    """HD95 and ASD of two masks (1, 1, *spatial), neither of which is empty."""
    metrics = (
        HausdorffDistanceMetric(include_background=True, percentile=95),
        SurfaceDistanceMetric(include_background=True, symmetric=True),
    )
    with warnings.catch_warnings():
        # about an argument that MONAI's metrics pass to MONAI's own function
        warnings.filterwarnings("ignore", ".*get_mask_edges:always_return_as_numpy", FutureWarning)
        return [float(metric(pred.float(), label.float(), spacing=spacing)) for metric in metrics]


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, nan if nothing is defined."""
    return torch.from_numpy(values).nanmean(-1).numpy()  # NumPy's warns of an empty mean
