"""A real Chromium on the page, the service behind it, and a picture book that its encoder has looked at."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from for_ray import storage
from for_ray.datasets.picturebook import write_picturebook
from for_ray.model.bundle import open_bundle
from for_ray.serving import opening
from for_ray.serving.app import make_app
from for_ray.serving.current import Current
from for_ray.serving.local import bind
from for_ray.serving.service import Limits, Service
from tests.planted import Planted, PlantedIndex

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NUM_IMAGES = 120
BATCH = 30

EVIL = """<img src=x onerror="document.title='owned'"><script>document.title='owned'<script>.jpg"""
"""A file's name that would be markup, if anybody took it for that."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass(frozen=True)
class Book:
    """Images and what is drawn on them."""

    folder: Path
    annotations: dict[str, Any]

    def truth(self, file_name: str, category: str) -> list[tuple[float, float, float, float]]:
        """Boxes of this category in an image: x0, y0, x1, y1 as fractions."""
        image = next(each for each in self.annotations["images"] if each["file_name"] == file_name)
        wanted = next(each["id"] for each in self.annotations["categories"] if each["name"] == category)
        width, height = image["width"], image["height"]
        return [
            (x / width, y / height, (x + w) / width, (y + h) / height)
            for each in self.annotations["annotations"]
            if each["image_id"] == image["id"] and each["category_id"] == wanted
            for x, y, w, h in [each["bbox"]]
        ]


@dataclass(frozen=True)
class Served:
    """The service, and what is behind it."""

    url: str
    current: Current
    index: PlantedIndex
    book: Book


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser's path."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: tests/browser/install-chromium.sh installs it")
    return CHROMIUM


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Any]:
    """Chromium, without a window. While it is open, this thread has an event loop, as no other test wants."""
    reason = "the package playwright is missing: the extra `dev` brings it"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(chromium), args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    """The picture book, and one of its images once more under the name `EVIL`."""
    folder = tmp_path_factory.mktemp("book")
    path = write_picturebook(folder / "drawn", images=NUM_IMAGES, split="val", processes=1)
    images = folder / "drawn" / "images"
    shutil.copy(images / "000000.jpg", images / EVIL)
    return Book(images, json.loads(path.read_text()))


@pytest.fixture(scope="session")
def served(chromium: Path, book: Book, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service on the book's index; `chromium` comes first: nothing is encoded for a skipped test."""
    index = _planted(book, tmp_path_factory.mktemp("index"))
    current = opening.Served(index.uri, refresh_seconds=3600).open().current
    with serving(current) as url:
        yield Served(url, current, index, book)


@contextlib.contextmanager
def serving(current: Current, *, token: str | None = None) -> Iterator[str]:
    """The application in a thread; gives its address."""
    import uvicorn

    service = Service(
        name="picture book",
        current=current,
        list_snapshots=list,
        limits=Limits(requests_per_second=0),
        token=token,
        examples=("a bicycle", "a dog AND an umbrella"),
    )
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def _planted(book: Book, folder: Path) -> PlantedIndex:
    """An index of the book by the bundled encoder, published; made in this process, without Ray."""
    from for_ray.model.encoder import load_encoder
    from for_ray.model.preprocess import decode, uncrop_boxes

    bundle = open_bundle("picturebook")
    encoder, config = load_encoder(bundle, device="cpu"), bundle.config
    paths = sorted(book.folder.iterdir())
    resized = {"image_size": config.image_size, "resize_mode": config.resize_mode}
    images = []
    for start in range(0, len(paths), BATCH):
        decoded = [
            decode(path.read_bytes(), interpolation=config.interpolation, **resized)
            for path in paths[start : start + BATCH]
        ]
        encoded = encoder.encode(np.stack([each.pixels for each in decoded]))
        parts = [part.cpu().numpy() for part in (encoded.vectors, encoded.boxes, encoded.keep)]
        for path, each, vectors, boxes, keep in zip(paths[start:], decoded, *parts, strict=False):
            size = (each.width, each.height)
            upright = uncrop_boxes(boxes[keep], *size, resize_mode=config.resize_mode)
            entry = storage.stat(str(path))
            image = Planted(entry.uri, vectors[keep], upright.tolist(), entry.etag, None, *size)
            images.append(image)
    index = PlantedIndex.make(folder / "index", bundle)
    index.add(images, codec="IVF4,Flat")
    index.publish(nprobe=4)
    return index


@dataclass
class Tab:
    """A page that is open, what it asked for and what it complained of."""

    page: Any
    url: str
    requests: list[str]
    problems: list[str]
    pending: set[Any] = field(default_factory=set)

    def watch(self) -> None:
        """Note what the page asks for, and what it complains of."""
        self.page.on(
            "request", lambda request: (self.requests.append(request.url), self.pending.add(request))
        )
        for event in ("requestfinished", "requestfailed"):
            self.page.on(event, lambda request: self.pending.discard(request))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if _is_problem(said) else None)

    def open(self, query: str = "") -> None:
        """Go there, and wait until what was asked is answered."""
        self.page.goto(self.url + query)
        self.settle()

    def ask(self, text: str) -> None:
        """Write a question and press Enter."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        self.settle()

    def settle(self) -> None:
        """Until no skeleton is left, and the images that are in sight are there."""
        self.wait("!document.querySelector('.grid[aria-busy]') && document.querySelector('.hit, .state > *')")
        end, num_quiet = time.monotonic() + 10, 0
        while num_quiet < 3:  # an answer that came in has its next page and its images asked for at once
            assert time.monotonic() < end, f"requests that never ended: {len(self.pending)}"
            self.page.wait_for_timeout(20)
            num_quiet = 0 if self.pending else num_quiet + 1

    def wait(self, expression: str, *, seconds: float = 10) -> None:
        """Until it is true in the page; Playwright's own way needs what the page's policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            self.page.wait_for_timeout(20)

    @property
    def tiles(self) -> Any:
        """The results that are shown."""
        return self.page.locator(".hit:not([hidden])")

    def ids(self) -> list[int]:
        """Their image ids, best first."""
        tiles = self.page.locator(".hit:not([hidden]) .tile")
        return [int(each) for each in tiles.evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")]

    def query(self) -> str:
        """The address after the `?`."""
        return str(self.page.evaluate("location.search"))


@pytest.fixture
def open_tab(browser: Any, served: Served) -> Iterator[Callable[..., Tab]]:
    """Makes tabs; at the end none of them may have complained, or asked another host."""
    contexts, tabs = [], []

    def make(url: str = served.url, **options: Any) -> Tab:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        tab = Tab(context.new_page(), url, [], [])
        tab.page.set_default_timeout(10_000)
        tab.watch()
        tabs.append(tab)
        return tab

    yield make
    for context in contexts:
        context.close()
    for tab in tabs:
        assert tab.problems == []
        foreign = [url for url in tab.requests if not url.startswith((tab.url, "blob:", "data:"))]
        assert foreign == []


def _is_problem(said: Any) -> bool:
    """Chromium itself notes each refused request; what the page does about it is what the tests look at."""
    return said.type in {"error", "warning"} and not said.text.startswith("Failed to load resource")


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    """One tab on the service."""
    return open_tab()
