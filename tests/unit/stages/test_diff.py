from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.schema import LISTING_SCHEMA
from for_ray.stages import diff
from for_ray.stages.diff import Gap, why_too_many_gone, write_gap
from for_ray.storage import Spill, spill


def listing_of(folder: Path, etags: dict[str, str], **metadata: list[object]) -> Spill:
    columns = {
        "uri": list(etags),
        "etag": list(etags.values()),
        "size_bytes": pa.array([10] * len(etags), pa.int64()),
    }
    table = pa.table(columns | metadata)
    schema = pa.schema(list(LISTING_SCHEMA) + list(table.schema)[len(LISTING_SCHEMA) :])
    rows = Spill(folder / "listing", schema)
    for batch in table.cast(schema).to_batches(max_chunksize=50):
        rows.add(batch)
    rows.finish()
    return rows


def table_of(rows: list[tuple[str, str, str | None, int]]) -> Iterator[pa.RecordBatch]:
    kinds = [("uri", pa.string()), ("etag", pa.string()), ("error", pa.string()), ("_rowid", pa.uint64())]
    columns = [pa.array([row[n] for row in rows], kind) for n, (_, kind) in enumerate(kinds)]
    yield from pa.table(columns, schema=pa.schema(kinds)).to_batches(max_chunksize=50)


def gap_of(
    folder: Path, etags: dict[str, str], rows: list[tuple[str, str, str | None, int]], **options: bool
) -> Gap:
    listed = listing_of(folder, etags)
    return write_gap(listed, table_of(rows), folder=folder / "diff", gap_uri=str(folder / "gap"), **options)


def encoded(gap: Gap) -> set[str]:
    return {uri for file in gap.file_uris for uri in pq.read_table(file)["uri"].to_pylist()}


def ids(batches: Iterator[np.ndarray]) -> list[int]:
    return [int(one) for batch in batches for one in batch]


def test_each_kind_is_told_apart(tmp_path):
    listed = {"new": "1", "changed": "2", "same": "3", "bad": "4", "bad-changed": "6"}
    rows = [
        ("gone", "1", None, 40),
        ("bad", "4", "truncated", 30),
        ("same", "3", None, 20),
        ("changed", "1", None, 10),
        ("bad-changed", "5", "truncated", 0),
    ]
    gap = gap_of(tmp_path, listed, rows)
    assert (gap.num_new, gap.num_changed, gap.num_gone, gap.num_unchanged, gap.num_quarantined) == (
        1,
        2,
        1,
        2,
        1,
    )
    assert gap.num_to_encode == 3
    assert gap.num_bytes == 30
    assert encoded(gap) == {"new", "changed", "bad-changed"}
    assert ids(gap.changed_image_ids()) == [0, 10]
    assert ids(gap.gone_image_ids()) == [40]


def test_quarantined_images_are_tried_again_when_asked_for(tmp_path):
    listed = {"same": "3", "bad": "4", "bad-changed": "6", "mended": "7"}
    rows = [
        ("bad", "4", "truncated", 30),
        ("same", "3", None, 20),
        ("bad-changed", "5", "truncated", 10),
        ("mended", "7", "truncated", 1),
        ("mended", "7", None, 40),  # a run that died had tried it again, and read it
        ("bad-gone", "8", "truncated", 50),
    ]
    gap = gap_of(tmp_path, listed, rows, retry_quarantined=True)
    assert (gap.num_new, gap.num_changed, gap.num_gone, gap.num_unchanged) == (0, 2, 1, 2)
    assert (gap.num_quarantined, gap.num_duplicates) == (0, 1)
    assert encoded(gap) == {"bad", "bad-changed"}
    assert ids(gap.changed_image_ids()) == [10, 30]
    assert ids(gap.gone_image_ids()) == [1, 50]


