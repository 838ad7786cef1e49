"""What is carried over from a base: its segments as the table sees them now, without a Ray in sight."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from for_ray.index import table
from for_ray.schema import Codec, Layout, Segment, Snapshot, images_schema
from for_ray.stages.build import _described, _from_snapshot, _Kept
from for_ray.stages.ranges import RangeJob

SCHEMA = images_schema(2)


def segment(first: int, end: int, *, num_vectors: int, num_dead: int = 0) -> Segment:
    return Segment(
        segment_id=f"{first}",
        codec_id="c",
        file_name=f"segment-{first}.faiss",
        sha256="0",
        num_bytes=1,
        num_vectors=num_vectors,
        first_image_id=first,
        end_image_id=end,
        num_dead=num_dead,
    )


class Nights:
    """A table that changes, and snapshots of it; every image has two vectors, every fifth none.

    Args:
        index: The index's folder.
    """

    def __init__(self, index: Path) -> None:
        self.layout = Layout(str(index))
        self.images = table.create_table(self.layout.images_uri("f"), SCHEMA)

    def add(self, count: int) -> None:
        counts = [0 if number % 5 == 0 else 2 for number in range(count)]
        columns = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
        columns["uri"] = pa.array([str(number) for number in range(count)])
        for name, value in (("vectors", [0, 1]), ("boxes", [0, 0, 1, 1])):
            columns[name] = pa.array([[value] * each for each in counts], SCHEMA.field(name).type)
        rows = pa.table(columns, schema=SCHEMA)
        self.images = table.append(self.images, table.write_fragments(rows, self.images.uri))

    def delete(self, *image_ids: int) -> None:
        self.images = table.open_table(self.images.uri)
        table.delete_images(self.images, np.array(image_ids))
        self.images = table.open_table(self.images.uri)

    def publish(self, segments: list[Segment], deleted: list[int]) -> Snapshot:
        return Snapshot(
            snapshot_id=1,
            created_at=datetime.datetime.now(datetime.UTC),
            fingerprint="f",
            images_version=table.version_of(self.images),
            codec=None,
            segments=segments,
            deleted_image_ids=deleted,
            nprobe=1,
            listed=1,
            indexed=1,
            quarantined=0,
            num_vectors=sum(each.num_live for each in segments),
            recall_at_50=None,
        )

    def carry_over(self, base: Snapshot) -> tuple[list[int], list[int]]:
        """The dead of each segment, and the ids of dead images."""
        job = RangeJob(self.layout.index_uri, "f", table.version_of(self.images), "run")
        kept: Any = _from_snapshot(job.open_table(), base)
        assert [each.model_copy(update={"num_dead": 0}) for each in kept.segments] == [
            each.model_copy(update={"num_dead": 0}) for each in base.segments[: len(kept.segments)]
        ]
        return [each.num_dead for each in kept.segments], kept.deleted.tolist()


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Images 0 to 29."""
    made = Nights(tmp_path)
    made.add(30)
    return made


SEGMENTS = [segment(0, 10, num_vectors=16), segment(10, 20, num_vectors=16), segment(20, 30, num_vectors=16)]


def test_the_dead_are_counted_where_they_lie(nights):
    base = nights.publish(SEGMENTS, [])
    assert nights.carry_over(base) == ([0, 0, 0], [])
    nights.delete(1, 9, 10, 11, 29)  # 10 has no vectors
    nights.add(5)
    assert nights.carry_over(base) == ([4, 2, 2], [1, 9, 11, 29])


def test_night_after_night_only_what_is_new_is_counted(nights):
    base, counts = nights.publish(SEGMENTS, []), [0, 0, 0]
    for gone in ([1], [2, 11], [12], [], [22, 23, 3]):
        nights.delete(*gone) if gone else None
        counts, deleted = nights.carry_over(base)
        segments = [
            each.model_copy(update={"num_dead": count}) for each, count in zip(SEGMENTS, counts, strict=True)
        ]
        base = nights.publish(segments, deleted)
    assert counts == [6, 4, 4]
    assert base.deleted_image_ids.tolist() == [1, 2, 3, 11, 12, 22, 23]


def test_what_was_merged_away_does_not_come_back(nights):
    """Images 1, 2 and 11 left the files of a merged segment; its range still covers their ids."""
    nights.delete(1, 2, 11)
    base = nights.publish([segment(0, 20, num_vectors=26), SEGMENTS[2]], [])
    assert nights.carry_over(base) == ([0, 0], [])
    nights.delete(3, 21)
    assert nights.carry_over(base) == ([2, 2], [3, 21])


def test_what_vanished_or_came_later_is_nobodys_dead(nights):
    nights.delete(*range(10, 20))
    base = nights.publish([SEGMENTS[0], SEGMENTS[2]], [])
    nights.add(5)
    nights.delete(33, 7, 20)  # 20 has no vectors
    assert nights.carry_over(base) == ([2, 0], [7])


def test_going_on_from_an_older_snapshot(nights):
    """After a rollback the base is two nights old, and has its own dead."""
    nights.delete(1)
    old = nights.publish([segment(0, 30, num_vectors=48, num_dead=2)], [1])
    nights.delete(2, 3)
    nights.publish([segment(0, 30, num_vectors=42)], [])  # merged: of no concern
    nights.add(10)
    nights.delete(4, 31)
    assert nights.carry_over(old) == ([8], [1, 2, 3, 4])


def test_a_snapshot_that_does_not_count_its_dead_is_built_again(nights):
    nights.delete(1, 2)
    base = nights.publish(SEGMENTS, [1, 2]).model_copy(update={"num_vectors": 44})
    assert nights.carry_over(base) == ([], [])


def test_a_codec_keeps_what_its_lists_were_like_at_first():
    trained = Codec(
        codec_id="c",
        file_name="f",
        sha256="0",
        num_bytes=1,
        factory="IVF8,SQ8",
        dim=2,
        nlist=8,
        num_trained_on=9,
        wanted="IVF8,SQ8",
    )
    few, many, more = (
        segment(0, 9, num_vectors=count).model_copy(update={"imbalance": imbalance})
        for count, imbalance in ((900, 1.2), (50_000, 1.5), (90_000, 4.0))
    )
    young = _described(trained, [few], wanted="IVF8,SQ8")
    assert (young.wanted, young.imbalance) == ("IVF8,SQ8", None)
    grown = _described(young, [many], wanted=None)
    assert grown.wanted is None
    assert grown.imbalance == pytest.approx(1.5, abs=0.001)
    assert _described(grown, [many, more], wanted=None) == grown


def test_a_base_whose_table_is_lost_is_built_again(nights):
    base = nights.publish(SEGMENTS, [])
    nights.delete(1)
    assert nights.carry_over(base) == ([2, 0, 0], [1])
    table.sweep_versions(nights.images.uri, [])
    assert nights.carry_over(base) == ([], [])


def test_what_no_segment_covers_is_to_be_built():
    def gaps(first_new: int, *spans: tuple[int, int]) -> list[tuple[int, int | None]]:
        segments = [segment(*each, num_vectors=1) for each in spans]
        return _Kept(None, segments, np.empty(0, np.int64), first_new).gaps()

    assert gaps(0) == [(0, None)]
    assert gaps(30, (0, 10), (20, 30)) == [(30, None)]  # of the base: nothing is left between its segments
    assert gaps(10, (0, 10), (20, 30), (30, 40), (50, 60)) == [(10, 20), (40, 50), (60, None)]
    assert gaps(10, (0, 20), (30, 40)) == [(20, 30), (40, None)]  # merged with one of the base
