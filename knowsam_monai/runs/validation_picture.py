"""The pictures of a validation report: choosing slices and drawing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

from knowsam_monai.data.slice_axis import TurnSlicesd
from knowsam_monai.runs.validation_case import ValidationCase, class_dice
from knowsam_monai.tensors import without_meta
from knowsam_monai.texts import shortened

# Okabe and Ito's colors, which color-blind readers can tell apart; the brightest ones on gray tissue come first
COLORS = ("#F0E442", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#0072B2")


class SliceView(NamedTuple):
    """One slice to be drawn: arrays (rows, columns), and the Dice of that slice, (C - 1,)."""

    path: str
    position: str
    image: np.ndarray
    label: np.ndarray
    pred: np.ndarray
    dice: np.ndarray
    aspect: float


def slice_views(case: ValidationCase, num_classes: int) -> list[SliceView]:
    """
    The slice of a volume with the most foreground, and the worst of all slices with at least a third of that.

    Slices of files with a known geometry (NIfTI) are turned to the radiological view.
    """
    case = _turned(case)
    label, pred = (x if x.ndim == 3 else x[..., None] for x in (case.label, case.preds["pred"]))
    area = (label > 0).flatten(0, 1).sum(0)
    dice = {
        k: class_dice(pred[..., k], label[..., k], num_classes)
        for k in torch.nonzero(area >= area.max() / 3).flatten().tolist()
    }
    worst = min(dice, key=lambda k: dice[k].nanmean().nan_to_num(torch.inf).item())
    views = []
    for k in dict.fromkeys([int(area.argmax()), worst]):
        slices = [_image_slice(case, k, label.shape), label[..., k].numpy(), pred[..., k].numpy()]
        aspect = 1.0
        if case.affine is not None and case.spacing is not None:
            slices = [x.T for x in slices]
            aspect = case.spacing[1] / case.spacing[0]
        position = f"slice {k + 1} of {label.shape[-1]}"
        views.append(SliceView(case.path, position, *slices, dice[k].numpy(), aspect))
    return views


def choose_views(views: list[SliceView], dice: dict[str, Tensor], num_slices: int) -> list[SliceView]:
    """The largest slices of cases from best to median, then the worst slice of all cases; [] if there are no views."""
    if not views:
        return []
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


def draw(views: list[SliceView], names: Mapping[str, str], class_names: Sequence[str]) -> Any:
    """A matplotlib figure with a row for each slice and image, truth and prediction as columns; `names` are by path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = [COLORS[i % len(COLORS)] for i in range(len(class_names))]
    figure = Figure(figsize=(9.6, 3.3 * len(views) + 0.8), facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = 0.35 / figure.get_figheight(), 0.75 / figure.get_figheight()
    grid = figure.add_gridspec(
        len(views), 3, left=0.055, right=0.99, top=1 - top, bottom=bottom, wspace=0.03, hspace=0.11
    )
    for row, view in enumerate(views):
        window = _window(view)
        for column, labels in enumerate((None, view.label[window], view.pred[window])):
            axis = figure.add_subplot(grid[row, column])
            _show(axis, view, window)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if labels is not None:
                _overlay(axis, labels, colors)
            if column == 0:
                worst = "worst: " if row == len(views) - 1 and len(views) > 1 else ""
                name = f"{worst}{shortened(names[view.path], 40)}\n{view.position}"
                axis.set_ylabel(name, fontsize=9, color="#333333", parse_math=False)
            if row == 0:
                axis.set_title(("image", "truth", "prediction, slice Dice")[column], fontsize=12, pad=6)
            if column == 2:
                _write_dice(axis, view.dice, colors)
    # legends skip labels that begin with an underscore, so the texts are set afterwards
    handles = [Patch(facecolor=color, label="class") for color in colors]
    legend = figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, fontsize=10)
    for text, name in zip(legend.get_texts(), class_names):
        text.set_parse_math(False)
        text.set_text(shortened(name, 40))
    return figure


