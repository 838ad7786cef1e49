"""A sound index has nothing wrong; each damage gets its line, and does not hide the next."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import lance
import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.index import table
from for_ray.index.audit import (
    AuditJob,
    AuditRange,
    RangeAudit,
    audit_counts,
    audit_range,
    audit_record,
    plan_ranges,
)
from for_ray.index.audit_files import check_codec, find_broken
from for_ray.index.audit_rows import end_of_ids, find_doubled
from for_ray.index.faults import Faults
from for_ray.index.segment import build_segment
from for_ray.schema import Segment, Snapshot, pack_vector_ids
from for_ray.storage import spill
from tests.planted import Planted, PlantedIndex

DIM = 16
GONE = 2
"""An image of the first segment that the table holds no more; it has three vectors."""


def units(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def planted(numbers: range) -> list[Planted]:
    """Images with one to three vectors; every fifth is quarantined."""
    return [
        Planted(f"/images/{n}.jpg", units(0, n), error="truncated")
        if n % 5 == 4
        else Planted(f"/images/{n}.jpg", units(n % 3 + 1, n))
        for n in numbers
    ]


@pytest.fixture
def index(planted_index: PlantedIndex) -> PlantedIndex:
    """Two segments, of images 0 to 7 and 8 to 14; image 2 has gone."""
    planted_index.add(planted(range(8)))
    planted_index.add(planted(range(8, 15)), deleted=[GONE])
    return planted_index


def snapshot_of(index: PlantedIndex, *, dead: Sequence[int] = (3, 0), **changes: object) -> Snapshot:
    """What a run would publish of the index."""
    segments = [
        segment.model_copy(update={"num_dead": count})
        for segment, count in zip(index.segments, dead, strict=True)
    ]
    num_live = sum(segment.num_live for segment in segments)
    update = {"segments": segments, "num_vectors": num_live, "deleted_image_ids": [GONE], **changes}
    return index.publish().model_copy(update=update)


def with_segment(snapshot: Snapshot, number: int, **changes: object) -> Snapshot:
    segments = list(snapshot.segments)
    segments[number] = segments[number].model_copy(update=changes)
    return snapshot.model_copy(update={"segments": segments})


def audited(index: PlantedIndex, snapshot: Snapshot, folder: Path, *, latest: bool = False) -> list[str]:
    """All that is wrong, as the stage puts it together."""
    images = table.require_table(index.images_uri, version=snapshot.images_version)
    problems, broken = find_broken(images)
    job = AuditJob(
        index_uri=index.uri,
        fingerprint=snapshot.fingerprint,
        version=snapshot.images_version,
        latest_version=table.version_of(table.open_table(index.images_uri)) if latest else None,
        codec=snapshot.codec,
        broken=broken,
    )
    found = RangeAudit()
    deleted = np.array(snapshot.deleted_image_ids, np.int64)
    for part in plan_ranges(snapshot.segments, end_of_ids(images), images_a_range=5):
        found.merge(audit_range(job, part, deleted=deleted, folder=folder))
    doubled = find_doubled(images, folder / "doubled", keys=["uri"], broken=broken)
    if doubled:
        found.faults.add("twice", *doubled)
    problems += [*audit_record(snapshot), *found.problems, *audit_counts(snapshot, found, "the table")]
    return problems + found.faults.lines("the table")


def rebuild(index: PlantedIndex, number: int, vector_ids: NDArray[np.int64]) -> Segment:
    """A segment's record after its file was built again with vectors of these ids."""
    segment = index.segments[number]
    path = index.segment_path(segment.file_name)
    batch = (vector_ids, units(len(vector_ids), 99))
    built = build_segment(index.codec_path, [batch], path, threads=1)
    return segment.model_copy(
        update={"sha256": built.sha256, "num_bytes": built.num_bytes, "num_vectors": built.num_vectors}
    )


def ids_of(index: PlantedIndex, first: int, end: int) -> NDArray[np.int64]:
    batches = table.read_vectors(table.open_table(index.images_uri), first, end, batch_rows=100)
    return np.concatenate([batch.vector_ids for batch in batches])


