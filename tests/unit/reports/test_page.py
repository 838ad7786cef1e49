"""A page is parsed as a browser would: what it shows, that it is closed, and that it loads nothing."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from for_ray.reports.charts import histogram
from for_ray.reports.page import (
    Chart,
    Facts,
    Gallery,
    Notice,
    Picture,
    Table,
    Tag,
    render_page,
    shown,
    shown_bytes,
    shown_seconds,
)

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {"meta", "img", "br", "use"}


class Page(HTMLParser):
    """Elements and text of a page; complains about elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.cells.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def small_jpeg() -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(written, "JPEG")
    return written.getvalue()


def test_a_page_shows_every_section_in_order():
    page = Page(
        render_page(
            "Labels",
            subtitle="made today",
            sections=[
                Facts("Settings", [("threshold", 5e-4), ("images", 118287), ("split", None), ("on", True)]),
                Chart("Counts", histogram([1, 2], x_label="labels", y_label="images"), note="a note"),
                Table("Quality", ["group", "precision"], [["base", 0.51234], ["novel", None]]),
                Gallery("Some", [Picture("a.jpg", [Tag("dog", 0.5, "good"), Tag("cat")], small_jpeg())]),
            ],
        )
    )
    assert [cell for cell in page.cells if cell in {"Settings", "Counts", "Quality", "Some"}] == [
        *("Settings", "Counts", "Quality", "Some")
    ]
    assert {
        "Labels",
        "made today",
        "0.0005",
        "118,287",
        "–",
        "yes",
        "a note",
        "0.512",
        "✓ dog",
        "cat",
        "0.5",
    } <= set(page.cells)
    assert [each.get("class") for each in page.all("td")][-4:] == [None, "number", None, "number"]
    image = page.all("img")[0]
    assert base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,")) == small_jpeg()
    assert image["alt"] == "a.jpg"
    assert "tag good" in [each.get("class") for each in page.all("span")]


def test_whatever_names_hold_nothing_runs_and_nothing_is_loaded():
    html = render_page(
        EVIL,
        subtitle=EVIL,
        sections=[
            Notice(EVIL, EVIL, note=EVIL),
            Facts(EVIL, [(EVIL, EVIL)], note=EVIL),
            Table(EVIL, [EVIL], [[EVIL], [(EVIL, EVIL)]], note=EVIL),
            Gallery(EVIL, [Picture(EVIL, [Tag(EVIL, 0.1)], problem=EVIL), Picture(EVIL, [], small_jpeg())]),
        ],
    )
    page = Page(html)
    assert page.all("script") == []
    assert [image["src"][:11] for image in page.all("img")] == ["data:image/"]
    assert not any(name.startswith("on") for _, each in page.elements for name in each)
    assert not any(
        value and value.startswith(("http:", "https:", "//"))
        for _, each in page.elements
        for name, value in each.items()
        if name in {"src", "href"}
    )
    assert page.all("link") == []
    policy = next(each for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_a_notice_has_a_tone_and_sections_may_be_half_as_wide():
    page = Page(
        render_page(
            "x",
            sections=[
                Notice("a", "it is bad", "bad"),
                Notice("b", "so so", is_half=True),
                Facts("c", [], is_half=True),
                Table("d", ["names", "number"], [[("one", "two"), 3], [(), None]]),
            ],
        )
    )
    assert [each["class"] for each in page.all("section")] == [
        *("notice bad", "notice half", "facts half", "table")
    ]
    assert {"it is bad", "so so", "one", "two"} <= set(page.cells)
    assert len(page.all("br")) == 1
    assert [each.get("class") for each in page.all("td")] == ["lines", "number", "lines", "number"]


def test_a_picture_without_an_image_says_why_and_one_without_tags_says_so():
    page = Page(render_page("x", sections=[Gallery("", [Picture("a.jpg", [], problem="it is gone")])]))
    assert {"it is gone", "nothing"} <= set(page.cells)
    assert page.all("img") == []
    assert page.all("h2") == []


def test_a_table_whose_rows_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="'Quality' needs 2 values"):
        render_page("x", sections=[Table("Quality", ["a", "b"], [["only one"]])])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (np.int64(12), "12"),
        (0.12345, "0.123"),
        (np.float32(0.5), "0.5"),
        (1e-5, "1e-05"),
        (1234.56, "1,234.6"),
        ("1.50", "1.50"),
        (0, "0"),
    ],
)
def test_values_are_written_for_people(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (530.04, "530 B"),
        (45.7e9, "45.7 GB"),
        (2e15, "2 PB"),
        (3e18, "3,000 PB"),
    ],
)
def test_bytes_are_written_in_decimal_units(value, text):
    assert shown_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7260, "2 h 01 min")]
)
def test_seconds_are_written_for_people(value, text):
    assert shown_seconds(value) == text
