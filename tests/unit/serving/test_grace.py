"""The snapshot before stays open for a while, and one that another replica told of is looked for."""

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import pytest

from for_ray.index import snapshots
from for_ray.retrieval import Question, open_index
from for_ray.serving import current as current_module
from for_ray.serving.current import Current, SnapshotClosedError
from tests.planted import PlantedIndex
from tests.unit.serving.test_current import grow, mapped, planted

__all__ = ["planted"]


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


def test_a_snapshot_that_does_not_open_leaves_the_current_one_and_ends_the_grace(
    planted: PlantedIndex,
) -> None:
    with graced(planted) as current:
        grow(planted, "second")
        assert current.refresh()
        grow(planted, "third")
        away = planted.segment_path("segment-2.faiss").rename(planted.segment_path("away"))
        assert not current.refresh()
        assert current.snapshot_id == 2
        assert current.seconds_stale > 0
        with pytest.raises(SnapshotClosedError, match="1 is asked for"):  # it made room for the next one
            current.lease(1).__enter__()
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
    monkeypatch.setattr(current_module, "MISS_SECONDS", 600.0)
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
        assert current.num_failed == 0  # it was looked for just now


@pytest.mark.parametrize("what", ["snapshot", "image"])
def test_few_wait_for_a_snapshot_that_opens_and_share_one_look(
    planted: PlantedIndex, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_module, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(current_module, "MOST_MISS_SECONDS", 60.0)
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

    def ask() -> int | None:
        try:
            with current.lease(2) if what == "snapshot" else current.lease_with(3) as index:
                return index.snapshot.snapshot_id
        except SnapshotClosedError as refused:
            return None if refused.is_coming else 0

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(current.refresh)
        assert entered.wait(60)
        asked = [pool.submit(ask) for _ in range(8)]
        grow(planted, "second")
        at_once = list(itertools.islice(as_completed(asked, timeout=60), 8 - current_module.MOST_WAITERS))
        assert [each.result() for each in at_once] == [None if what == "snapshot" else 1] * 6
        leave.set()
        assert [each.result() for each in asked if each not in at_once] == [2, 2]
        first.result()
    # The look that ran may have missed it; one more is for all who came meanwhile.
    assert len(looks) <= 2
    assert current.num_swaps == 1
    current.close()


def test_snapshots_that_nobody_told_of_are_looked_for_now_and_then(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_module, "MISS_SECONDS", 600.0)
    looks: list[int] = []
    with graced(planted) as current:
        monkeypatch.setattr(current, "_latest_id", lambda: looks.append(1) or 1)
        for wanted in (7, 8, 7):
            with pytest.raises(SnapshotClosedError) as refused:
                current.lease(wanted).__enter__()
            assert not refused.value.is_coming
        assert len(looks) == 1
        monkeypatch.setattr(current_module, "MISS_SECONDS", 0.0)
        with pytest.raises(SnapshotClosedError):
            current.lease(7).__enter__()
        assert len(looks) == 2


def test_an_image_of_the_snapshot_before_is_there_for_its_grace_time(planted: PlantedIndex) -> None:
    with graced(planted) as current:
        grow(planted, "second", deleted=(0,))
        assert current.refresh()
        for image_id, snapshot_id in ((0, 1), (1, 2), (3, 2)):
            with current.lease_with(image_id) as index:
                assert (index.snapshot.snapshot_id, index.image(image_id).image_id) == (snapshot_id, image_id)
        current._end_grace()
        with current.lease_with(0) as index:
            assert (index.snapshot.snapshot_id, index.image(0)) == (2, None)
    assert mapped(Path(planted.uri)) == set()  # all leases were given back


def test_who_waits_too_long_for_a_snapshot_is_told_to_come_again(
    planted: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_module, "LOOK_SECONDS", 0.01)
    with graced(planted) as current, current._refreshing:
        with pytest.raises(SnapshotClosedError) as refused:
            current.lease(2).__enter__()
        assert refused.value.is_coming
