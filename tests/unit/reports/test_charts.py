"""Charts are read back as XML: the points, the numbers and the names that they hold."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from for_ray.reports.charts import DAY_SECONDS, Line, bar_chart, histogram, line_chart, time_chart

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(each.itertext()).strip() for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def heights(svg: str, colour: str = "#0072b2") -> list[float]:
    """Height (or length, whichever is drawn) of each filled bar of the colour, in the order of drawing."""
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: {colour}" in path.get("style", ""):
            points = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d"))]
            found.append([max(axis) - min(axis) for axis in zip(*points, strict=True)])
    return found


def stroke(svg: str, colour: str) -> list[tuple[float, float]]:
    """The corners of the line of a colour."""
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        style = path.get("style", "")
        if f"stroke: {colour}" in style and "fill: none" in style and "stroke-width: 1.8" in style:
            return [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d"))]
    return []


def test_a_line_goes_through_its_points_and_what_is_not_finite_leaves_a_gap():
    ys = [4.0, 2.0, math.nan, 1.0, 0.0]
    svg = line_chart([Line("loss", range(1, 6), ys)], x_label="epoch", y_label="loss")
    corners = stroke(svg, "#0072b2")
    assert len(corners) == 4
    (x1, y1), (x2, y2), (x4, y4), (x5, y5) = corners
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=1e-3)
    assert x5 - x4 == pytest.approx(x2 - x1, abs=1e-3)
    per_unit = (y2 - y1) / 2  # SVG's y grows downwards
    assert per_unit > 0
    assert y4 - y2 == pytest.approx(per_unit, abs=1e-3)
    assert y5 - y4 == pytest.approx(per_unit, abs=1e-3)
    assert {"epoch", "loss"} <= set(texts(svg))


def test_lines_are_told_apart_by_a_legend_and_by_colour():
    lines = [Line("base", [1, 2], [1, 2]), Line("novel", [1, 2], [2, 1]), Line("all", [1, 2], [1, 1])]
    svg = line_chart(lines, x_label="epoch", y_label="mAP@50")
    assert {"base", "novel", "all"} <= set(texts(svg))
    assert all(stroke(svg, colour) for colour in ("#0072b2", "#d55e00", "#009e73"))


def test_a_short_logarithmic_axis_is_numbered_in_plain_text_too():
    svg = line_chart([Line("rate", [1, 2], [1.6e-4, 3e-5])], x_label="epoch", is_log=True)
    assert "mathdefault" not in svg
    assert {"6e-05", "4e-05"} <= set(texts(svg))


def test_a_logarithmic_axis_is_numbered_in_plain_text_and_leaves_zero_out():
    rates = [1e-5] * 3 + [1e-6, 0.0]
    svg = line_chart([Line("rate", range(5), rates)], x_label="epoch", y_label="learning rate", is_log=True)
    assert {"1e-05", "1e-06"} <= set(texts(svg))
    assert len(stroke(svg, "#0072b2")) == 4


def test_bars_are_as_long_as_their_values_and_carry_their_numbers():
    svg = bar_chart(["dog", "cat", "cow"], [4000, 1000, 0.5], value_label="images")
    lengths = [width for width, _ in heights(svg)]
    assert lengths[0] / lengths[1] == pytest.approx(4, rel=1e-3)
    assert {"dog", "cat", "cow", "4,000", "1,000", "0.5", "images"} <= set(texts(svg))


def test_a_histogram_starts_where_it_says_and_ends_with_the_last_count():
    svg = histogram([2, 0, 8, 4, 0, 0], first=3, x_label="labels", y_label="images")
    tall = [height for _, height in heights(svg)]
    assert len(tall) == 4
    assert tall[2] / tall[0] == pytest.approx(4, rel=1e-3)
    assert tall[1] == 0
    assert {"3", "6"} <= set(texts(svg))


def test_time_runs_in_days_of_utc_and_heights_start_at_zero():
    midnight = 20_000 * DAY_SECONDS  # 2024-10-04
    svg = time_chart(
        [Line("size", [midnight + day * DAY_SECONDS for day in (0, 1, 4)], [3, 3, 4])], y_label="GB"
    )
    (x1, y1), (x2, y2), (x3, y3) = stroke(svg, "#0072b2")
    assert x3 - x2 == pytest.approx(3 * (x2 - x1), abs=1e-3)
    assert y1 == y2
    assert {"GB", "0", "05", "06", "07", "08", "2024-Oct"} <= set(texts(svg))
    zero = next(each for each in ElementTree.fromstring(svg).iter(f"{SVG}text") if each.text == "0")
    bottom = float(zero.get("y"))
    assert (bottom - y3) / (bottom - y1) == pytest.approx(4 / 3, rel=0.06)  # the text stands a little lower


def test_one_moment_or_nothing_but_zeros_are_drawn_too():
    alone = time_chart([Line("a", [1e9], [5.0]), Line("b", [1e9], [math.nan])], y_label="images")
    assert {"a", "b", "0", "5"} <= set(texts(alone)) or {"a", "b", "0", "4"} <= set(texts(alone))
    zeros = time_chart([Line("a", [1e9, 2e9], [0, 0])], y_label="images")
    assert {"0", "1"} <= set(texts(zeros))
    assert len(stroke(zeros, "#0072b2")) == 2


@pytest.mark.parametrize(
    "svg",
    [
        line_chart([], x_label="epoch", y_label="loss"),
        line_chart([Line("loss", [1], [math.nan])], x_label="epoch"),
        line_chart([Line("rate", [1], [0.0])], x_label="epoch", is_log=True),
        bar_chart([], [], value_label="images"),
        time_chart([], y_label="images"),
        time_chart([Line("size", [1e9], [math.nan])], y_label="images"),
        histogram([0, 0], x_label="labels", y_label="images"),
    ],
)
def test_without_values_a_chart_says_so(svg):
    assert texts(svg) == ["no values"]


def test_names_cannot_break_out_and_are_no_mathematics():
    name = '<script>alert("1")</script> $x^2$ & \x07' + "long " * 20
    svg = bar_chart([name], [1], value_label='"><script>')
    assert "<script" not in svg
    shown = next(text for text in texts(svg) if text.startswith("<script>"))
    assert shown == '<script>alert("1")</script> $x^'[:31] + "…"
    assert ElementTree.fromstring(svg).get("aria-label") == '"><script>'


def test_the_same_chart_is_the_same_bytes_and_draws_nothing_from_elsewhere():
    draw = [
        lambda: histogram([1, 2], x_label="a", y_label="b"),
        lambda: bar_chart(["x"], [1], value_label="y"),
    ]
    for each in draw:
        assert each() == each()
        assert "url(http" not in each()
        assert "<metadata" not in each()
        assert "<image" not in each()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="'size' has 1 x and 0 y"):
        time_chart([Line("size", [1], [])], y_label="images")
    with pytest.raises(ValueError, match="'loss' has 2 x and 1 y"):
        line_chart([Line("loss", [1, 2], [1.0])], x_label="epoch")
    with pytest.raises(ValueError, match="1 names and 2 values"):
        bar_chart(["a"], [1, 2], value_label="images")