def test_a_sound_index_has_nothing_wrong(index, tmp_path):
    snapshot = snapshot_of(index)
    assert audited(index, snapshot, tmp_path) == []
    table.append(
        table.open_table(index.images_uri),
        table.write_fragments(table.open_table(index.images_uri).to_table().slice(0, 1), index.images_uri),
    )  # what is not published yet is no fault
    assert audited(index, snapshot, tmp_path, latest=True) == []


def test_an_index_without_vectors_is_sound(planted_index, tmp_path):
    planted_index.append([Planted("/a.jpg", units(0, 0), error="empty")])
    snapshot = planted_index.publish()
    assert (snapshot.quarantined, audited(planted_index, snapshot, tmp_path)) == (1, [])


@pytest.mark.parametrize("which", ["segment", "codec"])
def test_a_flipped_byte_is_told(index, tmp_path, which):
    snapshot = snapshot_of(index)
    record = snapshot.segments[1] if which == "segment" else snapshot.codec
    path = index.segment_path(record.file_name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if which == "codec":
        with pytest.raises(DataError) as caught:
            check_codec(index.layout, snapshot.fingerprint, snapshot.codec, tmp_path)
        problems = [str(caught.value), *audited(index, snapshot, tmp_path)]
    else:
        problems = audited(index, snapshot, tmp_path)
    assert len(problems) == 1
    assert f"{record.file_name} is damaged or was replaced: its SHA-256 is " in problems[0]
    assert f"expected {record.sha256[:16]}…; restore the file" in problems[0]


def test_cut_and_missing_segments_are_told_and_the_rest_is_checked(index, tmp_path):
    snapshot = snapshot_of(index, indexed=1)
    cut, missing = (index.segment_path(segment.file_name) for segment in snapshot.segments)
    cut.write_bytes(cut.read_bytes()[:-7])
    missing.unlink()
    problems = audited(index, snapshot, tmp_path)
    length = snapshot.segments[0].num_bytes
    assert len(problems) == 3
    assert f"segment-0.faiss has {length - 7:,} bytes, expected {length:,}; restore the file" in problems[0]
    assert "segment-1.faiss is not there; restore the file" in problems[1]
    assert "the table has 11 indexed images, snapshot 1 says 1; " in problems[2]


def test_another_codec_and_wrong_numbers_in_a_record_are_told(index, tmp_path):
    other = PlantedIndex.make(tmp_path / "other", index.bundle)
    other.add(planted(range(8, 15)), codec="IVF3,Flat")
    shutil.copy(other.segment_path("segment-0.faiss"), index.segment_path("segment-1.faiss"))
    stranger = other.segments[0]
    snapshot = with_segment(
        snapshot_of(index), 1, sha256=stranger.sha256, num_bytes=stranger.num_bytes, codec_id="another"
    )
    snapshot = with_segment(snapshot, 0, num_vectors=20, num_dead=1)
    problems = audited(index, snapshot, tmp_path)
    assert len(problems) == 5
    assert f"segment 1 is of codec another, expected {snapshot.codec.codec_id}; " in problems[0]
    assert (
        "snapshot 1: its segments have 30 vectors that searches may find, the record says 21" in problems[1]
    )
    assert "segment-0.faiss holds 13 vectors, the snapshot says 20; " in problems[2]
    assert (
        "segment-0.faiss holds 3 vectors of images that are not in the table, the snapshot says 1; "
        in problems[3]
    )
    assert "segment-1.faiss is of another codec than " in problems[4]


def test_segments_that_claim_the_same_images_are_told(index, tmp_path):
    whole = ids_of(index, 8, 15)
    again = ids_of(index, 6, 8)
    index.segments[1] = rebuild(index, 1, np.concatenate([again, whole]))
    snapshot = with_segment(snapshot_of(index), 1, first_image_id=6)
    problems = audited(index, snapshot, tmp_path)
    assert "snapshot 1: segments 0 and 1 both claim the images 6 to 7; " in problems[0]
    assert "the table has 21 vectors, snapshot 1 says 24; " in problems[1]
    assert (
        f"vectors that are in two segments, or in one of them twice: {len(again)} (image 6, slot 0); "
        in problems[2]
    )
    assert len(problems) == 3


def test_vectors_in_no_segment_and_of_nobody_are_told(index, tmp_path):
    ids = ids_of(index, 8, 15)
    strange = pack_vector_ids(np.array([14, 8, 1, 9]), np.array([0, 77, 0, 255]))
    index.segments[1] = rebuild(index, 1, np.concatenate([ids[1:], strange]))
    snapshot = snapshot_of(index, deleted_image_ids=[])
    problems = audited(index, snapshot, tmp_path)
    assert problems[0].startswith(
        f"{index.segment_path('segment-1.faiss')} holds vectors of images outside its range of 8 to 14, "
        "which belong to another segment or to none: 1 (image 1, slot 0); go back to a sound snapshot"
    )
    assert [problem.split(";")[0] for problem in problems[1:]] == [
        "the table has 21 vectors, snapshot 1 says 24",
        "vectors that are in no segment, in the table: 1 (image 8)",
        "vectors in segments of images that the snapshot does not call deleted and that are not in "
        "the table: 3 (image 2, slot 0)",
        "vectors in segments of slots that their images do not have in the table: 3 (image 8, slot 77)",
    ]


def test_images_that_are_called_deleted_and_are_there_are_told(index, tmp_path):
    problems = audited(index, snapshot_of(index, deleted_image_ids=[1, GONE]), tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(
        "images that the snapshot calls deleted, so that searches pass them over, in the table: 1 (image 1); "
    )


def test_rows_that_are_not_what_they_must_be_are_told(index, tmp_path):
    long = 2 * units(2, 5)
    endless = units(1, 6)
    endless[0, 3] = np.nan
    index.append(
        [
            Planted("/both.jpg", units(2, 1), error="truncated"),
            Planted("/neither.jpg", units(0, 2)),
            Planted("/boxes.jpg", units(2, 3), boxes=[(0, 0, 1, 1)]),
            Planted("/long.jpg", long),
            Planted("/endless.jpg", endless),
            Planted("/images/3.jpg", units(1, 3)),
        ]
    )
    problems = audited(index, snapshot_of(index), tmp_path)
    assert [problem.split(";")[0] for problem in problems] == [
        "the table has 29 vectors, snapshot 1 says 21",
        "images with an error and vectors, neither indexed nor quarantined, in the table: 1 "
        "(image 15, /both.jpg)",
        "images with neither an error nor a vector in the table: 1 (image 16, /neither.jpg)",
        "images with another number of boxes than of vectors in the table: 1 (image 17, /boxes.jpg)",
        "vectors that are not finite or not of length 1 in the table: 3 (image 18, slot 0)",
        "uris that are more than once in the table: 1 (/images/3.jpg)",
        "vectors that are in no segment, in the table: 8 (image 15)",
    ]
    assert "run jobs/index.py again" in problems[-3]


def test_a_lost_file_of_the_table_is_told_once_and_the_others_are_read(index, tmp_path):
    index.append([Planted("/boxes.jpg", units(2, 3), boxes=[(0, 0, 1, 1)])])
    snapshot = snapshot_of(index)
    fragments = lance.dataset(index.images_uri).get_fragments()
    lost = Path(index.images_uri) / "data" / fragments[0].metadata.files[0].path
    lost.unlink()
    problems = audited(index, snapshot, tmp_path)
    assert len(problems) == 3
    assert problems[0].startswith(f"{lost} is not there: 7 images of version {snapshot.images_version} of ")
    assert "images.lance cannot be read; restore the file, or index the images anew" in problems[0]
    assert problems[1].startswith("images with another number of boxes than of vectors in the table: 1 ")
    assert problems[2].startswith("vectors that are in no segment, in the table: 2 (image 15)")


def test_a_cut_file_and_a_lost_list_of_deletions_are_told(index, tmp_path):
    snapshot = snapshot_of(index)
    fragments = lance.dataset(index.images_uri).get_fragments()
    cut = Path(index.images_uri) / "data" / fragments[1].metadata.files[0].path
    num_bytes = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-10])
    deletions = Path(index.images_uri) / fragments[0].deletion_file()
    deletions.rename(tmp_path / "kept")
    problems, broken = find_broken(table.open_table(index.images_uri))
    assert broken == {0, 1}
    assert problems[0].startswith(f"{cut} has {num_bytes - 10:,} bytes, expected {num_bytes:,}: 7 images of ")
    assert problems[1].startswith(f"{deletions} is not there: 7 images of ")
    job = AuditJob(index.uri, snapshot.fingerprint, snapshot.images_version, None, snapshot.codec, broken)
    found = RangeAudit()
    for part in plan_ranges(snapshot.segments, 15, images_a_range=5):
        none = np.empty(0, np.int64)
        found.merge(audit_range(job, part, deleted=none, folder=tmp_path))
    assert not found.is_read
    assert [problem.split(": External")[0] for problem in found.problems] == [
        f"{index.images_uri} cannot be read or written as a Lance table"
    ]
    assert audit_counts(snapshot, found, "the table") == found.faults.lines("the table") == []


