"""Searches of an index from another process, while runs write it, sweep it and compact its table."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index import snapshots, table
from for_ray.retrieval import OpenIndex, open_index
from for_ray.schema import Layout
from for_ray.stages.sweep import sweep
from for_ray.storage import Lease
from tests.planted import Planted, PlantedIndex

DIM, NUM_NEW, NUM_DELETED = 16, 10, 2
QUERY = np.eye(1, DIM, 3, dtype=np.float32)[0]
KEPT = 4
"""Snapshots that each sweep leaves; a reader's round lasts at most one of the writer's, and asks for the
three that are still kept after that."""

WAIT_SECONDS = 120
ROUND = "round\n"


def images_of(night: int) -> list[Planted]:
    """What a night adds: a vector an image."""
    vectors = np.random.default_rng(night).normal(size=(NUM_NEW, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [Planted(f"/{night}/{number}.jpg", vectors[number : number + 1]) for number in range(NUM_NEW)]


def expected(night: int) -> list[str]:
    """What a search of the snapshot of a night finds, the best first, by brute force.

    Images stay for three nights, and a few of them only for one.
    """
    images = images_of(night)
    for earlier in range(max(1, night - 2), night):
        images += images_of(earlier)[NUM_DELETED:]
    vectors: NDArray[np.float32] = np.concatenate([image.vectors for image in images]).astype(np.float16)
    order = np.argsort(-(vectors.astype(np.float32) @ QUERY))
    return [images[position].uri for position in order]


def live_a_night(index: PlantedIndex, night: int) -> None:
    """Add, delete, compact, publish and sweep, as a run does; nights are counted from 1, as snapshots are."""
    first = (night - 2) * NUM_NEW  # of the night before
    left = range(first - 2 * NUM_NEW + NUM_DELETED, first - NUM_NEW) if night > 3 else ()
    dead = range(first, first + NUM_DELETED) if night > 1 else ()
    with Lease.acquire(index.layout.lease_uri, f"night {night}") as lease:
        index.add(images_of(night), deleted=[*left, *dead])
        index.segments = index.segments[-3:]
        table.compact(table.open_table(index.images_uri), rows=5, check=lease.check)
        deleted = [each - NUM_NEW for each in dead if night > 2]
        index.publish(deleted=[*deleted, *dead], nprobe=2)
        sweep(index.layout, lease, keep_snapshots=KEPT, keep_days=0)


class Reader:
    """A process that searches without a pause, and says a word after each round."""

    def __init__(self, index_uri: str, cache: Path) -> None:
        self.num_rounds = 0
        self._said: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.readers", index_uri, str(cache)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put("")

    def wait_for_rounds(self, count: int) -> None:
        """Until so many more have ended; an error in one is raised here."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._said.get_nowait())
        for _ in range(count):
            self._take(self._said.get(timeout=WAIT_SECONDS))

    def _take(self, line: str) -> None:
        if line != ROUND:
            pytest.fail(line + "".join(iter(lambda: self._said.get(timeout=WAIT_SECONDS), "")))
        self.num_rounds += 1

    def stop(self) -> None:
        """End the process, wherever it is."""
        self._process.kill()
        self._process.wait()


def _read(index_uri: str, cache: Path) -> None:
    opened: OpenIndex | None = None
    while True:
        published = snapshots.list_published(Layout(index_uri))
        for snapshot_id in (None, published[-(KEPT - 1)].snapshot_id):
            _check(open_index(index_uri, snapshot_id=snapshot_id, cache_path=cache))
        if opened is not None:  # since the round before
            _check(opened)
        opened = open_index(index_uri, cache_path=cache)
        print(ROUND, end="", flush=True)


def _check(opened: OpenIndex) -> None:
    found = [hit.uri for hit in opened.search_vector(QUERY, k=100)]
    night = opened.snapshot.snapshot_id
    assert found == expected(night), f"snapshot {night} answers {found}, not {expected(night)}"


def live_nights_beside_a_reader(index: PlantedIndex, cache: Path, *, num_nights: int) -> int:
    """Nights one after the other, each beside at least one whole round of a reader's; how many rounds."""
    for night in range(1, KEPT + 1):
        live_a_night(index, night)
    reader = Reader(index.uri, cache)
    try:
        reader.wait_for_rounds(1)
        for night in range(KEPT + 1, KEPT + 1 + num_nights):
            live_a_night(index, night)
            # The one that was under way, and one that began after the sweep.
            reader.wait_for_rounds(2)
    finally:
        reader.stop()
    return reader.num_rounds


if __name__ == "__main__":
    _read(sys.argv[1], Path(sys.argv[2]))
