"""Selecting, exporting, keys, dialogs and the phone: what people do with an answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest


def _download(tab: Any, act: Any) -> tuple[str, str]:
    """Name and text of the file that an act brings."""
    with tab.page.expect_download() as caught:
        act()
    return caught.value.suggested_filename, Path(caught.value.path()).read_text()


def _export(tab: Any, *, kind: str) -> tuple[str, str]:
    tab.page.check(f"#export [value={kind}]")
    return _download(tab, lambda: tab.page.click("#export [type=submit]"))


def _focused(tab: Any) -> int | None:
    """The image id of the tile that has the focus."""
    found = tab.page.evaluate("document.activeElement.dataset.id ?? null")
    return None if found is None else int(found)


def test_selected_images_as_coco(tab: Any, served: Any) -> None:
    tab.open("?q=a+keyboard+AND+a+ghost")
    ids = tab.ids()
    ticks = tab.page.locator(".hit .tick")
    ticks.nth(1).click()
    ticks.nth(3).click(modifiers=["Shift"])
    ticks.nth(2).click()
    assert tab.page.inner_text("#selected-count") == "2 selected"
    tab.page.click("#export-selected")
    name, text = _export(tab, kind="coco")
    assert name.endswith(".json")
    coco = json.loads(text)
    assert [each["name"] for each in coco["categories"]] == ["a keyboard", "a ghost"]
    assert len(coco["images"]) == 2
    assert len(coco["annotations"]) == 4
    boxes = _boxes_of_tile(tab, ids[1])
    image = next(each for each in coco["images"] if each["file_name"] == _uri(tab, served, ids[1]))
    drawn = {
        (each["category_id"], *(round(side) for side in each["bbox"]))
        for each in coco["annotations"]
        if each["image_id"] == image["id"]
    }
    categories = {each["name"]: each["id"] for each in coco["categories"]}
    width, height = image["width"], image["height"]
    seen = {
        (
            categories[n],
            round(x0 * width),
            round(y0 * height),
            round((x1 - x0) * width),
            round((y1 - y0) * height),
        )
        for n, (x0, y0, x1, y1) in boxes
    }
    for one, other in zip(sorted(drawn), sorted(seen), strict=True):
        assert one == pytest.approx(other, abs=2)


def _boxes_of_tile(tab: Any, image_id: int) -> list[tuple[str, list[float]]]:
    return tab.page.evaluate(
        """id => [...document.querySelectorAll(`.tile[data-id='${id}'] .box`)].map(each => {
            const {left, top, width, height} = each.style, cut = text => parseFloat(text) / 100;
            const [x, y] = [cut(left), cut(top)];
            return [each.dataset.name, [x, y, x + cut(width), y + cut(height)]]; })""",
        image_id,
    )


def _uri(tab: Any, served: Any, image_id: int) -> str:
    return tab.page.request.get(f"{served.url}images/{image_id}/objects").json()["uri"]


def test_best_above_the_threshold_as_csv_and_lines(tab: Any) -> None:
    tab.open("?q=a+keyboard&min=0.74")
    shown = tab.tiles.count()
    assert 0 < shown < 60
    tab.page.click("#export-open")
    assert tab.page.is_disabled("#export [value=selected]")
    assert "score 0.740 or more" in tab.page.inner_text("#export")
    assert tab.page.get_attribute("#export [name=count]", "max") == "10000"
    _, text = _export(tab, kind="csv")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == shown
    assert all(float(row["score"]) >= 0.74 for row in rows)
    tab.page.click("#export-open")
    tab.page.fill("#export [name=count]", "2")
    _, text = _export(tab, kind="jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["image_id"] for line in lines] == tab.ids()[:2]


def test_failed_export_says_so_in_the_dialog(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.page.route(
        "**/export",
        lambda route: route.fulfill(status=503, json={"error": "busy: ask again", "code": "busy"}),
    )
    tab.page.click("#export-open")
    tab.page.click("#export [type=submit]")
    tab.page.locator("#export .problem:text('Busy: ask again.')").wait_for()
    assert tab.page.is_enabled("#export [type=submit]")


def test_all_by_keyboard(tab: Any) -> None:
    """From the question to a similar object and an export, without a pointer."""
    tab.open()
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("a keyboard")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".hit").first.wait_for()
    tab.settle()
    tab.page.keyboard.press("Escape")
    ids = tab.ids()
    assert _focused(tab) == ids[0]
    tab.page.keyboard.press("ArrowRight")
    assert _focused(tab) == ids[1]
    tab.page.keyboard.press("ArrowDown")
    below = ids.index(_focused(tab))
    tops = [tab.tiles.nth(rank).bounding_box()["y"] for rank in (1, below)]
    assert tops[1] > tops[0]
    tab.page.keyboard.press("ArrowUp")
    assert _focused(tab) == ids[1]
    tab.page.keyboard.press(" ")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Shift+ ")
    assert tab.page.inner_text("#selected-count") == "3 selected"
    tab.page.keyboard.press("Control+a")
    assert tab.page.inner_text("#selected-count") == f"{len(ids)} selected"
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("#selection").is_hidden()
    tab.page.keyboard.press("Enter")
    tab.page.locator(".slot").first.wait_for()
    assert tab.page.locator("#viewer[open]").count() == 1
    tab.page.keyboard.press("ArrowRight")
    tab.wait(f"location.search.includes('image={ids[4]}&')")
    tab.page.locator(".slot").first.wait_for()
    before = tab.page.get_attribute(".slot[aria-pressed=true]", "data-slot")
    tab.page.keyboard.press("ArrowUp" if int(before) else "ArrowDown")
    after = tab.page.get_attribute(".slot[aria-pressed=true]", "data-slot")
    assert after != before
    with tab.page.expect_request(lambda request: request.url.endswith("/search")) as asked:
        tab.page.keyboard.press("m")
    assert json.loads(asked.value.post_data)["like"] == f"{ids[4]}:{after}"
    tab.settle()
    tab.page.keyboard.press("e")
    assert tab.page.locator("#export[open]").count() == 1
    _, text = _download(tab, lambda: tab.page.keyboard.press("Enter"))
    assert text.count("\n") > 60


def test_closing_an_image_gives_its_tile_the_focus(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.tiles.nth(2).locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Escape")
    tab.wait("!location.search.includes('image')")
    assert _focused(tab) == tab.ids()[3]
    tab.tiles.nth(2).locator(".tile").click()
    tab.page.locator("#viewer[open]").wait_for()
    tab.page.go_back()
    tab.wait("!document.querySelector('#viewer').open")


def test_selection_outlives_a_refinement_a_reload_and_back(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.page.locator(".hit .tick").nth(0).click()
    tab.page.locator(".hit .tick").nth(2).click()
    chosen = [tab.ids()[rank] for rank in (0, 2)]
    assert tab.page.evaluate("location.hash") == f"#sel={chosen[0]},{chosen[1]}"
    tab.ask("a keyboard AND a ghost")
    marked = tab.page.locator(".hit.selected .tile").evaluate_all(
        "tiles => tiles.map(each => +each.dataset.id)"
    )
    assert set(marked) <= set(chosen)
    others = 2 - len(marked)
    tab.page.reload()
    tab.settle()
    assert tab.page.inner_text("#selected-count") == "2 selected"
    assert tab.page.inner_text("#selected-elsewhere") == (f"{others} not among these" if others else "")
    tab.page.click("#export-selected")
    _, text = _export(tab, kind="jsonl")
    assert {json.loads(line)["image_id"] for line in text.splitlines()} == set(chosen)
    tab.page.click("#select-none")
    assert tab.page.locator("#selection").is_hidden()
    assert tab.page.evaluate("location.hash") == ""
    assert _focused(tab) == tab.ids()[0]
    tab.page.go_back()  # clearing can be taken back
    tab.wait("document.getElementById('selected-count').textContent === '2 selected'")
    tab.page.go_back()  # to the first question
    tab.settle()
    assert tab.page.input_value("#question") == "a keyboard"
    assert tab.page.locator(".hit.selected").count() == 2
    tab.page.click(".brand")
    assert tab.page.evaluate("location.hash + location.search") == ""


def test_selection_goes_along_with_back_and_forward(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    chosen = [tab.ids()[0]]
    tab.tiles.nth(0).locator(".tick").click()
    tab.ask("a ghost")
    for go, question in ((tab.page.go_back, "a keyboard"), (tab.page.go_forward, "a ghost")):
        rank = next(rank for rank, image_id in enumerate(tab.ids()) if image_id not in chosen)
        chosen.append(tab.ids()[rank])
        tab.tiles.nth(rank).locator(".tick").click()
        go()
        tab.wait(f"document.getElementById('question').value === '{question}'")
        tab.settle()
        assert tab.page.evaluate("location.hash") == f"#sel={','.join(map(str, chosen))}"
        assert tab.page.inner_text("#selected-count") == f"{len(chosen)} selected"
    tab.page.click(".brand")
    assert tab.page.evaluate("location.hash + location.search") == ""
    tab.page.go_back()
    tab.page.go_back()  # starting again cleared it before
    tab.wait("document.getElementById('selected-count').textContent === '3 selected'")


def test_selected_in_an_open_image_stays_selected_when_back_closes_it(tab: Any) -> None:
    tab.open("?q=a+keyboard")
    tab.tiles.nth(1).locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    tab.page.keyboard.press("s")
    tab.page.go_back()
    tab.wait("!document.querySelector('#viewer').open")
    assert tab.page.evaluate("location.hash") == f"#sel={tab.ids()[1]}"
    assert tab.page.inner_text("#selected-count") == "1 selected"


def test_selection_is_as_large_as_an_address_holds(tab: Any) -> None:
    tab.open(f"?q=a+keyboard#sel=x,-1,{','.join(str(each) for each in range(100_000, 101_200))}")
    assert tab.page.inner_text("#selected-count") == "1,000 selected"
    assert tab.page.inner_text("#selected-elsewhere") == "1,000 not among these"
    tab.page.locator(".hit .tick").first.click()
    assert "At most 1,000 images" in tab.page.inner_text(".toast")
    assert tab.page.inner_text("#selected-count") == "1,000 selected"
    assert tab.page.locator(".hit .tick").first.is_checked() is False


def test_export_is_of_the_snapshot_that_is_seen(tab: Any, served: Any) -> None:
    seen = served.current.snapshot_id
    tab.open("?q=a+keyboard")
    served.index.publish(nprobe=4)
    assert served.current.refresh() is True
    tab.page.click("#export-open")
    tab.page.fill("#export [name=count]", "3")
    _, text = _export(tab, kind="csv")
    assert {row["snapshot_id"] for row in csv.DictReader(text.splitlines())} == {str(seen)}


def test_export_says_when_the_snapshot_that_is_seen_is_there_no_more(tab: Any) -> None:
    changed = {"error": "snapshot 1 is not served any more", "code": "snapshot_changed", "position": None}
    tab.open("?q=a+keyboard")
    tab.page.route("**/export", lambda route: route.fulfill(status=409, json=changed))
    tab.page.click("#export-open")
    tab.page.click("#export [type=submit]")
    tab.page.locator("#export .problem:text('The index was updated since this answer')").wait_for()
    tab.page.keyboard.press("Escape")
    assert "The index was updated" in tab.page.inner_text(".banner")


@pytest.mark.slow
def test_export_dialog_closes_with_its_answer(tab: Any) -> None:
    tab.open()
    tab.ask("a ghost")
    tab.ask("a keyboard")
    for _ in range(2):  # to another question, and to none
        tab.page.click("#export-open")
        tab.page.locator("#export[open]").wait_for()
        tab.page.go_back()
        tab.wait("!document.querySelector('#export').open")
        tab.settle()
    assert tab.query() == ""


def test_keys_go_on_when_what_had_the_focus_is_gone(tab: Any) -> None:
    tab.open("?q=a+keyboard#sel=1")
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    tab.page.keyboard.press("Enter")
    ids = tab.ids()
    assert _focused(tab) == ids[0]
    assert tab.page.evaluate("location.hash") == "#sel=1"
    tab.page.keyboard.press("Enter")
    tab.page.locator(".slots .box").first.wait_for()
    tab.page.locator(".slots .box").last.click()  # has the focus, and goes with the next image
    for rank in (1, 2):
        tab.page.keyboard.press("ArrowRight")
        tab.wait(f"location.search.includes('image={ids[rank]}&')")
    tab.page.locator(".slot").first.wait_for()
    tab.page.locator(".slot").first.focus()
    tab.page.keyboard.press("ArrowDown")
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    for key in ("r", "Escape", "r"):  # a region is begun, left, and begun again
        tab.page.keyboard.press(key)
    assert tab.page.locator("#viewer .region").is_visible()
    tab.page.keyboard.press("m")
    tab.page.locator("#example:has-text('more like this region')").wait_for()
    tab.settle()
    assert _focused(tab) == tab.ids()[0]


def test_focus_is_under_no_bar(tab: Any) -> None:
    tab.open("?q=a+keyboard#sel=1")
    tab.page.press("#question", "Escape")
    for key in ["ArrowDown"] * 7 + ["ArrowUp"] * 7:
        tab.page.keyboard.press(key)
        bar, top, bottom, selection = tab.page.evaluate(
            """() => {
                const box = each => each.getBoundingClientRect(), focused = box(document.activeElement);
                const [bar, selection] = ['.top', '#selection'].map(at => box(document.querySelector(at)));
                return [bar.bottom, focused.top, focused.bottom, selection.top]; }"""
        )
        assert bar <= top < bottom <= selection


@pytest.mark.parametrize(("key", "dialog"), [("?", "#help"), ("e", "#export"), ("Enter", "#viewer")])
def test_dialogs_keep_the_focus_and_close(tab: Any, key: str, dialog: str) -> None:
    tab.open("?q=a+keyboard")
    tab.page.press("#question", "Escape")
    tab.page.keyboard.press(key)
    tab.page.locator(f"{dialog}[open]").wait_for()
    inside = f"document.activeElement === document.body || !!document.activeElement.closest('{dialog}')"
    for _ in range(12):
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate(inside)
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(f"{dialog}[open]").count() == 0


def test_phone(open_tab: Any) -> None:
    tab = open_tab(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    wide = "document.documentElement.scrollWidth > innerWidth"
    tab.open()
    assert tab.page.evaluate(wide) is False
    tab.open(
        "?q=a+keyboard+AND+a+very+long+name+that+goes+on+and+on&where=width+%3E+0+AND+height+%3E+0&glob=*.jpg"
        "#sel=123456"
    )
    assert tab.page.evaluate(wide) is False
    bar = tab.page.locator("#selection").bounding_box()
    assert bar["x"] >= 0
    assert bar["x"] + bar["width"] <= 390
    assert tab.page.locator("#select-none").bounding_box()["x"] < 320
    boxes = [tab.tiles.nth(rank).bounding_box() for rank in range(4)]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 80 for box in boxes)
    assert tab.page.locator(".hit .caption b").first.is_visible()  # no hovering here
    tab.page.tap("#filters-toggle")
    assert tab.page.evaluate(wide) is False
    tab.page.tap("#filters-toggle")
    tab.tiles.first.locator(".tile").tap()
    tab.page.locator(".slot").first.wait_for()
    stage = tab.page.locator("#viewer .figure").bounding_box()
    like = tab.page.locator("[data-do=like]").bounding_box()
    assert stage["x"] >= 0
    assert stage["x"] + stage["width"] <= 390
    assert like["y"] + like["height"] <= 844
    assert tab.page.evaluate(wide) is False