def draw_slice(view: SliceView, num_structures: int) -> Any:
    """A matplotlib figure of one slice without any text: truth on the left, prediction on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = [COLORS[i % len(COLORS)] for i in range(num_structures)]
    window = _window(view)
    rows, columns = view.image[window].shape
    figure = Figure(figsize=(5, 2.5 * min(max(rows * view.aspect / columns, 0.4), 2.5)), facecolor="black")
    FigureCanvasAgg(figure)
    for side, labels in enumerate((view.label, view.pred)):
        axis = figure.add_axes((side * 0.505, 0, 0.495, 1))
        axis.set_axis_off()
        _show(axis, view, window)
        _overlay(axis, labels[window], colors)
    return figure


def _show(axis: Any, view: SliceView, window: tuple[slice, slice]) -> None:
    image = view.image[window]
    low, high = np.percentile(image, [1, 99])
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=view.aspect)


def _write_dice(axis: Any, dice: np.ndarray, colors: list[str]) -> None:
    """Write each structure's Dice in this slice below a panel, next to a patch of its color."""
    style = {"transform": axis.transAxes, "va": "center", "fontsize": 9.5}
    step = min(0.21, 0.8 / len(colors))
    axis.text(0.0, -0.05, "Dice", color="#333333", **style)
    for i, (color, value) in enumerate(zip(colors, dice)):
        axis.text(0.18 + i * step, -0.05, "\N{BLACK SQUARE}", color=color, **style)
        axis.text(0.23 + i * step, -0.05, "-" if value != value else f"{value:.2f}", color="#333333", **style)


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
    """A square around truth and prediction, with a margin of half their size."""
    rows, columns = np.nonzero((view.label > 0) | (view.pred > 0))
    if not len(rows):
        rows, columns = (np.array([0, size - 1]) for size in view.label.shape)
    edge = int(min(1.5 * max(np.ptp(rows), np.ptp(columns)) + 16, *view.label.shape))
    window = []
    for indices, size in zip((rows, columns), view.label.shape):
        start = int(np.clip((indices.min() + indices.max()) / 2 - edge / 2, 0, size - edge))
        window.append(slice(start, start + edge))
    return window[0], window[1]


def _turned(case: ValidationCase) -> ValidationCase:
    """The case with its slices along the last axis; unchanged if its geometry is unknown."""
    if case.label.ndim != 3 or case.affine is None or case.spacing is None:
        return case
    maps = {"label": case.label, "pred": case.preds["pred"]}
    volumes = {key: MetaTensor(volume[None], affine=case.affine) for key, volume in maps.items()}
    turned = TurnSlicesd(list(volumes), image_key="label", warn=False)(volumes)
    label, affine = turned["label"], turned["label"].affine
    preds = {"pred": turned["pred"].as_tensor()[0]}
    spacing = tuple(label.pixdim.tolist())
    return case._replace(label=label.as_tensor()[0], preds=preds, spacing=spacing, affine=affine, grid=affine)


def _image_slice(case: ValidationCase, k: int, shape: Sequence[int]) -> np.ndarray:
    """First channel of a slice of the image, resampled from the network's grid to the label's."""
    if case.image is None:
        return np.zeros(shape[:2], dtype=np.float32)
    image = case.image[:1].float().cpu()
    if image.ndim == 4 and isinstance(image, MetaTensor) and case.grid is not None:
        plane = case.grid.double().clone()
        plane[:3, 3] += k * plane[:3, 2]
        resample = SpatialResample(mode="bilinear", padding_mode="zeros")
        image, k = resample(image, dst_affine=plane, spatial_size=(*shape[:2], 1)), 0
    elif image.ndim == 4 and image.shape[-1] != shape[-1]:
        return np.zeros(shape[:2], dtype=np.float32)
    image = without_meta(image)[0]
    image = image[..., k] if image.ndim == 3 else image
    if tuple(image.shape) != tuple(shape[:2]):
        image = torch.nn.functional.interpolate(image[None, None], size=tuple(shape[:2]), mode="bilinear")[0, 0]
    return image.numpy()
