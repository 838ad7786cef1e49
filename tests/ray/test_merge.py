"""Nights of building and merging: the segments answer as one that is built at once, and stay few."""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import StageError, StorageError
from for_ray.index import table
from for_ray.index.drafts import write_draft
from for_ray.index.plan import DEFAULT_MEMORY_BYTES
from for_ray.index.search import Hits, SegmentSet
from for_ray.index.segment import build_segment
from for_ray.index.tiers import MOST_DEAD_SHARE
from for_ray.schema import Layout, Segment, Snapshot, image_ids_of, images_schema
from for_ray.stages.build import update_segments
from for_ray.stages.built import Built
from for_ray.stages.cluster import Cluster
from for_ray.stages.merge import _merge, merge_small
from for_ray.stages.ranges import RangeJob

DIM, SLOTS = 16, 4


class Nights:
    """An index of random vectors that changes from night to night, as the index job changes it.

    Args:
        index: Its folder.
        cluster: Where the tasks run.
    """

    def __init__(self, index: Path, cluster: Cluster) -> None:
        self.layout, self.cluster, self.wanted = Layout(str(index)), cluster, "HR,IVF8,RaBitQ4"
        self.random = np.random.default_rng(0)
        self.images = table.create_table(self.layout.images_uri("f"), images_schema(DIM))
        self.held: set[int] = set()
        self.num_nights = self.num_added = self.num_merged = 0

    def change(self, *, new: int, gone: int | list[int] = 0) -> None:
        """Add images, and delete some that were there before: so many, or these."""
        before = np.array(sorted(self.held))
        if new:
            self.add(new)
        ids = self.random.choice(before, gone, replace=False) if isinstance(gone, int) and gone else gone
        if ids is not gone or isinstance(gone, list):
            self.images = table.open_table(self.images.uri)
            table.delete_images(self.images, np.array(ids))
            self.held -= {int(number) for number in np.array(ids)}
            self.images = table.open_table(self.images.uri)

    def add(self, count: int) -> None:
        vectors = self.random.normal(size=(count, SLOTS, DIM))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        columns = {field.name: pa.nulls(count, field.type) for field in images_schema(DIM)}
        columns["uri"] = pa.array([str(number) for number in range(count)])
        halves = vectors.astype(np.float16)
        columns["vectors"] = pa.array([list(map(list, image)) for image in halves], table_type("vectors"))
        columns["boxes"] = pa.array([[[0, 0, 1, 1]] * SLOTS] * count, table_type("boxes"))
        rows = pa.table(columns, schema=images_schema(DIM))
        self.images = table.append(self.images, table.write_fragments(rows, self.images.uri))
        self.held |= set(range(self.num_added, self.num_added + count))
        self.num_added += count

    @property
    def job(self) -> RangeJob:
        version = table.version_of(self.images)
        return RangeJob(self.layout.index_uri, "f", version, f"run{self.num_nights}")

    def build(
        self, base: Snapshot | None, *, most: int | None = None, memory_bytes: int = DEFAULT_MEMORY_BYTES
    ) -> Built:
        self.num_nights += 1
        built = update_segments(
            self.job,
            base,
            cluster=self.cluster,
            wanted=self.wanted,
            floor=0.9,
            memory_bytes=memory_bytes,
            on_progress=lambda _: None,
        )
        return built if most is None else built._replace(vectors_per_segment=most)

    def run(self, base: Snapshot | None, *, most: int | None = None) -> tuple[Snapshot, Built]:
        built = self.build(base, most=most)
        done: list[int] = []
        merged = merge_small(self.job, built, cluster=self.cluster, on_progress=done.append)
        self.num_merged += max(done, default=0)
        return self.publish(merged), merged

    def publish(self, built: Built) -> Snapshot:
        return Snapshot(
            snapshot_id=self.num_nights,
            created_at=datetime.datetime.now(datetime.UTC),
            fingerprint="f",
            images_version=table.version_of(self.images),
            codec=built.codec,
            segments=built.segments,
            deleted_image_ids=built.deleted.tolist(),
            nprobe=1,
            listed=1,
            indexed=1,
            quarantined=0,
            num_vectors=built.num_vectors,
            recall_at_50=None,
        )

    def path(self, file_name: str) -> Path:
        return Path(self.layout.segment_uri("f", file_name))

    def search(self, snapshot: Snapshot, *, nprobe: int) -> Hits:
        """All that twenty queries find."""
        paths = [self.path(each.file_name) for each in snapshot.segments]
        deleted = np.array(snapshot.deleted_image_ids, np.int64)
        queries = np.random.default_rng(7).normal(size=(20, DIM))
        return SegmentSet(paths, nprobe=nprobe).search(queries, 10_000, exclude_image_ids=deleted)

    def check(self, snapshot: Snapshot, folder: Path) -> None:
        """The snapshot answers as a segment that is built at once of what the table holds."""
        batches = [
            (batch.vector_ids, batch.vectors)
            for batch in table.read_vectors(self.images, 0, self.num_added, batch_rows=100)
        ]
        whole = build_segment(
            self.path(snapshot.codec.file_name), batches, folder / f"{self.num_nights}", threads=1
        )
        queries = np.random.default_rng(7).normal(size=(20, DIM))
        for nprobe in (2, 8):
            found = self.search(snapshot, nprobe=nprobe)
            right = SegmentSet([whole.path], nprobe=nprobe).search(queries, 10_000)
            np.testing.assert_array_equal(found.vector_ids, right.vector_ids)
            np.testing.assert_array_equal(found.scores, right.scores)
        assert set(image_ids_of(found.vector_ids[0]).tolist()) == self.held
        assert snapshot.num_vectors == SLOTS * len(self.held) == whole.num_vectors
        assert sum(each.num_live for each in snapshot.segments) == snapshot.num_vectors
        assert all(each.num_dead <= MOST_DEAD_SHARE * each.num_vectors for each in snapshot.segments)
        num_dead = sum(each.num_dead for each in snapshot.segments)
        assert len(snapshot.deleted_image_ids) * SLOTS == num_dead


