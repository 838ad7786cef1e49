"""Snapshots are swapped between two questions: none fails, none is mixed, and the old one's memory goes."""

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.errors import DataError, StorageError
from for_ray.index import snapshots
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.retrieval import OpenIndex, Question, open_index
from for_ray.retrieval.names import NameVectors
from for_ray.serving import current as current_module
from for_ray.serving.app import make_app
from for_ray.serving.current import Current
from for_ray.serving.service import Limits, Service
from tests.planted import Planted, PlantedIndex
from tests.unit.serving.conftest import browser, current_of

SWAPS = 20


def units(count: int, seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).normal(size=(count, 16))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


def grow(planted: PlantedIndex, name: str, *, deleted: tuple[int, ...] = ()) -> int:
    """Publish two more images with a name, without the deleted; the snapshot's id."""
    vectors = units(4, len(planted.segments))
    planted.add([Planted(f"{name}/0", vectors[:2]), Planted(f"{name}/1", vectors[2:])], deleted=deleted)
    return planted.publish(nprobe=2, deleted=deleted).snapshot_id


def roll_back(planted: PlantedIndex, snapshot_id: int) -> int:
    old = snapshots.by_id(planted.layout, snapshot_id)
    return snapshots.publish(planted.layout, old.model_copy(update={"restores": snapshot_id})).snapshot_id


def mapped(folder: Path) -> set[str]:
    """Files below a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(None, 5)[5] for line in lines if str(folder) in line}


@pytest.fixture
def planted(planted_index: PlantedIndex) -> PlantedIndex:
    """With one snapshot."""
    grow(planted_index, "first")
    return planted_index


@pytest.fixture
def current(planted: PlantedIndex) -> Iterator[Current]:
    opened = current_of(planted)
    yield opened
    opened.close()


class Held:
    """Keeps one question in its middle, between the snapshot that it leased and the search in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wanted, self._entered = threading.Semaphore(0), threading.Semaphore(0)
        self._let_go = threading.Event()
        embed = NameVectors.embed

        def held(vectors: NameVectors, names: Sequence[str]) -> NDArray[np.float32]:
            if self._wanted.acquire(blocking=False):
                self._entered.release()
                assert self._let_go.wait(60)
            return embed(vectors, names)

        monkeypatch.setattr(NameVectors, "embed", held)

    @contextmanager
    def one(self) -> Iterator[None]:
        """While the block runs, a question that began before it is not answered."""
        self._let_go.clear()
        self._wanted.release()
        assert self._entered.acquire(timeout=60)
        try:
            yield
        finally:
            self._let_go.set()