def test_a_dropped_row_is_told(index, tmp_path):
    snapshot = snapshot_of(index)
    table.delete_images(table.open_table(index.images_uri), np.array([5, 13]))
    assert audited(index, snapshot, tmp_path) == []  # the published version has it
    problems = audited(index, snapshot, tmp_path, latest=True)
    assert problems == [
        "images of the table that its latest version lacks: 2 (image 5); rows were deleted by hand, or a run "
        "is under way or has died: run jobs/index.py again"
    ]


def test_a_snapshot_that_counts_wrongly_is_told(index, tmp_path):
    snapshot = snapshot_of(index, indexed=12, quarantined=4, listed=15)
    problems = audited(index, snapshot, tmp_path)
    assert [problem.split(";")[0] for problem in problems] == [
        "snapshot 1: 12 images indexed and 4 quarantined are more than the 15 listed",
        "the table has 11 indexed images, snapshot 1 says 12",
        "the table has 3 quarantined images, snapshot 1 says 4",
    ]


@pytest.mark.parametrize("are_parted", [False, True])
def test_rows_of_one_uri_are_found_by_what_must_differ(planted_index, tmp_path, monkeypatch, are_parted):
    if are_parted:
        monkeypatch.setattr(spill, "BUFFER_ROWS", 4)
        monkeypatch.setattr(spill, "NUM_PARTS", 3)
    none = units(0, 0)
    rows = [Planted(f"/{n}.jpg", none, error="x") for n in range(9)]
    rows += [Planted("/3.jpg", none, etag="new", error="x"), Planted("/4.jpg", units(1, 1))]
    planted_index.append(rows)
    images = table.open_table(planted_index.images_uri)
    keys = ["uri", "etag", "is_quarantined"]
    assert find_doubled(images, tmp_path / "a", keys=["uri"], broken=frozenset()).num == 2
    assert find_doubled(images, tmp_path / "b", keys=keys, broken=frozenset()) is None
    planted_index.append(rows[7:8])
    images = table.open_table(planted_index.images_uri)
    assert find_doubled(images, tmp_path / "c", keys=keys, broken=frozenset()) == (1, "/7.jpg")
    assert find_doubled(images, tmp_path / "d", keys=keys, broken=frozenset({0})) is None


