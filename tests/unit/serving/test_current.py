"""Snapshots are swapped between two questions: none fails, none is mixed, and the old one's memory goes."""

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
from for_ray.serving.current import Current, SnapshotClosedError
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


@contextmanager
def graced(planted: PlantedIndex, seconds: float = 600.0) -> Iterator[Current]:
    """Whose snapshot before stays open so long."""
    opened = Current(
        lambda snapshot_id, beside: open_index(planted.uri, snapshot_id=snapshot_id, beside=beside),
        lambda: snapshots.list_published(planted.layout)[-1].snapshot_id,
        refresh_seconds=10.0,
        grace_seconds=seconds,
    )
    try:
        yield opened
    finally:
        opened.close()


def page_of(current: Current) -> Question:
    """The second page of an answer."""
    with current.lease() as index:
        return Question("a dog", k=1, page=index.ask(Question("a dog", k=1)).next_page)


def test_an_answer_goes_on_in_the_snapshot_before(planted: PlantedIndex) -> None:
    with graced(planted) as current:
        page = page_of(current)
        with current.lease(1) as first:
            expected = first.ask(page).hits
        grow(planted, "second")
        assert current.refresh()
        with current.lease(1) as before:
            assert before is first
            assert before.ask(page).hits == expected
        with current.lease() as index:
            assert index.snapshot.snapshot_id == 2
        grow(planted, "third")
        assert current.refresh()  # there are two at most
        with pytest.raises(SnapshotClosedError, match="1 is asked for, and snapshot 3 is served") as refused:
            current.lease(1).__enter__()
        assert not refused.value.is_coming
        with pytest.raises(ValueError, match="was closed"):
            first.ask(page)
        with current.lease(2) as before:
            assert before.snapshot.snapshot_id == 2


def test_the_snapshot_before_is_given_back_after_a_while(planted: PlantedIndex) -> None:
    with graced(planted, 0.05) as current:
        with current.lease() as index:
            old = weakref.ref(index)
            del index
        planted.segments.clear()
        grow(planted, "second")
        assert current.refresh()
        ended = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        for thread in ended:
            thread.join(20)
        del ended, thread
        gc.collect()
        assert old() is None
        assert {path.rsplit("/", 1)[-1] for path in mapped(Path(planted.uri))} == {"segment-1.faiss"}
        with pytest.raises(SnapshotClosedError):
            current.lease(1).__enter__()


def test_a_page_in_the_snapshot_before_keeps_it_open_to_its_end(planted: PlantedIndex) -> None:
    with graced(planted) as current:
        page = page_of(current)
        grow(planted, "second")
        assert current.refresh()
        with current.lease(1) as before:
            grow(planted, "third")
            assert current.refresh()
            assert len(before.ask(page).hits) == 1
        with pytest.raises(ValueError, match="was closed"):
            before.ask(page)
    assert mapped(Path(planted.uri)) == set()


def test_a_failed_refresh_leaves_both(planted: PlantedIndex) -> None:
    with graced(planted) as current:
        grow(planted, "second")
        assert current.refresh()
        grow(planted, "third")
        away = planted.segment_path("segment-2.faiss").rename(planted.segment_path("away"))
        assert not current.refresh()
        assert current.snapshot_id == 2
        assert current.seconds_stale > 0
        with pytest.raises(SnapshotClosedError) as refused:
            current.lease(3).__enter__()
        assert refused.value.is_coming
        assert current.num_failed == 1  # the thread alone tries again
        away.rename(planted.segment_path("segment-2.faiss"))
        assert current.refresh()
        assert (current.snapshot_id, current.seconds_stale) == (3, 0.0)


def test_what_only_a_newer_snapshot_has_is_looked_for(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another replica has told of it."""
    with graced(planted) as current, graced(planted) as other:
        grow(planted, "second")
        assert other.refresh()
        page = page_of(other)
        with current.lease(2) as index, other.lease(2) as right:
            assert index.ask(page).hits == right.ask(page).hits
        assert current.num_swaps == 1
        grow(planted, "third")
        with current.lease_with(0) as index:
            assert index.snapshot.snapshot_id == 2  # it has the image: nothing is looked for
        with current.lease_with(5) as index:
            assert index.image(5).uri == "third/1"
        monkeypatch.setattr(current, "_latest_id", None)  # who calls it fails
        for _ in range(3):
            with current.lease_with(99) as index:
                assert index.image(99) is None
        assert current.num_failed == 0  # a second has not passed


def test_many_that_wait_for_a_snapshot_share_one_look(planted: PlantedIndex) -> None:
    entered, leave = threading.Event(), threading.Event()
    looks: list[int] = []

    def latest_id() -> int:
        looks.append(1)
        if len(looks) == 1:
            entered.set()
            assert leave.wait(60)
        return snapshots.list_published(planted.layout)[-1].snapshot_id

    current = Current(
        lambda snapshot_id, beside: open_index(planted.uri, snapshot_id=snapshot_id, beside=beside),
        latest_id,
        refresh_seconds=10.0,
    )
    waiting = threading.Barrier(9)

    def ask() -> int:
        waiting.wait(60)
        with current.lease(2) as index:
            return index.snapshot.snapshot_id

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(current.refresh)
        assert entered.wait(60)
        asked = [pool.submit(ask) for _ in range(8)]
        grow(planted, "second")
        waiting.wait(60)
        leave.set()
        assert [each.result() for each in asked] == [2] * 8
        first.result()
    # The look that ran may have missed it; one more is for all who came meanwhile.
    assert len(looks) <= 2
    assert current.num_swaps == 1
    current.close()


def test_who_waits_too_long_for_a_snapshot_is_told_to_come_again(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_module, "LOOK_SECONDS", 0.01)
    with graced(planted) as current, current._refreshing:
        with pytest.raises(SnapshotClosedError) as refused:
            current.lease(2).__enter__()
        assert refused.value.is_coming


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

    def open_snapshot(snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        if beside is not None:
            swapped.set()
        return open_index(planted.uri, snapshot_id=snapshot_id, beside=beside)

    current = Current(
        open_snapshot, lambda: snapshots.latest(planted.layout).snapshot_id, refresh_seconds=0.01
    )
    current.start()
    grow(planted, "second")
    assert swapped.wait(20)
    current.stop()  # after the swap that runs
    assert current.snapshot_id == 2
    assert not any(thread.name == "refresh" for thread in threading.enumerate())
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