def table_type(name: str) -> pa.DataType:
    return images_schema(DIM).field(name).type


@pytest.fixture
def nights(ray_address: str, tmp_path: Path) -> Iterator[Nights]:
    """An index of nothing yet."""
    with contextlib.ExitStack() as stack:
        yield Nights(tmp_path / "index", Cluster(stack))


@pytest.mark.parametrize("most", [None, 400])
def test_nights_of_changes_answer_as_one_build(nights, tmp_path, most):
    """The second index is full in segments of 400 vectors, so that its nights are large ones."""
    nights.change(new=200)
    snapshot, _ = nights.run(None, most=most)
    assert len(snapshot.segments) == 1
    files, most_deleted = set(), 0
    for _ in range(10):
        nights.change(new=20, gone=20)
        snapshot, _ = nights.run(snapshot, most=most)
        nights.check(snapshot, tmp_path)
        files |= {each.file_name for each in snapshot.segments}
        most_deleted = max(most_deleted, len(snapshot.deleted_image_ids))
    assert len(snapshot.segments) <= 5
    assert nights.num_merged >= 4
    assert 0 < most_deleted <= MOST_DEAD_SHARE * 400  # of the 200 that went
    assert all(nights.path(name).is_file() for name in files)  # what old snapshots name stays


def test_a_night_with_little_new_merges_nothing(nights):
    nights.change(new=60)
    first, _ = nights.run(None)
    nights.change(new=12, gone=1)
    second, built = nights.run(first)
    assert [each.num_vectors for each in second.segments] == [240, 48]
    assert [each.num_dead for each in second.segments] == [SLOTS, 0]
    assert second.segments[0].file_name == first.segments[0].file_name
    assert (nights.num_merged, built.is_new, built.retrained) == (0, True, None)


