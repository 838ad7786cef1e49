"""Published snapshots: what went in comes out, the last one is found, and each refusal is one line."""

from __future__ import annotations

import datetime
import json
import tracemalloc
from pathlib import Path

import lance
import numpy as np
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.index.snapshots import (
    Published,
    by_id,
    choose_expired,
    expire,
    find_latest,
    latest,
    list_published,
    list_snapshots,
    publish,
)
from for_ray.schema import Codec, Layout, Segment, Snapshot, SnapshotRecord


@pytest.fixture
def layout(tmp_path):
    return Layout(str(tmp_path / "index"))


@pytest.fixture
def path(layout):
    return Path(layout.snapshots_uri)


@pytest.fixture
def snapshot():
    codec = Codec(
        codec_id="c0",
        file_name="codec-c0.faiss",
        sha256="ab" * 32,
        num_bytes=123,
        factory="IVF1,Flat",
        dim=16,
        nlist=1,
        num_trained_on=77,
    )
    segment = Segment(
        segment_id="s0",
        codec_id="c0",
        file_name="segment-s0.faiss",
        sha256="cd" * 32,
        num_bytes=456,
        num_vectors=77,
        first_image_id=0,
        end_image_id=1 << 40,
    )
    return Snapshot(
        snapshot_id=0,
        created_at=datetime.datetime(2026, 11, 22, 14, 0, 0, 123456, tzinfo=datetime.UTC),
        fingerprint="0123456789abcdef",
        images_version=7,
        codec=codec,
        segments=[segment, segment.model_copy(update={"segment_id": "s1"})],
        deleted_image_ids=np.array([3, 5, 1 << 54]),
        nprobe=4,
        listed=10,
        indexed=9,
        quarantined=1,
        num_vectors=154,
        recall_at_50=0.987654321,
    )


def record_of(snapshot: Snapshot) -> SnapshotRecord:
    return SnapshotRecord.model_validate(snapshot.model_dump(exclude={"deleted_image_ids"}))


def test_what_is_published_is_read_back(layout, snapshot):
    published = publish(layout, snapshot)
    assert published == snapshot.model_copy(update={"snapshot_id": 1})
    assert latest(layout) == by_id(layout, 1) == published
    assert find_latest(layout) == find_latest(layout, fingerprint=snapshot.fingerprint) == published
    assert list(list_snapshots(layout)) == [record_of(published)]


def test_a_file_uri_is_the_same_folder(layout, snapshot):
    published = publish(Layout("file://" + layout.index_uri), snapshot)
    assert latest(layout) == latest(Layout("file://" + layout.index_uri)) == published


def test_an_index_of_no_images(layout, snapshot):
    nothing = {"codec": None, "segments": [], "deleted_image_ids": [], "recall_at_50": None}
    published = publish(layout, snapshot.model_copy(update=nothing))
    assert latest(layout) == published
    assert (published.codec, published.segments, list(published.deleted_image_ids)) == (None, [], [])


def test_ids_count_up_and_the_last_one_is_the_latest(layout, snapshot):
    # `snapshot_id` of what is handed in does not count, nor does its time.
    earlier = snapshot.created_at - datetime.timedelta(days=9)
    published = [
        publish(layout, snapshot),
        publish(layout, snapshot.model_copy(update={"snapshot_id": 77, "fingerprint": "f" * 16})),
        publish(layout, snapshot.model_copy(update={"created_at": earlier, "listed": 11})),
    ]
    assert [one.snapshot_id for one in published] == [1, 2, 3]
    assert latest(layout) == published[2]
    assert by_id(layout, 2) == published[1]
    assert list(list_snapshots(layout)) == [record_of(each) for each in published[::-1]]
    assert list(list_snapshots(layout, fingerprint="f" * 16)) == [record_of(published[1])]
    assert find_latest(layout, fingerprint="f" * 16) == published[1]
    assert find_latest(layout, fingerprint="e" * 16) is None


def test_one_row_a_snapshot_with_columns_that_others_can_read(layout, snapshot):
    publish(layout, snapshot)
    publish(layout, snapshot)
    table = lance.dataset(layout.snapshots_uri).to_table()
    assert table["snapshot_id"].to_pylist() == [1, 2]
    assert table["created_at"].to_pylist()[0] == snapshot.created_at
    assert table["fingerprint"].to_pylist() == [snapshot.fingerprint] * 2
    assert table["deleted_image_ids"].to_pylist() == [[3, 5, 1 << 54]] * 2


def test_many_deleted_images(layout, snapshot):
    deleted = list(range(0, 3_000_000, 15))
    publish(layout, snapshot.model_copy(update={"deleted_image_ids": deleted}))
    found = latest(layout).deleted_image_ids
    assert (found.dtype, found.tolist()) == (np.int64, deleted)


def test_snapshots_are_listed_without_their_deleted_images(layout, snapshot):
    """Half a million ids are 4 MB, as Python's integers 20: a list of snapshots has neither."""
    for _ in range(4):
        publish(layout, snapshot.model_copy(update={"deleted_image_ids": np.arange(500_000) << 40}))
    tracemalloc.start()
    listed = list(list_snapshots(layout))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [each.snapshot_id for each in listed] == [4, 3, 2, 1]
    assert not any(hasattr(each, "deleted_image_ids") for each in listed)
    assert held < peak < 1 << 20


