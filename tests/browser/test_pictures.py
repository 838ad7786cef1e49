"""Asking with pictures: chosen, pasted, dropped, a region of one, and a region of an image of the index."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

DROP = """([encoded, kind, type]) => {
    const bytes = Uint8Array.from(atob(encoded), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], 'picture.jpg', {type}));
    const event = kind === 'paste'
        ? new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true})
        : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
}"""


def _give(tab: Any, path: Path, kind: str) -> None:
    """Paste or drop a file."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    if kind == "drop":
        tab.page.evaluate(DROP, [encoded, "dragover", "image/jpeg"])
        assert tab.page.locator("#drop").is_visible()
    tab.page.evaluate(DROP, [encoded, kind, "image/jpeg"])
    tab.page.locator("#picture[open]").wait_for()


def _search(tab: Any, act: Any) -> dict[str, Any]:
    with tab.page.expect_response(lambda response: response.url.endswith("/search")) as caught:
        act()
    tab.settle()
    return json.loads(caught.value.request.post_data)


def _drag(tab: Any, figure: str, region: tuple[float, float, float, float]) -> None:
    box = tab.page.locator(figure).bounding_box()
    points = [
        (box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (region[:2], region[2:])
    ]
    tab.page.mouse.move(*points[0])
    tab.page.mouse.down()
    tab.page.mouse.move(*points[1], steps=5)
    tab.page.mouse.up()


@pytest.mark.parametrize("kind", ["choose", "paste", "drop"])
def test_picture_finds_itself(tab: Any, served: Any, kind: str) -> None:
    path = served.book.folder / "000028.jpg"
    tab.open()
    if kind == "choose":
        tab.page.set_input_files("#file", path)
        tab.page.locator("#picture[open]").wait_for()
    else:
        _give(tab, path, kind)
    asked = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    assert base64.b64decode(asked["image"]) == path.read_bytes()
    assert "region" not in asked
    assert "000028.jpg" in tab.tiles.first.locator(".tile").get_attribute("aria-label")
    assert "your picture" in tab.page.inner_text("#example")
    assert tab.query().startswith("?picture=")


def test_region_of_a_picture_drawn_and_changed(tab: Any, served: Any) -> None:
    tab.open()
    tab.page.set_input_files("#file", served.book.folder / "000028.jpg")
    truth, *_ = served.book.truth("000028.jpg", "keyboard")
    _drag(tab, "#picture .figure", truth)
    assert tab.page.inner_text("#picture [data-do=ask]") == "Search with this region"
    asked = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    assert asked["region"] == pytest.approx(truth, abs=0.01)
    assert "000028.jpg" in tab.tiles.first.locator(".tile").get_attribute("aria-label")
    tab.page.click("#example button")  # the picture is still there, to draw another
    tab.page.locator("#picture .region:not([hidden])").wait_for()
    tab.page.click("#picture [data-do=whole]")
    assert "region" not in _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    tab.page.go_back()
    tab.settle()
    assert "a region of your picture" in tab.page.inner_text("#example")


def test_region_by_keys(tab: Any, served: Any) -> None:
    tab.open()
    tab.page.set_input_files("#file", served.book.folder / "000028.jpg")
    tab.page.locator("#picture[open]").wait_for()
    for key in ("r", "ArrowLeft", "ArrowUp", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown"):
        tab.page.keyboard.press(key)
    asked = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    assert asked["region"] == pytest.approx([0.28, 0.26, 0.7, 0.68], abs=1e-6)


def test_large_picture_is_made_smaller(tab: Any, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 8_000_000
    tab.open()
    tab.page.set_input_files("#file", tmp_path / "noise.png")
    asked = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    sent = base64.b64decode(asked["image"])
    assert sent[:3] == b"\xff\xd8\xff"
    assert len(sent) < 3_000_000


def test_picture_of_few_bytes_and_many_pixels_is_made_smaller(tab: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (6000, 5000)).save(tmp_path / "even.png")
    assert (tmp_path / "even.png").stat().st_size < 200_000
    tab.open()
    tab.page.set_input_files("#file", tmp_path / "even.png")
    asked = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    assert base64.b64decode(asked["image"])[:3] == b"\xff\xd8\xff"
    assert tab.tiles.count() > 0


def test_picture_is_encoded_once_for_all_its_questions(tab: Any, served: Any) -> None:
    tab.open()
    tab.page.evaluate(
        """() => { const read = FileReader.prototype.readAsDataURL; window.numRead = 0;
            FileReader.prototype.readAsDataURL = function (blob) {
                window.numRead += 1;
                read.call(this, blob); }; }"""
    )
    tab.page.set_input_files("#file", served.book.folder / "000028.jpg")
    first = _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    tab.page.click("#filters-toggle")
    tab.page.fill("[name=glob]", "*0.jpg")
    refined = _search(tab, lambda: tab.page.click("#filters [type=submit]"))
    assert refined["image"] == first["image"]
    _search(tab, tab.page.go_back)
    assert tab.page.evaluate("window.numRead") == 1


def test_file_that_is_no_picture_is_one_line(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    tab.open()
    tab.page.set_input_files("#file", tmp_path / "no.jpg")
    tab.page.click("#picture [data-do=ask]")
    tab.page.locator("text=No answer").wait_for()
    assert tab.page.locator("#state p").count() == 1


def test_picture_is_not_in_the_address(tab: Any, served: Any) -> None:
    tab.open()
    tab.page.set_input_files("#file", served.book.folder / "000028.jpg")
    assert "after a reload, give it again" in tab.page.inner_text("#picture")
    _search(tab, lambda: tab.page.click("#picture [data-do=ask]"))
    tab.page.reload()
    tab.settle()
    assert "The picture is not here any more" in tab.page.inner_text("#state")
    tab.ask("a keyboard")
    assert tab.query() == "?q=a+keyboard"


def test_region_of_an_image_of_the_index(tab: Any, served: Any) -> None:
    tab.open("?q=a+keyboard")
    assert "000028.jpg" in tab.tiles.first.locator(".tile").get_attribute("aria-label")
    tab.tiles.first.locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    tab.page.click("[data-do=region]")
    truth, *_ = served.book.truth("000028.jpg", "keyboard")
    _drag(tab, "#viewer .figure", truth)
    assert "More like this region" in tab.page.inner_text("[data-do=like]")
    image_id = tab.ids()[0]
    asked = _search(tab, lambda: tab.page.click("[data-do=like]"))
    assert asked["like"] == str(image_id)
    assert "image" not in asked  # the index holds it: nothing is uploaded
    assert asked["region"] == pytest.approx(truth, abs=0.01)
    assert tab.page.inner_text("#example") == "more like this region"
    found = tab.ids()
    assert found[0] == image_id
    tab.page.reload()  # such a region is in the address
    tab.settle()
    assert tab.ids() == found