def test_images_that_are_gone_leave_the_file_when_they_are_a_fifth(nights, tmp_path):
    nights.change(new=50)
    snapshot, _ = nights.run(None)
    nights.change(new=0, gone=list(range(10)))
    snapshot, _ = nights.run(snapshot)
    assert (len(snapshot.deleted_image_ids), nights.num_merged) == (10, 0)
    nights.change(new=0, gone=[10])
    later, built = nights.run(snapshot)
    nights.check(later, tmp_path)
    assert (later.deleted_image_ids.tolist(), nights.num_merged, built.is_new) == ([], 1, False)
    assert (later.segments[0].num_vectors, later.segments[0].end_image_id) == (39 * SLOTS, 50)
    nights.change(new=0, gone=[0 + 11])
    last, _ = nights.run(later)
    assert last.deleted_image_ids.tolist() == [11]  # not those that left before
    nights.check(last, tmp_path)


def test_a_segment_without_a_live_vector_vanishes(nights, tmp_path):
    nights.change(new=40)
    snapshot, _ = nights.run(None)
    nights.change(new=10)
    snapshot, _ = nights.run(snapshot)
    assert len(snapshot.segments) == 2
    nights.change(new=5, gone=list(range(40)))
    snapshot, _ = nights.run(snapshot)
    assert [each.num_vectors for each in snapshot.segments] == [10 * SLOTS, 5 * SLOTS]
    nights.check(snapshot, tmp_path)
    nights.change(new=0, gone=sorted(nights.held))
    snapshot, built = nights.run(snapshot)
    assert (snapshot.segments, snapshot.deleted_image_ids.tolist(), built.num_vectors) == ([], [], 0)
    assert snapshot.codec is not None
    nights.change(new=5)
    snapshot, _ = nights.run(snapshot)
    nights.check(snapshot, tmp_path)


def test_going_on_from_an_older_snapshot_is_right_too(nights, tmp_path):
    """After a rollback the table is far ahead of the base, whose images were merged and deleted meanwhile."""
    nights.change(new=100)
    nights.run(None)
    first, _ = nights.run(None)
    nights.change(new=30, gone=15)
    second, _ = nights.run(first)
    for _ in range(2):
        nights.change(new=40, gone=30)
        newest, _ = nights.run(second)
        second = newest
    for base in (first, newest):
        nights.change(new=3, gone=3)
        snapshot, _ = nights.run(base)
        nights.check(snapshot, tmp_path)


def test_another_codec_is_built_from_the_table_and_says_why(nights, tmp_path):
    nights.change(new=60)
    first, built = nights.run(None)
    assert built.retrained is None
    nights.change(new=10, gone=5)
    nights.wanted = "HR,IVF4,RaBitQ2"
    second, built = nights.run(first)
    assert built.retrained == "HR,IVF,RaBitQ2 takes the place of HR,IVF,RaBitQ4"
    assert (second.codec.wanted, len(second.segments), second.deleted_image_ids.tolist()) == (
        nights.wanted,
        1,
        [],
    )
    assert second.segments[0].first_image_id == 0
    nights.check(second, tmp_path)
    third, built = nights.run(second)
    assert (built.retrained, built.is_new, third.segments) == (None, False, second.segments)


def test_recall_that_fell_has_the_codec_trained_anew_once(nights, tmp_path):
    nights.change(new=60)
    snapshot, _ = nights.run(None)
    codec = snapshot.codec.model_copy(update={"recall_at_50": 0.95})
    nights.change(new=10, gone=10)
    fallen = snapshot.model_copy(update={"codec": codec, "recall_at_50": 0.8})
    after, built = nights.run(fallen)
    assert built.retrained == "recall@50 was 0.950, is 0.800, under 0.9"
    assert (after.codec.recall_at_50, after.codec.num_trained_on, built.is_new) == (None, 60 * SLOTS, True)
    nights.check(after, tmp_path)
    codec = after.codec.model_copy(update={"recall_at_50": 0.8})
    _, built = nights.run(after.model_copy(update={"codec": codec, "recall_at_50": 0.8}))
    assert (built.retrained, built.is_new) == (None, False)


