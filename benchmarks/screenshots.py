"""README's pictures of the search page, from the demo's index, by a real browser.

    python benchmarks/screenshots.py [--index demo/index] [--out docs] [--question "…"] [--all]

Serves the index in this process, asks the question in Debian's Chromium, and writes `page.jpg`, the answer,
and `page-viewer.jpg`, its first image large, each of at most 300 kB. With `--all` also what README does not
show, to be looked at: the page before a question, in the dark, on a phone, with filters, with an error, and
where nothing is found.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MAX_BYTES = 300_000
QUALITIES = (88, 82, 76, 70, 62, 54)
DESKTOP = {"viewport": {"width": 1320, "height": 820}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
EXAMPLES = ("a keyboard", "a bicycle AND a cat", "a dog OR a horse", "an umbrella NOT a car")


@contextlib.contextmanager
def serving(index_uri: str) -> Iterator[str]:
    """The page of an index; gives its address."""
    import uvicorn

    from for_ray.serving.app import make_app
    from for_ray.serving.local import bind, url_of
    from for_ray.serving.opening import Served

    service = Served(index_uri, examples=EXAMPLES).open()
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield url_of("127.0.0.1", bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def save(page: Any, path: Path) -> None:
    """What the page shows, as a JPEG file of at most `MAX_BYTES`."""
    for quality in QUALITIES:
        content = page.screenshot(type="jpeg", quality=quality)
        if len(content) <= MAX_BYTES:
            break
    path.write_bytes(content)
    print(f"{path}: {len(content):,} bytes")


def open_page(browser: Any, url: str, asked: dict[str, str], **options: Any) -> Any:
    """A new page on an address, with its answer and all images in sight."""
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.goto(f"{url}/?{urlencode(asked)}")
    page.locator(".hit .frame.loaded, .state h2:not(:empty)").first.wait_for()
    page.wait_for_load_state("networkidle")
    return page


def take_readme(browser: Any, url: str, question: str, out: Path) -> None:
    """The answer to a question, and its first image large."""
    here = f"{Path.cwd()}/"
    page = open_page(browser, url, {"q": question}, **DESKTOP)
    page.locator(".tile").first.hover()
    save(page, out / "page.jpg")
    page.locator(".tile").first.click()
    page.locator(".slot").first.wait_for()
    page.mouse.move(0, 0)
    page.wait_for_load_state("networkidle")
    # Images on disk have absolute paths: the picture shows them from this folder on.
    page.locator(".uri").evaluate("(uri, here) => uri.textContent = uri.textContent.replace(here, '')", here)
    save(page, out / "page-viewer.jpg")


def take_others(browser: Any, url: str, question: str, out: Path) -> None:
    """The other states of the page."""
    dark = {"color_scheme": "dark"}
    save(open_page(browser, url, {}, **DESKTOP), out / "page-start.jpg")
    save(open_page(browser, url, {"q": f"{question} AND"}, **DESKTOP), out / "page-error.jpg")
    save(open_page(browser, url, {"q": question, "under": "/nowhere"}, **DESKTOP), out / "page-empty.jpg")
    save(open_page(browser, url, {"q": question}, **PHONE), out / "page-phone.jpg")
    page = open_page(browser, url, {"q": question, "where": "width > 100"}, **DESKTOP, **dark)
    page.click("#filters-toggle")
    page.locator(".hit .tick").first.check(force=True)
    save(page, out / "page-dark.jpg")
    page.click("#export-selected")
    save(page, out / "page-export.jpg")
    page.keyboard.press("Escape")
    page.click("#keys")
    save(page, out / "page-help.jpg")
    page = open_page(browser, url, {"q": question}, **PHONE, **dark)
    page.locator(".tile").first.tap()
    page.locator(".slot").first.wait_for()
    save(page, out / "page-phone-viewer.jpg")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", default="demo/index", help="the demo's index; `make demo` makes it")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the pictures go")
    parser.add_argument("--question", default="a keyboard AND a basketball", help="what is asked")
    parser.add_argument("--all", action="store_true", help="also what README does not show")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    with serving(options.index) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        take_readme(browser, url, options.question, options.out)
        if options.all:
            take_others(browser, url, options.question, options.out)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
