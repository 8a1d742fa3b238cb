"""Charts as SVG that use the colors of the page around them, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from knowsam_monai.texts import shortened

NUM_SERIES = 6  # colors of the page's style
# matplotlib does not know CSS variables: it draws with these colors, which are then replaced
_TEXT, _GRID = "#0a0b0c", "#0a0b0d"
_SERIES = [f"#0a0c{i:02x}" for i in range(NUM_SERIES)]
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a case's name may contain two dollar signs
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "grid.color": _GRID,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


class Line(NamedTuple):
    """
    Args:
        x: positions.
        y: values.
        series: index of the page's color.
        dashed: for a teacher, next to its student.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_label: str, unit_interval: bool = False) -> str:
    """
    Curves over iterations or validations. Long curves are drawn faint, with their running mean on top.

    Args:
        lines: drawn in this order.
        x_label: label of the x axis.
        unit_interval: whether the y axis is 0 to 1 (Dice, a gate).
    """

    def draw(axis: Any) -> None:
        for line in lines:
            style = {"color": _SERIES[line.series % NUM_SERIES], "linestyle": (0, (3, 2)) if line.dashed else "-"}
            marker = {"marker": "o", "markersize": 3} if len(line.x) < 15 else {}
            smooth = len(line.x) >= 60
            axis.plot(line.x, line.y, linewidth=1.6, alpha=0.25 if smooth else 1, **style, **marker)
            if smooth:
                axis.plot(line.x, _running_mean(line.y, len(line.y) // 20), linewidth=1.6, **style)
        if unit_interval:
            axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel(x_label)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)

    return _svg(draw, height=2.1)


def case_chart(names: Sequence[str], models: Sequence[Sequence[float]], series: Sequence[int] = (0, 1)) -> str:
    """
    Dice of each case, one line per case: a dot for the first model, a ring for the second.

    Args:
        names: names of the cases, from top to bottom.
        models: for each model, the Dice of each case; nan if there is none.
        series: index of each model's color in the page.
    """

    def draw(axis: Any) -> None:
        rows = np.arange(len(names))
        if len(models) > 1:
            axis.hlines(rows, models[0], models[1], color=_GRID, linewidth=1)
        for model, values in reversed(list(enumerate(models))):
            color = _SERIES[series[model] % NUM_SERIES]
            face = color if model == 0 else "none"
            axis.scatter(values, rows, s=18, facecolor=face, edgecolor=color, linewidth=1.2, zorder=3)
        axis.set_yticks(rows, [shortened(name, 22) for name in names])
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("mean Dice over the structures")

    return _svg(draw, height=0.6 + 0.17 * len(names))


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centered window that is cut off at the ends, of the finite values."""
    kernel, numbers = np.ones(2 * (width // 2) + 1), np.asarray(values, dtype=float)
    is_finite = np.isfinite(numbers)
    total = np.convolve(np.where(is_finite, numbers, 0), kernel, "same")
    count = np.convolve(is_finite.astype(float), kernel, "same")
    return np.where(count > 0.5, total / count.clip(min=1), np.nan)


def _svg(draw: Any, height: float) -> str:
    """A chart 3.8 inches wide, about a phone's width, so that its text stays readable there."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"|height="[\d.]+pt"|width="[\d.]+pt"', "", text, count=2)
    colors = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
    for color, variable in colors.items():
        text = text.replace(color, variable)
    return text