def test_a_task_that_runs_twice_writes_the_same_file(nights):
    nights.change(new=30)
    first, _ = nights.run(None)
    nights.change(new=30, gone=5)
    built = nights.build(first)
    dead = np.array(built.deleted)
    once = _merge(nights.job, built.segments, dead)
    content = nights.path(once["file_name"]).read_bytes()
    assert _merge(nights.job, built.segments, dead) == once
    assert nights.path(once["file_name"]).read_bytes() == content
    assert once["file_name"] not in {each.file_name for each in built.segments}
    merged = merge_small(nights.job, built, cluster=nights.cluster)
    assert [each.model_dump() for each in merged.segments] == [once]


def test_a_merge_that_does_not_add_up_is_not_written(nights):
    nights.change(new=30)
    first, _ = nights.run(None)
    nights.change(new=30, gone=5)
    built = nights.build(first)
    before = sorted(nights.path("").iterdir())
    wrong = built.segments[0].model_copy(update={"num_dead": built.segments[0].num_dead - 1})
    with pytest.raises(StageError, match=r"holds 220 vectors, its parts have 221 live ones; .*--verify"):
        _merge(nights.job, [wrong, *built.segments[1:]], np.array(built.deleted))
    assert sorted(nights.path("").iterdir()) == before


class Died(BaseException):
    """The driver ends here."""