def test_swaps_under_load_fail_and_mix_nothing(
    planted: PlantedIndex, current: Current, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(
        "x", current, lambda: snapshots.list_snapshots(planted.layout), Limits(requests_per_second=0)
    )
    holds = {1: {"first/0", "first/1"}}
    answers: list[tuple[int, frozenset[str]]] = []
    answered, done = threading.Semaphore(0), threading.Event()

    def ask() -> None:
        while not done.is_set():
            response = client.post("/search", json={"text": "a dog", "k": 100})
            assert response.status_code == 200, response.text
            answer = response.json()
            uris = [hit["uri"] for hit in answer["hits"]]
            assert len(set(uris)) == len(uris)
            answers.append((answer["snapshot_id"], frozenset(uris)))
            answered.release()

    held = Held(monkeypatch)
    with browser(make_app(service)) as client, ThreadPoolExecutor(3) as clients:
        asking = [clients.submit(ask) for _ in range(3)]
        try:
            for turn in range(SWAPS):
                if turn % 4 == 3:  # back to what was served two swaps ago
                    back = max(holds) - 2
                    holds[roll_back(planted, back)] = holds[back]
                else:
                    snapshot_id = grow(planted, f"turn-{turn}")
                    holds[snapshot_id] = set(all_uris(planted, snapshot_id))
                with held.one():
                    assert current.refresh()
                while not any(snapshot_id == current.snapshot_id for snapshot_id, _ in list(answers)):
                    assert answered.acquire(timeout=60)  # each snapshot is asked
        finally:
            done.set()
        assert [each.result() for each in asking] == [None] * 3
    assert (current.num_swaps, current.num_failed) == (SWAPS, 0)
    assert {snapshot_id for snapshot_id, _ in answers} == set(holds)
    assert [each for each in answers if each[1] != holds[each[0]]] == []


def all_uris(planted: PlantedIndex, snapshot_id: int) -> list[str]:
    """What a snapshot holds, by its table alone."""
    from for_ray.index import table

    version = snapshots.by_id(planted.layout, snapshot_id).images_version
    return list(table.require_table(planted.images_uri, version=version).to_table(["uri"])["uri"].to_pylist())


def test_a_question_ends_on_the_snapshot_that_it_began_with(planted: PlantedIndex, current: Current) -> None:
    with current.lease() as old:
        grow(planted, "second")
        assert current.refresh()
        assert current.snapshot_id == 2
        answer = old.ask(Question("a dog", k=10))
        assert {hit.uri for hit in answer.hits} == {"first/0", "first/1"}
        with current.lease() as new:
            assert len(new.ask(Question("a dog", k=10)).hits) == 4
        assert old.image(0) is not None
    with pytest.raises(ValueError, match="was closed"):
        old.ask(Question("a dog"))


def test_the_old_snapshot_gives_its_memory_back(planted: PlantedIndex, current: Current) -> None:
    folder = Path(planted.uri)
    with current.lease() as index:
        index.ask(Question("a dog NOT a cat"))
        old = weakref.ref(index)
        old_names = index.texts_for(index.bundle)
        del index
    assert any(path.endswith("segment-0.faiss") for path in mapped(folder))
    # All is built anew, as an index of another codec would be: no file of the old snapshot is in the new one.
    planted.segments.clear()
    grow(planted, "second")
    assert current.refresh()
    gc.collect()
    assert old() is None
    assert {path.rsplit("/", 1)[-1] for path in mapped(folder)} == {"segment-1.faiss"}
    with current.lease() as index:
        assert index.texts_for(index.bundle) is old_names  # the encoder and its names go on
    current.close()
    assert mapped(folder) == set()


def test_nothing_new_is_no_swap(current: Current) -> None:
    with current.lease() as index:
        assert not current.refresh()
        with current.lease() as again:
            assert again is index
    assert current.num_swaps == 0


@pytest.mark.parametrize("broken", ["segment", "encoder", "table"])
def test_a_broken_snapshot_leaves_the_old_one(
    planted: PlantedIndex, current: Current, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="for_ray.serving.current")  # whatever others have set above it
    if broken == "encoder":
        planted.publish(fingerprint="0123456789abcdef", nprobe=2)
    else:
        grow(planted, "second")
    if broken == "segment":
        planted.segment_path("segment-1.faiss").unlink()
    if broken == "table":
        version = snapshots.latest(planted.layout).images_version
        name = f"{(1 << 64) - 1 - version}.manifest"
        (Path(planted.images_uri) / "_versions" / name).unlink()
    for count in (1, 2):
        assert not current.refresh()
        assert current.num_failed == count
    assert current.stale
    assert "\n" not in current.stale
    assert [record.getMessage() for record in caplog.records] == [f"snapshot 1 stays: {current.stale}"] * 2
    with current.lease() as index:
        assert len(index.ask(Question("a dog", k=10)).hits) == 2
    roll_back(planted, 1)
    assert current.refresh()
    assert current.stale is None
    assert current.snapshot_id == 3


def test_whatever_a_refresh_raises_the_old_snapshot_stays(planted: PlantedIndex) -> None:
    raised: list[Exception] = [
        StorageError("s3://bucket is away:\n  check the network"), MemoryError(), KeyError("x"),
    ]  # fmt: skip
    told = ["s3://bucket is away: check the network", "MemoryError", "KeyError: 'x'"]

    def latest_id() -> int:
        raise raised[0]

    current = Current(lambda _, beside: open_index(planted.uri, beside=beside), latest_id, refresh_seconds=1)
    while raised:
        assert not current.refresh()
        assert current.stale == told[len(told) - len(raised)]
        raised.pop(0)
    current.close()


def test_what_can_not_be_warmed_is_closed(planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(OpenIndex, "close", lambda self: closed.append(self.snapshot.snapshot_id))

    def cold(self: OpenIndex) -> None:
        raise DataError("a file is missing: restore it")

    monkeypatch.setattr(OpenIndex, "warm", cold)
    with pytest.raises(DataError, match="a file is missing"):
        current_of(planted)
    assert closed == [1]


def test_the_thread_refreshes_and_ends(planted: PlantedIndex) -> None:
    swapped = threading.Event()

    def latest_id() -> int:
        if current.num_swaps:
            swapped.set()
        return snapshots.latest(planted.layout).snapshot_id

    current = Current(
        lambda snapshot_id, beside: open_index(planted.uri, snapshot_id=snapshot_id, beside=beside),
        latest_id,
        refresh_seconds=0.01,
    )
    current.start()
    grow(planted, "second")
    assert swapped.wait(20)
    current.stop()
    assert current.snapshot_id == 2
    assert not any(thread.name == "refresh" for thread in threading.enumerate())
    current.close()


def test_the_end_does_not_wait_for_a_snapshot_that_opens(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_module, "STOP_SECONDS", 0.01)
    opening, go_on = threading.Event(), threading.Event()

    def open_snapshot(snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        if beside is not None:
            opening.set()
            assert go_on.wait(60)
        return open_index(planted.uri, snapshot_id=snapshot_id, beside=beside)

    current = Current(
        open_snapshot, lambda: snapshots.latest(planted.layout).snapshot_id, refresh_seconds=0.01
    )
    current.start()
    grow(planted, "second")
    assert opening.wait(20)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "refresh")
    current.stop()  # goes on at once
    assert thread.is_alive()
    go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert (current.snapshot_id, current.num_swaps, current.num_failed) == (1, 0, 0)
    current.close()
    assert mapped(Path(planted.uri)) == set()  # what came too late was closed


@pytest.mark.parametrize(
    ("refresh_seconds", "waits"),
    [(10.0, [10.0, 20.0, 40.0, 80.0, 160.0, 300.0]), (3600.0, [3600.0, 300.0, 300.0])],
)
def test_what_fails_is_tried_again_in_time_and_stale_since_it_failed(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch, refresh_seconds: float, waits: list[float]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(current_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    away = [False]

    def latest_id() -> int:
        if away[0]:
            raise StorageError("s3://bucket is away")
        return 1

    current = Current(
        lambda _, beside: open_index(planted.uri, beside=beside), latest_id, refresh_seconds=refresh_seconds
    )
    clock[0] += refresh_seconds
    away[0] = True
    found = [current._wait_seconds()]
    for _ in waits[1:]:
        current.refresh()
        assert current.seconds_stale == clock[0] - refresh_seconds  # not since the last that did not fail
        found.append(current._wait_seconds())
        clock[0] += found[-1]
    assert found == waits
    for _ in range(2000):
        current.refresh()
    assert current._wait_seconds() == 300.0
    away[0] = False
    current.refresh()
    assert (current.seconds_stale, current._wait_seconds()) == (0.0, refresh_seconds)
    current.close()


def test_another_encoder_is_loaded_anew(planted: PlantedIndex, current: Current, tmp_path: Path) -> None:
    from dataclasses import replace

    other: Bundle = open_bundle(planted.bundle.name, head="cluster", num_slots=3, allow_untrained=True)
    with current.lease() as index:
        old = index.texts_for(index.bundle)
        assert old is not None
        assert index.texts_for(other) is None
    other.save(planted.layout.bundle_uri(other.fingerprint))
    grown = replace(planted, bundle=other, segments=[], counts=[], codec_path=None, end_image_id=0)
    grow(grown, "other")
    assert current.refresh()
    with current.lease() as index:
        assert index.texts_for(other) is not old
        assert {hit.uri for hit in index.ask(Question("a dog")).hits} == {"other/0", "other/1"}


def test_an_index_without_images_is_served(planted_index: PlantedIndex) -> None:
    planted_index.append([])
    planted_index.publish()
    current = current_of(planted_index)
    with current.lease() as index:
        assert index.ask(Question("a dog")).reason == "snapshot 1 of the index holds no images"
    current.close()
