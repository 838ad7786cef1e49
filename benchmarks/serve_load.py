"""Half an hour of everything at once on the search service, while the index switches again and again.

    python benchmarks/serve_load.py --work DIR [--images 10000] [--minutes 30] [--clients 4]
                                    [--swap-seconds 10] [--shards 0] [--seed 0] [--json]

A picture-book index is made under --work, once, and copied; `jobs/serve.py --local` serves the copy (with
--shards in Ray Serve) in a process of its own. Each client asks for one thing after the other, drawn by the
seed: words, AND, NOT, pictures, regions of them, objects, filters, pages, thumbnails, images, exports, and
what has to be refused. Meanwhile a snapshot that lacks other images is published every --swap-seconds.

An error is any answer but the one that is due, a hit that its snapshot lacks, and a snapshot that is not
switched to. Memory is what the service's processes hold for themselves (RssAnon). It is flat if the median of
the last quarter of the time is not over that of the second by more than --growth; in the first quarter the
caches fill. Prints a line each half minute on stderr, then a summary. Exit code 1: an error, or not flat.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.serve import make_index, names, served
from for_ray.index import snapshots
from for_ray.schema import Layout
from for_ray.serving.client import Answer, Client, ServiceError

SECONDS_TO_SWITCH = 60.0
SAID_SECONDS, LOOK_SECONDS = 30.0, 1.0
NUM_PICTURES = 200
"""Images whose thumbnails are asked for: few enough for the cache, which would grow for long otherwise."""

NUM_DELETED = 100
SHOWN_ERRORS = 5

Got = TypeVar("Got")


@dataclass
class Tally:
    """What has happened; threads share it."""

    asked: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes
    swaps: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, error: str | None = None) -> None:
        """One answer."""
        with self.lock:
            self.asked[kind] += 1
            if error is not None:
                self.errors.append(f"{kind}: {error}")


class Nights:
    """Publishes the same images over and over, each time without some others."""

    def __init__(self, index_uri: str, seed: int) -> None:
        self._layout = Layout(index_uri)
        self._random = np.random.default_rng(seed)
        first = snapshots.latest(self._layout)
        self._first = first
        self.deleted = {first.snapshot_id: frozenset(first.deleted_image_ids.tolist())}

    def publish(self) -> int:
        """One more snapshot; its id."""
        gone = self._random.choice(self._first.indexed, NUM_DELETED, replace=False)
        gone = np.union1d(gone, self._first.deleted_image_ids).astype(np.int64)
        number = max(self.deleted) + 1
        self.deleted[number] = frozenset(gone.tolist())  # before anybody can be served it
        published = snapshots.publish(
            self._layout, self._first.model_copy(update={"deleted_image_ids": gone})
        )
        if published.snapshot_id != number:
            raise SystemExit(f"expected to publish snapshot {number}, got {published.snapshot_id}")
        return number


class Asker:
    """One client, and what it asks for."""

    def __init__(self, url: str, nights: Nights, seed: int) -> None:
        self._url, self._nights = url, nights
        self._client, self._random = Client(url), random.Random(seed)
        self._names = names()[:100]
        self._answer = self._client.search(self._name(), k=60)
        self._pictures = [self._client.image(hit.image_id) for hit in self._answer.hits[:8]]
        asks: list[Callable[[], Answer | None]]
        asks = [self._several, self._without, self._filtered, self._picture, self._region]
        asks += [self._like, self._similar, self._next_page, *[self._words] * 3]
        looks = [self._image, self._objects, self._export, self._about, *[self._thumbnail] * 8]
        self._kinds: list[Callable[[], Answer | None]] = [*asks, *looks, *[self._refused] * 3]

    def ask(self, tally: Tally) -> None:
        """One thing, drawn at random; what comes back is judged."""
        kind = self._random.choice(self._kinds)
        error = None
        try:
            answer = kind()
        except (ServiceError, requests.RequestException) as refused:
            error = str(refused)
        else:
            if answer is not None:
                self._answer, error = answer, self._fault(answer)
        tally.count(kind.__name__.strip("_"), error)

    def _fault(self, answer: Answer) -> str | None:
        """Why an answer cannot be of its snapshot."""
        gone = self._nights.deleted.get(answer.snapshot_id)
        if gone is None:
            return f"snapshot {answer.snapshot_id} was never published"
        mixed = [hit.image_id for hit in answer.hits if hit.image_id in gone]
        return f"snapshot {answer.snapshot_id} lacks {mixed[:5]}" if mixed else None

    def _name(self) -> str:
        return self._random.choice(self._names)

    def _image_id(self) -> int:
        return self._random.choice(self._answer.hits).image_id if self._answer.hits else 0

    def _words(self) -> Answer:
        return self._client.search(self._name(), k=self._random.choice((10, 60, 300)))

    def _several(self) -> Answer:
        return self._client.search(" AND ".join(self._random.sample(self._names, 2)), k=60)

    def _without(self) -> Answer:
        wanted, unwanted = self._random.sample(self._names, 2)
        return self._client.search(f"{wanted} NOT {unwanted}", k=60)

    def _filtered(self) -> Answer:
        return self._client.search(self._name(), k=60, where=f"width > {self._random.randrange(150, 250)}")

    def _picture(self) -> Answer:
        return self._client.search(image=self._random.choice(self._pictures), k=60)

    def _region(self) -> Answer:
        return self._client.search(
            image=self._random.choice(self._pictures), region=(0.2, 0.2, 0.7, 0.8), k=60
        )

    def _like(self) -> Answer | None:
        return self._held(lambda: self._client.search(like=str(self._image_id()), k=60))

    def _similar(self) -> Answer | None:
        return self._held(lambda: self._client.similar(self._image_id(), 0, k=60))

    def _next_page(self) -> Answer | None:
        name = self._name()
        page = self._client.search(name, k=20).next_page
        try:
            return self._client.search(name, k=20, page=page)
        except ServiceError as error:
            if error.code != "snapshot_changed":
                raise
            return None

    def _thumbnail(self) -> None:
        self._held(lambda: self._client.thumbnail(self._random.randrange(NUM_PICTURES)))

    def _image(self) -> None:
        self._held(lambda: self._client.image(self._image_id()))

    def _objects(self) -> None:
        self._held(lambda: self._client.objects(self._image_id()))

    def _export(self) -> None:
        self._client.export(self._random.choice(("csv", "jsonl", "coco")), self._name(), k=500)

    def _about(self) -> None:
        self._client.about()
        self._client.snapshots()
        self._client.health()

    def _refused(self) -> None:
        """What no service answers: it says so, in the right way."""
        path, body, status = self._random.choice(REFUSED)
        url, headers = f"{self._url}{path}", {"Content-Type": "application/json"}
        if body is None:
            answer = requests.get(url, timeout=60)
        else:
            answer = requests.post(url, data=body, headers=headers, timeout=60)
        if answer.status_code != status or "error" not in answer.json():
            said = f"expected {status}, got {answer.status_code} {answer.text[:200]}"
            raise ServiceError(url, said, answer.status_code)

    def _held(self, ask: Callable[[], Got]) -> Got | None:
        """An image that the current snapshot lacks is refused, as it has to be."""
        try:
            return ask()
        except ServiceError as error:
            if error.code not in {"not_found", "request"}:
                raise
            return None


REFUSED: tuple[tuple[str, bytes | None, int], ...] = (
    ("/search", b'{"text": "a dog AND"}', 400),
    ("/search", b'{"text": "a dog", "k": 100000}', 400),
    ("/search", b'{"text": "a dog", "image": "AAAA"}', 400),
    ("/search", b'{"image": "bm90IGFuIGltYWdl"}', 400),
    ("/search", b"{not json", 400),
    ("/search", b'{"text": "a dog", "filters": {"where": "no_such_column = 1"}}', 400),
    ("/search", b'{"text": "' + b"x" * 17_000_000 + b'"}', 413),
    ("/export", b'{"format": "exe", "question": {"text": "a dog"}}', 400),
    ("/images/999999999999", None, 404),
    ("/images/..%2f..%2fetc%2fpasswd", None, 404),
    ("/nothing", None, 404),
)


class Memory(NamedTuple):
    """The processes whose memory counts: one, or its descendants that are Ray's workers."""

    pid: int

    def num_bytes(self) -> int:
        """RssAnon of all of them."""
        return sum(_anonymous_bytes(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        found, wave = {self.pid}, {self.pid}
        while wave:
            wave = {pid for pid, parent in parents.items() if parent in wave} - found
            found |= wave
        return sorted(found)


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # it has ended
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def swap(url: str, nights: Nights, tally: Tally) -> None:
    """Publish, and see the service switch."""
    wanted, deadline = nights.publish(), time.monotonic() + SECONDS_TO_SWITCH
    with Client(url) as client:
        while client.health()["snapshot_id"] != wanted:
            if time.monotonic() > deadline:
                tally.count("switch", f"not at snapshot {wanted} after {SECONDS_TO_SWITCH:g} s")
                return
            time.sleep(0.05)
    tally.swaps += 1


def watch(memory: Memory, url: str, nights: Nights, tally: Tally, options: argparse.Namespace) -> None:
    """Note the memory and publish, until the time is over."""
    began = time.monotonic()
    next_swap = next_said = 0.0
    while (now := time.monotonic() - began) < options.minutes * 60:
        tally.memory.append((now, memory.num_bytes()))
        if now >= next_swap:
            next_swap = now + options.swap_seconds
            swap(url, nights, tally)
        if now >= next_said:
            next_said = now + SAID_SECONDS
            counts = (
                f"{sum(tally.asked.values())} answers, {len(tally.errors)} errors, {tally.swaps} switches"
            )
            print(f"{now:6.0f} s  {tally.memory[-1][1] / 1e6:6.0f} MB  {counts}", file=sys.stderr, flush=True)
        time.sleep(LOOK_SECONDS)


def growth(memory: list[tuple[float, int]]) -> float:
    """What the last quarter of the time holds above the second one, as a fraction."""
    end = memory[-1][0]
    second = [held for seconds, held in memory if end / 4 <= seconds < end / 2]
    last = [held for seconds, held in memory if seconds >= end * 3 / 4]
    return statistics.median(last) / statistics.median(second) - 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve, ask, switch; what came of it."""
    tally, is_over = Tally(), threading.Event()
    made = make_index(options.work, options.images)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        index = Path(shutil.copytree(made, Path(folder) / "index"))
        nights = Nights(str(index), options.seed)
        with served(index, options.shards, "--refresh-seconds", "0.2") as (port, pid):
            url = f"http://127.0.0.1:{port}"

            askers = [Asker(url, nights, options.seed + number) for number in range(options.clients)]

            def ask(asker: Asker) -> None:
                while not is_over.is_set():
                    asker.ask(tally)

            with ThreadPoolExecutor(options.clients) as pool:
                asked = [pool.submit(ask, asker) for asker in askers]
                try:
                    watch(Memory(pid), url, nights, tally, options)
                finally:
                    is_over.set()
                for thread in asked:
                    thread.result()
    return {
        "minutes": options.minutes,
        "answers": sum(tally.asked.values()),
        "kinds": dict(tally.asked.most_common()),
        "switches": tally.swaps,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:SHOWN_ERRORS],
        "memory_mb": [round(held / 1e6) for _, held in tally.memory[:: max(1, len(tally.memory) // 30)]],
        "growth": round(growth(tally.memory), 3),
    }


def main() -> int:
    """Parse, run, print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the index is made, or was")
    parser.add_argument("--images", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--minutes", type=float, default=30.0, help="(default 30)")
    parser.add_argument("--clients", type=int, default=4, help="at once (default 4)")
    parser.add_argument("--swap-seconds", type=float, default=10.0, help="between two (default 10)")
    parser.add_argument(
        "--shards", type=int, default=0, help="on Ray Serve, with so many (default 0: --local)"
    )
    parser.add_argument("--growth", type=float, default=0.05, help="that is still flat (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    found = run(options)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return int(bool(found["errors"]) or found["growth"] > options.growth)


if __name__ == "__main__":
    raise SystemExit(main())