def test_the_first_run_encodes_all_with_its_metadata(tmp_path):
    rows = listing_of(tmp_path, {"a": "1", "b": "2"}, tags=[["x"], None])
    gap = write_gap(rows, iter(()), folder=tmp_path / "diff", gap_uri=str(tmp_path / "gap"))
    assert (gap.num_new, gap.num_to_encode, len(gap.file_uris)) == (2, 2, 1)
    table = pq.read_table(gap.file_uris[0])
    assert table.schema.equals(rows.schema)
    assert table.to_pylist() == [
        {"uri": "a", "etag": "1", "size_bytes": 10, "tags": ["x"]},
        {"uri": "b", "etag": "2", "size_bytes": 10, "tags": None},
    ]
    assert ids(gap.gone_image_ids()) == ids(gap.changed_image_ids()) == []


def test_an_unchanged_bucket_writes_nothing(tmp_path):
    gap = gap_of(tmp_path, {"a": "1", "b": "2"}, [("b", "2", None, 1), ("a", "1", None, 0)])
    assert (gap.num_to_encode, gap.num_gone, gap.num_unchanged, gap.file_uris) == (0, 0, 2, [])
    assert not (tmp_path / "gap").exists()


def test_rows_without_an_etag_are_encoded_again(tmp_path):
    gap = gap_of(tmp_path, {"a": "1"}, [("a", None, None, 3)])
    assert (gap.num_changed, ids(gap.changed_image_ids())) == (1, [3])


def test_doubled_rows_of_the_table_go(tmp_path):
    gap = gap_of(tmp_path, {"a": "1"}, [("a", "1", None, 3), ("a", "1", None, 5), ("b", "1", None, 6)])
    assert (gap.num_unchanged, gap.num_gone, gap.num_duplicates) == (1, 1, 1)
    assert ids(gap.gone_image_ids()) == [3, 6]


def test_of_doubled_rows_the_newest_counts(tmp_path):
    """A run that died before it deleted the old row of a changed image has not worked in vain."""
    gap = gap_of(tmp_path, {"a": "2"}, [("a", "2", None, 7), ("a", "1", None, 3)])
    assert (gap.num_unchanged, gap.num_changed, gap.num_duplicates) == (1, 0, 1)
    assert ids(gap.gone_image_ids()) == [3]


@pytest.mark.parametrize(
    ("num_kept", "num_held", "num_published", "most", "told"),
    [
        (50, 100, 0, 0.5, None),
        (49, 100, 0, 0.5, "51 of the 100 images that the index holds are gone (51.0%), more than"),
        (0, 100, 0, 1, None),
        (99, 100, 0, 0, "1 of the 100 images that the index holds are gone (1.0%), more than"),
        (0, 19, 0, 0.5, None),  # so few say nothing
        (0, 20, 0, 0.5, "20 of the 20 images that the index holds are gone (100.0%), more than"),
        (0, 0, 0, 0, None),  # the first night
        (30, 30, 62, 0.5, None),
        (30, 30, 63, 0.5, "32 of the 63 images that the index holds are gone (50.8%), more than"),
    ],
)
def test_too_many_gone_images_are_a_mistake(tmp_path, num_kept, num_held, num_published, most, told):
    """Of another encoder's published images those that are not listed, by their number: one is new here."""
    rows = [(str(number), "1", None, number) for number in range(num_held)]
    gap = gap_of(tmp_path, {str(number): "1" for number in range(num_kept)} | {"new": "1"}, rows)
    assert gap.num_held == num_held
    why = why_too_many_gone(
        gap,
        has_published=True,
        num_listed=num_kept + 1,
        num_published=num_published,
        images_uri="/x\n",
        most=most,
    )
    if told is None:
        assert why is None
    else:
        assert why.startswith(told)
        assert rf" max_gone_fraction {most:g}: /x\n lists {num_kept + 1}, 1 of them new; nothing was " in why
        assert "\n" not in why


