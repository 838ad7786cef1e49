"""Charts as inline SVG, for a page that stands alone. One at a time: matplotlib's settings are global."""

from __future__ import annotations

import datetime
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by the colour-blind too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#777777")
_TEXT, _GRID = "#41464f", "#e3e6ea"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)))

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and found by the browser's search
    "svg.hashsalt": "for_ray",  # the same bytes for the same chart
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # names may hold $
    "axes.unicode_minus": False,  # numbers have one minus, whoever writes them
    "font.size": 9.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.axisbelow": True,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
}

_WIDTH, _HALF_WIDTH = 7.2, 4.2
_PIXELS_A_POINT = 1.6
"""On a page that is wide enough: texts have one size in all charts, whatever stands beside the axes."""

_MANY_POINTS = 40

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: In the legend.
        x: Where its points are; as many as `y`.
        y: Their heights; what is not finite leaves a gap.
        is_dashed: Draw it broken, as what is there to compare with.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    is_log: bool = False,
    marked_x: float | None = None,
) -> str:
    """Lines over a common axis, such as losses over epochs.

    Args:
        lines: What to draw; colours go by their order.
        x_label: What lies on the axis.
        y_label: What is drawn, with its unit.
        is_log: Heights on a logarithmic axis; what is not above 0 is left out.
        marked_x: A place to mark with a vertical line, such as the epoch that was kept.

    Returns:
        An `<svg>` element. Without a single value it says so.

    Raises:
        ValueError: A line has another number of x than of y.
    """
    from matplotlib.ticker import LogFormatter

    _check_lengths(lines)
    points = [[_drawn(y, is_log=is_log) for y in line.y] for line in lines]
    label = f"{y_label or ', '.join(line.name for line in lines)} over {x_label}"
    with _axes(height=3.0, label=label) as (axes, svg):
        if not any(math.isfinite(y) for ys in points for y in ys):
            _say_nothing(axes)
            return svg()
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(LogFormatter())  # for `_tick`'s reason
        _plot(axes, lines, points)
        if marked_x is not None:
            axes.axvline(marked_x, color=_TEXT, linewidth=1, linestyle=_DASHES[2])
        if all(float(x).is_integer() for line in lines for x in line.x):
            axes.locator_params(axis="x", integer=True)
        axes.set(xlabel=x_label, ylabel=y_label)
        if len(lines) > 1 or not y_label:
            _name_lines(axes)
        return svg()


def time_chart(lines: Sequence[Line], *, y_label: str) -> str:
    """Lines over days and hours (UTC), from 0 upwards; for half a page.

    Args:
        lines: Their `x` are seconds since 1970, their `y` 0 or more.
        y_label: What is drawn, with its unit.

    Returns:
        An `<svg>` element. Without a single value it says so.

    Raises:
        ValueError: A line has another number of x than of y.
    """
    from matplotlib import dates

    _check_lengths(lines)
    points = [[_drawn(y, is_log=False) for y in line.y] for line in lines]
    with _axes(height=2.1, width=_HALF_WIDTH, label=f"{y_label} over time") as (axes, svg):
        if not any(math.isfinite(y) for ys in points for y in ys):
            _say_nothing(axes)
            return svg()
        days = [Line(line.name, [x / DAY_SECONDS for x in line.x], line.y, line.is_dashed) for line in lines]
        _plot(axes, days, points)
        places = [x for line in days for x in line.x]
        if min(places) == max(places):
            axes.set_xlim(places[0] - 0.5, places[0] + 0.5)
        locator = dates.AutoDateLocator(tz=datetime.UTC, minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        formatter = dates.ConciseDateFormatter(locator, tz=datetime.UTC)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(formatter)
        highest = max(y for ys in points for y in ys if math.isfinite(y))
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            _name_lines(axes)
        return svg()


def _check_lengths(lines: Sequence[Line]) -> None:
    for line in lines:
        if len(line.x) != len(line.y):
            raise ValueError(f"the line {line.name!r} has {len(line.x)} x and {len(line.y)} y")


def _plot(axes: Axes, lines: Sequence[Line], points: Sequence[Sequence[float]]) -> None:
    """Draw each line through its x and the heights in `points`, over a grid."""
    for number, (line, ys) in enumerate(zip(lines, points, strict=True)):
        axes.plot(
            line.x,
            ys,
            label=line.name,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[1] if line.is_dashed else _DASHES[0],
            linewidth=1.8,
            marker="o" if len(line.x) <= _MANY_POINTS else "",
            markersize=3.5,
        )
    axes.yaxis.set_major_formatter(_tick)
    axes.grid(True, axis="y")


def _name_lines(axes: Axes) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.6)