def segment(first: int, end: int) -> Segment:
    return Segment(
        segment_id=f"{first}",
        codec_id="c",
        file_name=f"{first}.faiss",
        sha256="",
        num_bytes=1,
        num_vectors=1,
        first_image_id=first,
        end_image_id=end,
    )


def test_ranges_cover_all_ids_once():
    one, two, three = segment(3, 10), segment(20, 30), segment(25, 28)
    assert plan_ranges([two, one, three], 41, images_a_range=7) == [
        AuditRange(0, 3, ()),
        AuditRange(3, 10, (one,)),
        AuditRange(10, 17, ()),
        AuditRange(17, 20, ()),
        AuditRange(20, 30, (two, three)),
        AuditRange(30, 37, ()),
        AuditRange(37, 41, ()),
    ]
    assert plan_ranges([one], 5, images_a_range=7) == [AuditRange(0, 3, ()), AuditRange(3, 10, (one,))]
    assert plan_ranges([], 0, images_a_range=7) == []


def test_faults_of_tasks_add_up():
    one, other = Faults(), Faults()
    one.add("slots", 2, "image 1, slot 9")
    other.add("slots", 1000, "image 5, slot 9")
    other.add("both", 1, "image 5")
    one.merge(other)
    lines = one.lines("T")
    assert lines[0].startswith(
        "images with an error and vectors, neither indexed nor quarantined, in T: 1 (image 5); "
    )
    assert lines[1].startswith(
        "vectors in segments of slots that their images do not have in T: 1,002 (image 1, slot 9); "
    )
    assert len(lines) == 2