@pytest.mark.parametrize(
    ("num_held", "has_published", "num_published", "told"),
    [
        (5, True, 1000, "998 of the 1,000 images"),  # what a dead run of few rows left hides nothing
        (30, False, 1000, "998 of the 1,000 images"),
        (30, True, 1000, "30 of the 30 images"),
        (30, False, 0, None),  # a first run with a wrong prefix, which was then corrected
    ],
)
def test_of_two_sides_those_that_say_something_count(tmp_path, num_held, has_published, num_published, told):
    gap = gap_of(tmp_path, {"new": "1"}, [(str(number), "1", None, number) for number in range(num_held)])
    why = why_too_many_gone(
        gap,
        has_published=has_published,
        num_listed=2,
        num_published=num_published,
        images_uri="/x",
        most=0.5,
    )
    assert why is None if told is None else why.startswith(told)


def random_state(seed: int, num_uris: int, share: float) -> dict[str, str]:
    draw = random.Random(seed)
    return {f"s3://b/{n}": str(draw.randrange(2)) for n in range(num_uris) if draw.random() < share}


@pytest.mark.parametrize(
    ("share_listed", "share_known", "are_parted"),
    [(0.8, 0.7, False), (0.8, 0.7, True), (0.01, 0.9, True), (0.9, 0.01, True), (0.9, 0.0, True)],
)
def test_the_gap_is_the_difference_of_two_sets(tmp_path, monkeypatch, share_listed, share_known, are_parted):
    if are_parted:
        monkeypatch.setattr(spill, "BUFFER_ROWS", 100)
        monkeypatch.setattr(spill, "NUM_PARTS", 8)
    monkeypatch.setattr(diff, "ROWS_PER_FILE", 300)
    listed = random_state(1, 1500, share_listed)
    known = random_state(2, 1500, share_known)
    seen: list[int] = []
    gap = write_gap(
        listing_of(tmp_path, listed),
        table_of([(uri, etag, None, zlib.crc32(uri.encode())) for uri, etag in known.items()]),
        folder=tmp_path / "diff",
        gap_uri=str(tmp_path / "gap"),
        progress=seen.append,
    )
    new, gone = listed.keys() - known.keys(), known.keys() - listed.keys()
    changed = {uri for uri in listed.keys() & known.keys() if listed[uri] != known[uri]}
    assert (gap.num_new, gap.num_changed, gap.num_gone) == (len(new), len(changed), len(gone))
    assert gap.num_unchanged == len(listed) - len(new) - len(changed)
    assert encoded(gap) == new | changed
    assert ids(gap.gone_image_ids(7)) == sorted(zlib.crc32(uri.encode()) for uri in gone)
    assert ids(gap.changed_image_ids(7)) == sorted(zlib.crc32(uri.encode()) for uri in changed)
    lengths = [pq.read_metadata(file).num_rows for file in gap.file_uris]
    assert sum(lengths) == gap.num_to_encode
    assert all(length == 300 for length in lengths[:-1])
    assert seen[-1] == len(listed)


@pytest.mark.parametrize("are_parted", [False, True])
def test_a_uri_that_is_listed_twice_is_refused(tmp_path, monkeypatch, are_parted):
    if are_parted:
        monkeypatch.setattr(spill, "BUFFER_ROWS", 60)
        monkeypatch.setattr(spill, "NUM_PARTS", 8)
    rows = Spill(tmp_path / "listing", LISTING_SCHEMA)
    for first in (0, 50, 40):
        uris = [f"s3://b/{n}" for n in range(first, first + 41)]
        rows.add(pa.record_batch([uris, ["e"] * 41, [1] * 41], schema=LISTING_SCHEMA))
    rows.finish()
    with pytest.raises(DataError, match=r"s3://b/\d+ is listed 2 times; a uri must be listed once"):
        write_gap(rows, iter(()), folder=tmp_path / "diff", gap_uri=str(tmp_path / "gap"))


def test_a_gap_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "gap").touch()
    with pytest.raises(StorageError, match=r"cannot write .*: a file stands where a folder is expected"):
        gap_of(tmp_path, {"a": "1"}, [])