def bar_chart(names: Sequence[str], values: Sequence[float], *, value_label: str) -> str:
    """One horizontal bar a name, from the top down, each with its number.

    Args:
        names: Any text; long ones are cut.
        values: As many, finite, 0 or more.
        value_label: What the bars count.

    Returns:
        An `<svg>` element. Without a single bar it says so.

    Raises:
        ValueError: There are not as many values as names.
    """
    if len(names) != len(values):
        raise ValueError(f"{len(names)} names and {len(values)} values")
    with _axes(height=0.5 + 0.19 * max(len(names), 4), label=value_label) as (axes, svg):
        if not names:
            _say_nothing(axes)
            return svg()
        places = range(len(names))
        bars = axes.barh(places, values, height=0.74, color=_COLOURS[0])
        axes.bar_label(bars, labels=[_number(value) for value in values], padding=3, fontsize=8)
        axes.set_yticks(places, [_cut(name) for name in names])
        axes.invert_yaxis()
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
        axes.xaxis.set_major_formatter(_tick)
        axes.set_xlabel(value_label)
        return svg()


def histogram(counts: Sequence[float], *, first: int = 0, x_label: str, y_label: str) -> str:
    """One vertical bar for each whole number from `first` on.

    Args:
        counts: Heights, 0 or more; those at the end that are 0 are left out.
        first: What the first bar stands for.
        x_label: What the numbers are.
        y_label: What the bars count.

    Returns:
        An `<svg>` element. Without a single count it says so.
    """
    end = max((place + 1 for place, count in enumerate(counts) if count), default=0)
    with _axes(height=2.5, label=f"{y_label} by {x_label}") as (axes, svg):
        if not end:
            _say_nothing(axes)
            return svg()
        axes.bar(range(first, first + end), counts[:end], width=0.82, color=_COLOURS[0])
        axes.locator_params(axis="x", integer=True)
        axes.yaxis.set_major_formatter(_tick)
        axes.margins(x=0.01)
        axes.grid(True, axis="y")
        axes.set(xlabel=x_label, ylabel=y_label)
        return svg()


@contextmanager
def _axes(*, height: float, label: str, width: float = _WIDTH) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Empty axes in the pages' style, and what turns them into an `<svg>` element; sizes in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

        def svg() -> str:
            written = io.StringIO()
            figure.savefig(written, format="svg", bbox_inches="tight", transparent=True, metadata=_NO_DATE)
            return _bare(written.getvalue(), label)

        yield axes, svg


_NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _bare(document: str, label: str) -> str:
    """The `<svg>` element of a document, as wide as its place on the page allows, with a name for readers."""
    from xml.sax.saxutils import quoteattr

    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\sheight="[^"]*"', "", opening, count=1)
    found = re.search(r'\swidth="([\d.]+)pt"', opening)
    full = f' style="--full: {_PIXELS_A_POINT * float(found[1]):.0f}px"' if found else ""
    # What is neither line nor bar goes by the page, which may be light or dark.
    rest = rest.replace(f": {_TEXT}", f": var(--soft, {_TEXT})").replace(
        f": {_GRID}", f": var(--line, {_GRID})"
    )
    return f'{opening}{full} role="img" aria-label={quoteattr(label)}>{rest}'.strip()


def _say_nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)


def _drawn(value: float, *, is_log: bool) -> float:
    value = float(value)
    return value if math.isfinite(value) and (value > 0 or not is_log) else math.nan


def _tick(value: float, _: float) -> str:
    """A number at an axis; matplotlib's own are TeX where the axis is logarithmic."""
    return _number(value)


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3g}"


def _cut(name: str, length: int = 32) -> str:
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return name if len(name) <= length else name[: length - 1] + "…"