def die_after(number: int, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run's driver dies when this stage has noted so many segments in the draft."""
    noted = itertools.count(1)

    def note(*given: object) -> None:
        write_draft(*given)
        if next(noted) == number:
            raise Died

    monkeypatch.setattr(f"for_ray.stages.{module}.write_draft", note)


def runs_of(segments: list[Segment]) -> list[str]:
    """The run that has written each segment."""
    return [segment.segment_id.partition("-")[0] for segment in segments]


def test_a_build_that_died_is_gone_on_from(nights, tmp_path, monkeypatch):
    """Images come and go meanwhile, and a task may hold more: what is built stays, the rest is cut anew."""
    nights.change(new=400)
    die_after(1 + 2, "build", monkeypatch)
    with pytest.raises(Died):
        nights.build(None, memory_bytes=1 << 16)
    monkeypatch.undo()
    codec_path = next(nights.path("").glob("codec-*"))
    trained = codec_path.stat().st_mtime_ns
    nights.change(new=30, gone=list(range(0, 400, 7)))
    built = nights.build(None, memory_bytes=1 << 17)
    assert runs_of(built.segments).count("run1") == 2
    assert {"run1", "run2"} == set(runs_of(built.segments))
    assert (built.is_new, codec_path.stat().st_mtime_ns) == (True, trained)
    assert 0 < len(built.deleted) < 58
    merged = merge_small(nights.job, built._replace(vectors_per_segment=400), cluster=nights.cluster)
    nights.check(nights.publish(merged), tmp_path)


def test_a_merge_that_died_is_gone_on_from(nights, tmp_path, monkeypatch):
    nights.change(new=240)
    first = nights.publish(nights.build(None, memory_bytes=1 << 16))
    assert len(first.segments) == 3
    nights.change(new=20, gone=list(range(0, 240, 3)))  # a third of each is dead
    built = nights.build(first, most=400)
    die_after(1, "merge", monkeypatch)
    with pytest.raises(Died):
        merge_small(nights.job, built, cluster=nights.cluster)
    monkeypatch.undo()
    again = nights.build(first, most=400)
    assert again.is_new
    assert len(runs_of(again.segments)) == len(built.segments)
    assert runs_of(again.segments).count("run2") == 1 + 1  # what it built, and what it merged
    nights.change(new=0, gone=[1, 100, 200])
    again = nights.build(first, most=400)
    merged = merge_small(nights.job, again, cluster=nights.cluster)
    assert runs_of(merged.segments).count("run2") == 1 + 1
    assert set(runs_of(merged.segments)) == {"run2", "run4"}
    nights.check(nights.publish(merged), tmp_path)


def test_what_died_is_left_alone_where_it_is_not_what_is_wanted(nights, tmp_path, monkeypatch):
    nights.change(new=60)
    first, _ = nights.run(None)
    nights.change(new=60)
    wanted, nights.wanted = nights.wanted, "IVF,Flat"
    die_after(1, "build", monkeypatch)
    with pytest.raises(Died):
        nights.build(first)
    monkeypatch.undo()
    nights.wanted = wanted
    built = nights.build(first)
    assert (built.retrained, built.codec.codec_id) == (None, first.codec.codec_id)
    assert runs_of(built.segments) == ["run1", "run3"]
    snapshot = nights.publish(built)
    nights.check(snapshot, tmp_path)
    nights.change(new=10)
    after = nights.build(snapshot)  # the draft was of the one before
    assert runs_of(after.segments) == ["run1", "run3", "run4"]


def test_a_draft_whose_table_is_lost_is_passed_over(nights, tmp_path):
    nights.change(new=60)
    first, _ = nights.run(None)
    nights.change(new=60)
    nights.build(first)
    nights.change(new=0, gone=[70])
    table.sweep_versions(nights.images.uri, [first.images_version])
    built = nights.build(first)
    assert runs_of(built.segments) == ["run1", "run3"]
    nights.check(nights.publish(built), tmp_path)


def test_a_task_that_fails_leaves_what_the_others_did(nights, tmp_path, monkeypatch):
    """Of three segments the second cannot be written: its place is taken."""
    nights.change(new=240)
    blocked = nights.path("segment-run1-000000000080.faiss")
    blocked.mkdir(parents=True)
    with pytest.raises(StorageError, match="segment-run1-000000000080"):
        nights.build(None, memory_bytes=1 << 16)
    blocked.rmdir()
    built = nights.build(None, memory_bytes=1 << 16)
    assert runs_of(built.segments) == ["run1", "run2", "run1"]
    nights.check(nights.publish(built), tmp_path)


def without_room(stage: str, *, first: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the stage's task that begins with this image, no file takes more bytes, as on a full disk."""

    def run(job: RangeJob, *given: Any) -> Any:
        # Sent to the worker as it stands here, so it names what it needs itself.
        import importlib
        import resource

        task = getattr(importlib.import_module(f"for_ray.stages.{stage}"), f"_{stage}")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if first == (given[1] if stage == "build" else given[0][0].first_image_id):
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            return task(job, *given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(f"for_ray.stages.{stage}._{stage}", run)


def test_a_disk_that_gets_full_in_mid_build_and_mid_merge_costs_one_segment(nights, tmp_path, monkeypatch):
    """Of three tasks the second has no room: the run ends in a line, and the next one does the second."""
    nights.change(new=240)
    size = nights.build(None, memory_bytes=1 << 16).segments[1].num_bytes
    nights.path("draft").unlink()
    without_room("build", first=80, num_bytes=size - 1, monkeypatch=monkeypatch)
    with pytest.raises(StorageError, match=r"cannot write segment \S+-000000000080\.faiss: .*; free space"):
        nights.build(None, memory_bytes=1 << 16)
    monkeypatch.undo()
    assert list(nights.path("").glob("*run2-000000000080*")) == []
    built = nights.build(None, memory_bytes=1 << 16)
    assert runs_of(built.segments) == ["run2", "run3", "run2"]
    first = nights.publish(built)
    nights.check(first, tmp_path)

    nights.change(new=0, gone=list(range(0, 240, 3)))  # a third of each is dead
    built = nights.build(first, most=400)
    without_room("merge", first=80, num_bytes=size // 2, monkeypatch=monkeypatch)
    with pytest.raises(
        StorageError, match=r"cannot write segment \S+-000000000080-\d+\.faiss: .*; free space"
    ):
        merge_small(nights.job, built, cluster=nights.cluster)
    monkeypatch.undo()
    assert list(nights.path("").glob("*run4-000000000080*")) == []
    again = nights.build(first, most=400)
    assert runs_of(again.segments) == ["run4", "run3", "run4"]
    merged = merge_small(nights.job, again, cluster=nights.cluster)
    assert runs_of(merged.segments) == ["run4", "run5", "run4"]
    nights.check(nights.publish(merged), tmp_path)