def test_deleted_images_are_eight_bytes_each_on_the_way_in_and_out(layout, snapshot):
    tracemalloc.start()
    publish(layout, snapshot.model_copy(update={"deleted_image_ids": np.arange(500_000) << 40}))
    found = latest(layout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.deleted_image_ids[-1] == 499_999 << 40
    assert peak < 3 * 8 * 500_000


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_nothing_published(layout, tmp_path):
    (tmp_path / "index").mkdir()
    for ask in (latest, lambda where: by_id(where, 1)):
        with pytest.raises(DataError) as caught:
            ask(layout)
        one_line(caught, str(tmp_path / "index"), "has no published snapshot", "run jobs/index.py")
    assert list(list_snapshots(layout)) == []


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError) as caught:
        latest(Layout(str(tmp_path / "nowhere")))
    one_line(caught, "nowhere has no published snapshot")


def test_an_unknown_id_names_the_known_ones(layout, snapshot):
    for _ in range(3):
        publish(layout, snapshot)
    with pytest.raises(DataError) as caught:
        by_id(layout, 4)
    one_line(caught, layout.index_uri, "has no snapshot 4", "1, 2, 3")


def test_a_damaged_table_is_refused_in_one_line(layout, snapshot, path):
    publish(layout, snapshot)
    for version in (path / "_versions").iterdir():
        version.write_bytes(b"x")
    for ask in (latest, lambda where: list(list_snapshots(where)), lambda where: publish(where, snapshot)):
        with pytest.raises(StorageError) as caught:
            ask(layout)
        one_line(caught, layout.snapshots_uri, "as a Lance table")


def test_a_file_in_the_way_is_refused_in_one_line(layout, snapshot, tmp_path):
    (tmp_path / "index").write_text("a file")
    with pytest.raises(StorageError) as caught:
        publish(layout, snapshot)
    one_line(caught, layout.snapshots_uri)


def test_a_record_of_another_version_is_refused_in_one_line(layout, snapshot):
    publish(layout, snapshot)
    table = lance.dataset(layout.snapshots_uri)
    table.update({"record": "'" + snapshot.model_dump_json()[:-1].replace("'", "''") + ',"shards":4}' + "'"})
    with pytest.raises(DataError) as caught:
        latest(layout)
    one_line(caught, "snapshot 1 of", "shards", "another version of for_ray")


DAY = datetime.timedelta(days=1)
NOON = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)


def published_at(*days: float) -> list[Published]:
    """Snapshots 1, 2, … of these days before noon."""
    return [Published(number, NOON - day * DAY, "f") for number, day in enumerate(days, start=1)]


@pytest.mark.parametrize(
    ("days", "keep_snapshots", "keep_days", "expired"),
    [
        ([], 1, 0, set()),
        ([9], 1, 0, set()),  # the latest stays, however old
        ([3, 2, 1], 1, 0, {1, 2}),
        ([3, 2, 1], 2, 0, {1}),
        ([3, 2, 1], 1, 7, set()),
        ([30, 20, 1], 1, 7, {1}),  # the second was the latest until yesterday
        ([30, 20, 1], 1, 1, {1, 2}),
        ([30, 20, 1], 3, 0, set()),
        ([4003, 4002, 4001, 4000], 3, 7, {1}),  # by a clock that is years ahead
        ([5, 5, 5, 0], 2, 0.5, {1, 2}),
    ],
)
def test_what_expires(days, keep_snapshots, keep_days, expired):
    published = published_at(*days)
    found = choose_expired(published, keep_snapshots=keep_snapshots, keep_days=keep_days, now=NOON)
    assert found == expired


def test_expired_snapshots_leave_the_list_and_ids_go_on(layout, snapshot):
    for _ in range(4):
        publish(layout, snapshot)
    expire(layout, {1, 3})
    assert [each.snapshot_id for each in list_published(layout)] == [2, 4]
    assert latest(layout).snapshot_id == 4
    with pytest.raises(DataError, match="has no snapshot 3; the last ones are 2, 4"):
        by_id(layout, 3)
    assert publish(layout, snapshot).snapshot_id == 5
    expire(layout, ())
    assert [each.snapshot_id for each in list_published(layout)] == [2, 4, 5]


def test_snapshots_that_differ_in_one_deleted_image_are_not_equal(snapshot):
    ids = [3, 5, 1 << 54]
    other = {
        each: snapshot.model_copy(update={"deleted_image_ids": np.array(each)})
        for each in [(3, 5), (3, 5, 6)]
    }
    assert snapshot == snapshot.model_copy(update={"deleted_image_ids": ids})
    assert Snapshot.model_validate(snapshot.model_dump()) == snapshot
    assert snapshot == Snapshot.model_validate_json(snapshot.model_dump_json())
    assert all(snapshot != each for each in other.values())
    assert snapshot != snapshot.model_copy(update={"listed": 11})
    assert snapshot not in (None, record_of(snapshot))
    assert json.loads(snapshot.model_dump_json())["deleted_image_ids"] == ids
    # Ascending and not to be written to, whatever was given.
    given = Snapshot.model_validate(snapshot.model_dump() | {"deleted_image_ids": ids[::-1]})
    assert given == snapshot
    with pytest.raises(ValueError, match="read-only"):
        given.deleted_image_ids[0] = 4


def test_nothing_to_list_and_nothing_to_expire(layout):
    assert list_published(layout) == []
    expire(layout, {1})
