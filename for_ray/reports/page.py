"""A page of charts, tables and pictures: one HTML file that loads nothing, whatever the names in it hold."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        title: Above it; empty for none.
        svg: An element from `charts`; the only thing that reaches the page as it is.
        note: Below it; empty for none.
        is_half: Half as wide as the page, beside another such section; on a narrow page like all others.
    """

    kind: ClassVar[str] = "chart"
    title: str
    svg: str
    note: str = ""
    is_half: bool = False


Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Notice:
    """A sentence that nobody may miss.

    Attributes:
        title: Above it; empty for none.
        text: The sentence.
        tone: `good` and `bad` give it a colour.
        note: Below it; empty for none.
        is_half: As of a chart.
    """

    kind: ClassVar[str] = "notice"
    title: str
    text: str
    tone: Tone = ""
    note: str = ""
    is_half: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and their values, one below the other, such as a run's settings.

    Attributes:
        title: Above them; empty for none.
        values: Pairs; a value is a text, a number, or None.
        note: Below them; empty for none.
        is_half: As of a chart.
    """

    kind: ClassVar[str] = "facts"
    title: str
    values: Sequence[tuple[str, object]]
    note: str = ""
    is_half: bool = False


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers are set to the right.

    Attributes:
        title: Above it; empty for none.
        header: A name for each column.
        rows: As many values each: texts, numbers, None, or a tuple of texts, each on a line of its own.
        note: Below it; empty for none.
    """

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    @property
    def numeric(self) -> set[int]:
        """The columns that hold numbers, or nothing."""
        return {
            column
            for column in range(len(self.header))
            if self.rows and all(row[column] is None or _is_number(row[column]) for row in self.rows)
        }


@dataclass(frozen=True)
class Tag:
    """A word below a picture.

    Attributes:
        text: The word.
        number: Behind it, such as a probability; None for none.
        kind: `good` and `bad` give it a colour and a mark.
    """

    text: str
    number: float | None = None
    kind: Tone = ""


@dataclass(frozen=True)
class Picture:
    """An image with what is to be said of it.

    Attributes:
        caption: Such as its file name.
        tags: Below it.
        jpeg: A small JPEG file; None shows `problem` instead.
        problem: Why there is none.
    """

    caption: str
    tags: Sequence[Tag]
    jpeg: bytes | None = None
    problem: str = "no image"

    @property
    def data_uri(self) -> str:
        """The image itself, as the page holds it."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg or b'').decode()}"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side.

    Attributes:
        title: Above them; empty for none.
        pictures: In their order.
        note: Below them; empty for none.
    """

    kind: ClassVar[str] = "gallery"
    title: str
    pictures: Sequence[Picture]
    note: str = ""


Section = Notice | Chart | Facts | Table | Gallery


def render_page(title: str, *, subtitle: str = "", sections: Sequence[Section]) -> str:
    """The page as HTML text, to be written as UTF-8.

    Args:
        title: What it is about.
        subtitle: A smaller line below, such as when and from what it was made.
        sections: In their order; one that has no title stands without.

    Raises:
        ValueError: A row of a table has another number of values than the header.
    """
    for section in sections:
        if isinstance(section, Table) and any(len(row) != len(section.header) for row in section.rows):
            raise ValueError(f"every row of the table {section.title!r} needs {len(section.header)} values")
    return _template().render(title=title, subtitle=subtitle, sections=sections)


def shown(value: object) -> str:
    """A value as people read it: 1,234 · 0.123 · 1e-05 · – for None and for what is not finite."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        return "–"
    if number.is_integer() and abs(number) < 1e15:
        return f"{number:,.0f}"
    return f"{number:,.1f}" if abs(number) >= 100 else f"{number:.3g}"


def shown_bytes(num_bytes: float) -> str:
    """A number of bytes in decimal units: 0 B · 999 B · 1.23 kB · 45.7 GB."""
    unit, size = scale_bytes(num_bytes)
    return f"{shown(float(f'{num_bytes / size:.3g}'))} {unit}"


def shown_seconds(seconds: float) -> str:
    """A duration as people read it: 12.3 s · 4 min 05 s · 2 h 01 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def scale_bytes(num_bytes: float) -> tuple[str, int]:
    """The decimal unit that suits a number of bytes, and how many bytes it has."""
    for power, unit in reversed(list(enumerate(("B", "kB", "MB", "GB", "TB", "PB")))):
        if num_bytes >= 1000**power:
            return unit, 1000**power
    return "B", 1


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool)


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return environment.from_string(text)
