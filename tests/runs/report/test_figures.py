from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from knowsam_monai.runs.report.figures import Line, _running_mean, case_chart, line_chart


@pytest.mark.parametrize(
    "chart",
    [
        line_chart(
            [Line([1, 2, 3], [0.1, math.nan, 0.3], 0), Line([1, 3], [0, 1], 1, dashed=True)], "validation", True
        ),
        line_chart([Line(range(200), np.linspace(3, 1, 200), 7)], "iteration"),
        case_chart(["a", "b" * 40], [[0.5, 0.25], [math.nan, 0.75]]),
        case_chart(["a < b & c"], [[1.0]]),
    ],
    ids=["lines", "long", "two models", "one model"],
)
def test_chart_is_an_svg_of_the_page_s_colors_and_width(chart):
    svg = ElementTree.fromstring(chart)
    assert svg.tag.endswith("svg") and "viewBox" in svg.attrib and not {"width", "height"} & set(svg.attrib)
    assert "currentColor" in chart and "var(--series-" in chart and "var(--grid)" in chart
    assert not re.findall(r"#0a0[bc][0-9a-f]{2}", chart)
    assert "<text" in chart  # text stays text: it can be read aloud and searched


def test_long_curve_has_its_running_mean_over_it():
    assert _running_mean([1.0, 2.0, 6.0, 2.0], 3) == pytest.approx([1.5, 3.0, 10 / 3, 4.0])
    assert _running_mean([1.0, 5.0], 0) == pytest.approx([1.0, 5.0])
    nan = float("nan")  # the Dice of a batch that lacks every structure
    assert _running_mean([1.0, nan, 6.0, nan, nan, nan], 3) == pytest.approx([1, 3.5, 6, 6, nan, nan], nan_ok=True)


def test_teacher_is_dashed_and_long_case_names_keep_both_ends():
    assert "stroke-dasharray" in line_chart([Line([1, 2], [0, 1], 0, dashed=True)], "validation")
    chart = case_chart(["patient_with_a_very_long_name_07"], [[0.5]])
    assert "patient_wi…ong_name_07" in chart
