from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from knowsam_monai.handlers.validation_case import ValidationCase, case_names, class_dice, validation_cases

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which stay apart for colour-blind readers, the lightest on grey tissue first
COLORS = ("#F0E442", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#0072B2")


class SliceView(NamedTuple):
    """One slice as it will be drawn: arrays (rows, columns), Dice (C - 1,) of that slice."""

    path: str
    position: str
    image: np.ndarray
    label: np.ndarray
    pred: np.ndarray
    dice: np.ndarray
    aspect: float


class ValidationReport:
    """
    A picture of a few validation slices, image, truth and prediction side by side, and a small table of Dice.

    After each validation the report keeps what it needs (of the best one so far, or of the last); :meth:`write` makes
    ``validation.png`` and logs the table: Dice per structure over whole volumes, the mean over the cases, for the
    student and, where the evaluator's output has it, for the teacher. The picture's first rows are slices of the
    largest structures, from cases spread evenly between the best and the median; the last row is the worst slice.

    Args:
        output_dir: folder of ``validation.png``, made when missing.
        class_names: names of classes 1, 2, ... (no background).
        num_slices: rows of the picture.
        keep: "best" keeps the validation of the highest mean Dice, "last" the last.
        teacher_key: the teacher's label map in the evaluator's output.
        student_name: heading of the student's column.
        teacher_name: heading of the teacher's.

    Raises:
        ValueError: when `class_names` is empty or one string, `num_slices` below 1 or `keep` is neither of both.

    Example::

        report = ValidationReport("eval", ["RV", "myocardium", "LV"])
        evaluator = SupervisedEvaluator(..., val_handlers=[report])
        trainer.run()
        report.write()
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str],
        num_slices: int = 4,
        keep: str = "best",
        teacher_key: str = "teacher_pred",
        student_name: str = "student",
        teacher_name: str = "SAM teacher",
    ) -> None:
        if isinstance(class_names, str) or not class_names:
            raise ValueError(f"`class_names` must be a list of the foreground classes' names but is {class_names!r}.")
        if num_slices < 1:
            raise ValueError(f"`num_slices` must be at least 1 but is {num_slices}.")
        if keep not in ("best", "last"):
            raise ValueError(f'`keep` must be "best" or "last" but is {keep!r}.')
        self.output_dir = str(output_dir)
        self.class_names = list(class_names)
        self.num_slices = num_slices
        self.keep = keep
        self.pred_keys = ("pred", teacher_key)
        self.column_names = (student_name, teacher_name)
        self.mean_dice = float("-inf")
        self._num_validations = 0
        self._kept: dict[str, Any] = {}
        self._dice: dict[str, dict[str, Tensor]] = {}  # key of the prediction -> path -> Dice (C - 1,)
        self._views: list[SliceView] = []

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI evaluator, after its postprocessing."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        self._dice, self._views = {key: {} for key in self.pred_keys}, []

    def __call__(self, engine: Engine) -> None:
        num_classes = len(self.class_names) + 1
        for case in validation_cases(engine, num_classes, self.pred_keys):
            for key, pred in case.preds.items():
                self._dice[key][case.path] = class_dice(pred, case.label, num_classes)
            if idist.get_rank() == 0:
                self._views += slice_views(case, num_classes)

    def completed(self, engine: Engine) -> None:
        """Gather Dice of all ranks, and keep this validation when it is the one to be reported."""
        self._num_validations += 1
        if idist.get_world_size() > 1:
            ranks = idist.all_gather(self._dice)
            self._dice = {key: {p: d for rank in ranks for p, d in rank[key].items()} for key in self.pred_keys}
        if not self._dice["pred"]:
            return
        dice = {key: mean_over_cases(of_case) for key, of_case in self._dice.items() if of_case}
        mean_dice = dice["pred"][-1]
        if self.keep == "last" or not self._kept or mean_dice > self.mean_dice:
            self.mean_dice = mean_dice
            self._kept = {
                "dice": dice,
                "num_cases": len(self._dice["pred"]),
                "validation": self._num_validations,
                "views": choose_views(self._views, self._dice["pred"], self.num_slices),
            }
        self._views = []

    def table(self) -> list[str]:
        """The lines of the table, for a fixed-width font."""
        kept = self._kept
        which = f"{self.keep} of {self._num_validations} validations: number {kept['validation']}"
        columns = [(self.column_names[self.pred_keys.index(key)], dice) for key, dice in kept["dice"].items()]
        names = [*self.class_names, "mean"]
        width = max(len(name) for name in (*names, "structure"))
        rule = "  " + "-" * (width + sum(max(len(title), 7) + 4 for title, _ in columns))
        head = f"  {'structure':<{width}}" + "".join(f"{title:>{max(len(title), 7) + 4}}" for title, _ in columns)
        lines = [f"Validation Dice, {kept['num_cases']} volumes ({which})", head, rule]
        for i, name in enumerate(names):
            cells = "".join(f"{dice[i]:>{max(len(title), 7) + 4}.3f}" for title, dice in columns)
            lines += [rule] * (name == "mean") + [f"  {name:<{width}}{cells}"]
        return lines

    def write(self) -> str | None:
        """
        Write the picture and log the table, on the first rank.

        Returns:
            The picture's path; None where no validation has run.
        """
        if idist.get_rank() != 0:
            return None
        if not self._kept:
            logger.warning("No validation has run, so there is no validation report; val_interval is too long?")
            return None
        for line in self.table():
            logger.info(line)
        os.makedirs(self.output_dir, exist_ok=True)
        path = os.path.join(self.output_dir, "validation.png")
        temporary = f"{path}.{os.getpid()}.tmp"
        draw(self._kept["views"], self.class_names).savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
        logger.info(f"Validation slices, truth and prediction: {path}")
        return path


def mean_over_cases(dice: dict[str, Tensor]) -> list[float]:
    """Mean Dice of each class, then of all: over a case's classes first, and then over the cases. nan is left out."""
    stacked = torch.stack(list(dice.values()))  # (cases, C - 1)
    return [*stacked.nanmean(0).tolist(), stacked.nanmean(1).nanmean().item()]


def slice_views(case: ValidationCase, num_classes: int) -> list[SliceView]:
    """
    The slice with the most foreground of a volume, and of its slices with a third of that the worst.

    Files with a spacing (NIfTI) count columns first: they are turned the way a radiologist looks at them.
    """
    label, pred = (x if x.ndim == 3 else x[..., None] for x in (case.label, case.preds["pred"]))
    area = (label > 0).flatten(0, 1).sum(0)
    dice = torch.stack([class_dice(p, t, num_classes) for p, t in zip(pred.unbind(-1), label.unbind(-1))])
    mean_dice = torch.where(area >= area.max() / 3, dice.nanmean(1), torch.inf).nan_to_num(torch.inf)
    views = []
    for k in dict.fromkeys([int(area.argmax()), int(mean_dice.argmin())]):
        slices = [_image_slice(case, k, label.shape), label[..., k].numpy(), pred[..., k].numpy()]
        aspect = 1.0
        if case.spacing is not None:
            signs = torch.as_tensor(getattr(case.label, "affine", torch.eye(3))).diagonal()[:2]
            slices = [np.flip(x, [i for i in (0, 1) if signs[i] > 0]).T for x in slices]
            aspect = case.spacing[1] / case.spacing[0]
        position = f"slice {k + 1} of {label.shape[-1]}"
        views.append(SliceView(case.path, position, *slices, dice[k].numpy(), aspect))
    return views


def choose_views(views: list[SliceView], dice: dict[str, Tensor], num_slices: int) -> list[SliceView]:
    """From best to median, each case's largest slice, and the worst slice of all cases last."""
    first: dict[str, SliceView] = {}
    for view in views:
        first.setdefault(view.path, view)
    ranked = sorted(first.values(), key=lambda v: -np.nan_to_num(dice[v.path].nanmean().item(), nan=-1.0))
    worst = min(views, key=lambda v: np.nan_to_num(np.nanmean(v.dice) if (v.dice == v.dice).any() else 2.0))
    others = [view for view in ranked if view.path != worst.path]
    wanted = min(num_slices - 1, len(others))
    last = max(len(ranked) // 2, wanted - 1)
    chosen = [others[round(i * min(last, len(others) - 1) / max(wanted - 1, 1))] for i in range(wanted)]
    return [*chosen, worst]


def draw(views: list[SliceView], class_names: Sequence[str]) -> Any:
    """A matplotlib figure: a row for each slice; image, truth and prediction as columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = [COLORS[i % len(COLORS)] for i in range(len(class_names))]
    names = case_names([view.path for view in views])
    figure = Figure(figsize=(9.6, 3.25 * len(views) + 0.9), facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = 0.45 / figure.get_figheight(), 0.55 / figure.get_figheight()
    grid = figure.add_gridspec(
        len(views), 3, left=0.055, right=0.99, top=1 - top, bottom=bottom, wspace=0.03, hspace=0.13
    )
    for row, (view, name) in enumerate(zip(views, names)):
        window = _window(view)
        image = view.image[window]
        low, high = np.percentile(image, [1, 99])
        for column, labels in enumerate((None, view.label[window], view.pred[window])):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=view.aspect)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if labels is not None:
                _overlay(axis, labels, colors)
            if column == 0:
                worst = "worst: " if row == len(views) - 1 and len(views) > 1 else ""
                axis.set_ylabel(f"{worst}{name}\n{view.position}", fontsize=9, color="#333333")
            if row == 0:
                axis.set_title(("image", "truth", "prediction")[column], fontsize=12, pad=6)
            if column == 2:
                text = "   ".join(f"{n} {'-' if d != d else f'{d:.2f}'}" for n, d in zip(class_names, view.dice))
                axis.set_xlabel(f"Dice   {text}", fontsize=8.5, color="#333333", labelpad=3)
    handles = [Patch(facecolor=color, label=name) for color, name in zip(colors, class_names)]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=10)
    return figure


def _overlay(axis: Any, labels: np.ndarray, colors: list[str]) -> None:
    from matplotlib.colors import to_rgba

    fill = np.zeros((*labels.shape, 4))
    for c, color in enumerate(colors, start=1):
        fill[labels == c] = to_rgba(color, alpha=0.28)
    axis.imshow(fill, aspect=axis.get_aspect())
    for c, color in enumerate(colors, start=1):
        if 0 < (labels == c).sum() < labels.size:
            axis.contour(labels == c, levels=[0.5], colors=color, linewidths=1.4)


def _window(view: SliceView) -> tuple[slice, slice]:
    """A square around truth and prediction, half as large again, so that the structures can be seen."""
    rows, columns = np.nonzero((view.label > 0) | (view.pred > 0))
    if not len(rows):
        return slice(None), slice(None)
    side = 1.5 * max(np.ptp(rows), np.ptp(columns)) + 16
    window = []
    for where, size in zip((rows, columns), view.label.shape):
        edge = int(min(side, size))
        start = int(np.clip((where.min() + where.max()) / 2 - edge / 2, 0, size - edge))
        window.append(slice(start, start + edge))
    return window[0], window[1]


def _image_slice(case: ValidationCase, k: int, shape: Sequence[int]) -> np.ndarray:
    """First channel of a slice of the image, resized to the label's grid when the network saw another."""
    if case.image is None:
        return np.zeros(shape[:2], dtype=np.float32)
    image = torch.as_tensor(case.image.as_tensor() if hasattr(case.image, "as_tensor") else case.image)[0].float().cpu()
    image = image if image.ndim == 3 else image[..., None]
    if image.shape[-1] != shape[-1]:
        return np.zeros(shape[:2], dtype=np.float32)
    image = image[..., k]
    if tuple(image.shape) != tuple(shape[:2]):
        image = torch.nn.functional.interpolate(image[None, None], size=tuple(shape[:2]), mode="bilinear")[0, 0]
    return image.numpy()
