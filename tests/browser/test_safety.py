"""What must not happen: foreign requests, markup from data, silent failures; tokens; switched indexes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import EVIL, serving

PAGE = Path(__file__).parents[2] / "for_ray" / "serving" / "page"
MARKUP = """<img src=x onerror="document.title='owned'">"""


def test_policy_and_files_without_inline_code() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", html)
    for path in [*PAGE.glob("*.js"), *PAGE.glob("*.css"), PAGE / "index.html"]:
        text = path.read_text().replace("http://www.w3.org/", "")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        )
        assert not re.search(r"https?://", text), f"{path.name} names a host"


def test_no_request_leaves_the_host(tab: Any) -> None:
    blocked = []
    tab.page.route(
        lambda url: not url.startswith((tab.url, "blob:", "data:")),
        lambda route: blocked.append(route.request.url),
    )
    tab.open()
    tab.ask("a keyboard")
    tab.tiles.first.locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    assert blocked == []
    assert len(tab.requests) > 40
    header = tab.page.request.get(tab.url).headers["content-security-policy"]
    assert "default-src 'none'" in header
    assert "unsafe" not in header


def test_uri_that_is_markup_stays_text(tab: Any) -> None:
    tab.open("?q=a+keyboard&glob=*script*")
    assert tab.ids() == [int(tab.page.get_attribute(".tile", "data-id"))]
    assert EVIL in tab.page.get_attribute(".tile", "aria-label")
    tab.tiles.first.locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    assert tab.page.inner_text("#viewer-title") == EVIL
    assert tab.page.inner_text(".uri").endswith(EVIL)
    _assert_not_owned(tab)


def test_question_and_filters_that_are_markup_stay_text(tab: Any) -> None:
    tab.open()
    tab.ask(MARKUP)
    _assert_not_owned(tab)
    tab.ask(f"(a dog AND {MARKUP}")  # an error that quotes the question
    assert tab.page.inner_text("#question-error")
    _assert_not_owned(tab)
    tab.ask(f"a cat AND '{MARKUP.replace(chr(34), '')}'")  # names in the legend, on tiles, in the history
    assert MARKUP.replace('"', "") in tab.page.inner_text("#legend")
    tab.page.fill("#question", "")
    assert tab.page.locator("#suggestions [role=option]").count() >= 1
    _assert_not_owned(tab)
    tab.open(f"?q=a+cat&glob={MARKUP.replace('=', '%3D')}&like=%3Cb%3E&min=%3Cb%3E&image=%3Cb%3E")
    assert "begins" not in tab.page.inner_text("#active-filters")
    assert MARKUP in tab.page.inner_text("#active-filters")
    _assert_not_owned(tab)


def _assert_not_owned(tab: Any) -> None:
    assert tab.page.title() != "owned"
    assert tab.page.locator("img[src=x], #results script, #results b:not(.caption b, .chip b)").count() == 0


@pytest.fixture(scope="module")
def violations() -> Callable[[Any], list[tuple[str, str]]]:
    """What axe-core finds on a page that keeps people out: its rules, and where."""
    reason = "the package axe-playwright-python is missing: the extra `dev` brings it"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason).Axe()

    def find(page: Any) -> list[tuple[str, str]]:
        found = axe.run(page).response["violations"]
        return [
            (each["id"], each["nodes"][0]["html"])
            for each in found
            if each["impact"] in {"moderate", "serious", "critical"}
        ]

    return find


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_tab: Any, violations: Any, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme, reduced_motion="reduce")

    def check(where: str) -> None:
        assert violations(tab.page) == [], where

    tab.open()
    check("start")
    tab.open("?q=a+keyboard+AND+a+ghost&where=width+%3E+0")
    tab.page.click("#filters-toggle")
    tab.page.locator(".hit .tick").first.check()
    check("results")
    tab.page.click("#export-selected")
    check("export")
    tab.page.keyboard.press("Escape")
    tab.page.click("#keys")
    check("help")
    tab.page.keyboard.press("Escape")
    tab.tiles.first.locator(".tile").click()
    tab.page.locator(".slot").first.wait_for()
    check("viewer")
    tab.open("?q=a+dog+AND")
    check("error")
    tab.page.fill("#question", "")
    check("suggestions")
    tab.open("?q=a+keyboard&under=/nowhere")
    check("nothing found")


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_accessibility_of_the_other_dialogs(
    open_tab: Any, served: Any, locked: str, violations: Any, scheme: str
) -> None:
    tab = open_tab(locked, color_scheme=scheme, reduced_motion="reduce")
    tab.page.goto(locked)
    tab.page.locator("#token[open]").wait_for()
    assert violations(tab.page) == []
    tab.page.fill("#token [name=token]", "open sesame 123")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".state h2").wait_for()
    tab.page.set_input_files("#file", served.book.folder / "000028.jpg")
    tab.page.locator("#picture[open]").wait_for()
    tab.page.keyboard.press("r")
    assert violations(tab.page) == []


def test_accessibility_on_a_phone(open_tab: Any, violations: Any) -> None:
    tab = open_tab(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    tab.open("?q=a+keyboard+AND+a+ghost#sel=1")
    assert violations(tab.page) == []
    tab.tiles.first.locator(".tile").tap()
    tab.page.locator(".slot").first.wait_for()
    tab.page.tap("[data-do=region]")
    assert violations(tab.page) == []


def test_theme_is_chosen_and_kept(open_tab: Any) -> None:
    tab = open_tab(color_scheme="dark")
    tab.open()
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(ground)
    tab.page.click("#theme")
    light = tab.page.evaluate(ground)
    assert light != dark
    assert tab.page.get_attribute("#theme", "aria-label") == "Colours: light"
    tab.open()
    assert tab.page.evaluate(ground) == light
    tab.page.click("#theme")
    tab.page.click("#theme")
    assert tab.page.evaluate(ground) == dark


def test_error_is_one_line_and_a_retry(tab: Any) -> None:
    tab.open()
    broken = {
        "status": 503,
        "json": {"error": "the store is away: try later", "code": "index", "position": None},
    }
    tab.page.route("**/search", lambda route: route.fulfill(**broken))
    tab.ask("a keyboard")
    assert tab.page.locator("#state p").all_inner_texts() == ["The store is away: try later."]
    tab.page.unroute("**/search")
    tab.page.click("text=Try again")
    tab.settle()
    assert tab.tiles.count() >= 60


def test_service_that_is_gone_is_told(tab: Any) -> None:
    tab.open()
    tab.page.route("**/search", lambda route: route.abort())
    tab.ask("a keyboard")
    assert "does not answer" in tab.page.inner_text("#state")


def test_grey_tiles_while_an_answer_is_on_its_way(tab: Any) -> None:
    waiting = []
    tab.open()
    tab.page.route("**/search", lambda route: waiting.append(route), times=1)
    tab.page.fill("#question", "a keyboard")
    tab.page.press("#question", "Enter")
    tab.page.locator(".grid[aria-busy] .skeleton").first.wait_for()
    assert tab.page.inner_text("#counted") == "Searching…"
    waiting[0].continue_()
    tab.settle()
    assert tab.page.locator(".skeleton").count() == 0


def test_slow_answer_of_an_earlier_question_is_dropped(tab: Any) -> None:
    waiting = []
    tab.open()
    tab.page.route("**/search", lambda route: waiting.append(route), times=1)
    tab.page.fill("#question", "a keyboard")
    tab.page.press("#question", "Enter")
    tab.page.locator(".skeleton").first.wait_for()
    tab.ask("a ghost")
    with contextlib.suppress(Exception):  # the page has given it up
        waiting[0].fulfill(
            json={"hits": [], "names": [], "next_page": None, "reason": "late", "snapshot_id": 1}
        )
    assert tab.page.locator("#legend li").all_inner_texts() == ["a ghost"]
    assert tab.tiles.count() >= 60


def test_switched_index_is_told_and_asked_again(tab: Any, served: Any) -> None:
    tab.open("?q=a+keyboard&k=10")
    served.index.publish(nprobe=4)
    assert served.current.refresh() is True
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    banner = tab.page.locator(".banner")
    banner.wait_for()
    assert "The index was updated" in banner.inner_text()
    banner.locator("button >> text=Ask again").click()
    tab.settle()
    assert banner.count() == 0
    assert tab.tiles.count() >= 10


def test_newer_snapshot_is_told_once(tab: Any, served: Any) -> None:
    newest = served.current.snapshot_id + 1
    tab.page.route("**/healthz", lambda route: route.fulfill(json={"snapshot_id": newest}))

    def look() -> None:
        with tab.page.expect_response("**/healthz"):
            tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        tab.settle()

    tab.open("?q=a+keyboard")
    banner = tab.page.locator(".banner")
    look()
    banner.locator("button >> text=Ask again").focus()
    look()
    assert tab.page.evaluate("document.activeElement.textContent") == "Ask again"
    banner.locator("[aria-label=Dismiss]").click()
    look()
    assert banner.count() == 0
    newest += 1
    look()
    assert "The index was updated" in banner.inner_text()


def test_page_of_an_old_snapshot_is_told(tab: Any) -> None:
    changed = {"error": "the page is of snapshot 1", "code": "snapshot_changed", "position": None}

    def answer(route: Any) -> None:
        if '"page"' in route.request.post_data:
            route.fulfill(status=409, json=changed)
        else:
            route.continue_()

    tab.page.route("**/search", answer)
    tab.open("?q=a+keyboard&k=30")
    tab.page.locator(".banner:has-text('The index was updated')").wait_for()
    assert tab.tiles.count() == 30
    tab.page.unroute("**/search")
    tab.page.click(".banner button >> text=Ask again")
    tab.settle()
    tab.wait("document.querySelectorAll('.hit').length > 30")


@pytest.fixture
def locked(served: Any) -> Iterator[str]:
    """The same service, behind a token."""
    with serving(served.current, token="open sesame 123") as url:
        yield url


def test_token_is_asked_for_once(open_tab: Any, locked: str) -> None:
    tab = open_tab(locked)
    tab.page.goto(f"{locked}?q=a+keyboard")
    tab.page.locator("#token[open]").wait_for()
    assert tab.page.locator(".hit").count() == 0
    tab.page.keyboard.press("Escape")
    tab.page.fill("#token [name=token]", "wrong")
    tab.page.keyboard.press("Enter")
    tab.page.locator("#token .problem:text('That is not the token.')").wait_for()
    tab.page.fill("#token [name=token]", "open sesame 123")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".hit .frame.loaded").first.wait_for()  # pictures come too, without a header
    assert tab.page.evaluate("document.cookie") == ""  # no script sees it
    assert "sesame" not in tab.page.evaluate("JSON.stringify(localStorage) + location.href")
    tab.page.reload()
    tab.page.locator(".hit").first.wait_for()
    for is_expired in (False, True):
        tab.page.click("#keys")
        if is_expired:
            tab.page.context.clear_cookies()
        with tab.page.expect_response("**/session"):
            tab.page.click("#sign-out")
        tab.page.locator("#token[open]").wait_for()
        tab.page.fill("#token [name=token]", "open sesame 123")
        tab.page.keyboard.press("Enter")
        tab.wait("!document.querySelector('#token').open")


def test_image_that_is_gone_is_told(tab: Any) -> None:
    gone = {"status": 410, "json": {"error": "the file is gone", "code": "gone", "position": None}}
    for path in ("**/thumbnails/*", re.compile(r"/images/\d+$")):
        tab.page.route(path, lambda route: route.fulfill(**gone))
    tab.open("?q=a+keyboard")
    tab.tiles.first.locator(".missing").wait_for()
    assert tab.tiles.first.locator(".frame").inner_text() == "The file is gone."
    tab.tiles.first.locator(".tile").click()
    tab.page.locator("#viewer .gone").wait_for()
    assert tab.page.inner_text("#viewer .gone") == "The file is gone."
    assert tab.page.locator(".slot").count() > 3
    tab.open("?image=123456")
    tab.page.locator("#viewer .gone").wait_for()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"status": 429, "json": {"error": "too many requests", "code": "rate"}}, "Too many requests."),
        ({"status": 503, "json": {"error": "the store is away", "code": "index"}}, "The store is away."),
        (None, "The service does not answer: check that it runs, and try again."),
    ],
    ids=["rate", "store", "network"],
)
def test_image_that_does_not_come_is_not_said_to_be_gone(
    tab: Any, answer: dict[str, Any] | None, line: str
) -> None:
    for path in ("**/thumbnails/*", re.compile(r"/images/\d+$")):
        tab.page.route(path, lambda route: route.fulfill(**answer) if answer else route.abort())
    tab.open("?q=a+keyboard")
    tab.tiles.first.locator(".missing").wait_for()
    assert tab.tiles.first.locator(".frame").inner_text() == line
    tab.tiles.first.locator(".tile").click()
    tab.page.locator("#viewer .gone").wait_for()
    assert tab.page.inner_text("#viewer .gone") == line


def test_image_that_comes_at_the_second_time_is_shown(tab: Any) -> None:
    refused: set[str] = set()

    def answer(route: Any) -> None:
        if route.request.url in refused:
            route.continue_()
        else:
            refused.add(route.request.url)
            route.fulfill(status=503, json={"error": "busy", "code": "busy"})

    tab.page.route("**/thumbnails/*", answer)
    tab.open("?q=a+keyboard")
    tab.page.locator(".hit .frame.loaded").first.wait_for()
    assert tab.page.locator(".missing").count() == 0
    assert tab.tiles.first.locator(".box").count() == 1
