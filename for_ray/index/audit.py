"""What is wrong with a published snapshot: its record, its rows and its segments against each other.

Nothing here stops at a fault. What may be wrong with millions of rows is counted by kind with one example
(`faults.py`), so that a report has a line for each kind; what is wrong with a file has a line of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ForRayError
from for_ray.index.audit_files import fetch_part, read_vector_ids
from for_ray.index.audit_rows import Rows, name_of, read_ids, read_rows
from for_ray.index.faults import MEND_SEGMENTS, Faults
from for_ray.index.table import require_table
from for_ray.schema import Codec, Layout, Segment, Snapshot, image_ids_of, slots_of
from for_ray.storage import is_s3, shown


@dataclass(frozen=True)
class AuditJob:
    """What every check of a range has to know.

    Attributes:
        index_uri: The index.
        fingerprint: The encoder's.
        version: Of the table, the snapshot's; None: it cannot be opened.
        latest_version: Of the table, where the snapshot's images must be; None: it may hold anything.
        codec: None where there are no segments.
        broken: Fragments of the table's version that have a file which cannot be read.
    """

    index_uri: str
    fingerprint: str
    version: int | None
    latest_version: int | None
    codec: Codec | None
    broken: frozenset[int] = frozenset()

    @property
    def layout(self) -> Layout:
        """The uris of the index."""
        return Layout(self.index_uri)

    def open_table(self, version: int | None) -> Any:
        """The table at a version."""
        return require_table(self.layout.images_uri(self.fingerprint), version=version)


class AuditRange(NamedTuple):
    """Images with `first` <= id < `end`, and the segments that have their vectors: one, as a rule."""

    first: int
    end: int
    segments: tuple[Segment, ...]


@dataclass
class RangeAudit:
    """What a range of the table holds, and what is wrong with it and its segments.

    Attributes:
        is_read: Whether all its rows could be read.
        problems: A line for each thing that is wrong with a file.
        unsound: Ids of segments that cannot be searched.
    """

    num_indexed: int = 0
    num_quarantined: int = 0
    num_vectors: int = 0
    is_read: bool = True
    faults: Faults = field(default_factory=Faults)
    problems: list[str] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)

    def merge(self, other: RangeAudit) -> None:
        """Add what another task found."""
        self.num_indexed += other.num_indexed
        self.num_quarantined += other.num_quarantined
        self.num_vectors += other.num_vectors
        self.is_read = self.is_read and other.is_read
        self.faults.merge(other.faults)
        self.problems += [each for each in other.problems if each not in self.problems]
        self.unsound += other.unsound


def plan_ranges(segments: Sequence[Segment], end: int, *, images_a_range: int) -> list[AuditRange]:
    """Cut all image ids into ranges: one for each segment, and what lies between in pieces.

    Segments whose ranges overlap, which they must not, share one.

    Args:
        segments: Of a snapshot, in any order.
        end: Behind the table's last image id.
        images_a_range: Ids in a range without a segment, at most.
    """
    groups: list[AuditRange] = []
    for segment in sorted(segments, key=lambda each: each.first_image_id):
        own = AuditRange(segment.first_image_id, segment.end_image_id, (segment,))
        if groups and own.first < groups[-1].end:
            last = groups.pop()
            own = AuditRange(last.first, max(last.end, own.end), last.segments + own.segments)
        groups.append(own)
    ranges: list[AuditRange] = []
    first = 0
    for group in [*groups, AuditRange(end, end, ())]:
        cuts = [*range(first, group.first, images_a_range), group.first]
        ranges += [AuditRange(low, high, ()) for low, high in itertools.pairwise(cuts)]
        ranges += [group] if group.segments else []
        first = max(first, group.end)
    return ranges


def audit_record(snapshot: Snapshot) -> list[str]:
    """What a snapshot's record says against itself."""
    name = f"snapshot {snapshot.snapshot_id}"
    in_order = sorted(snapshot.segments, key=lambda each: each.first_image_id)
    problems = [
        f"{name}: segments {one.segment_id} and {other.segment_id} both claim the images "
        f"{other.first_image_id} to {min(one.end_image_id, other.end_image_id) - 1}; {MEND_SEGMENTS}"
        for one, other in itertools.pairwise(in_order)
        if other.first_image_id < one.end_image_id
    ]
    codec_id = snapshot.codec.codec_id if snapshot.codec else "none"
    problems += [
        f"{name}: segment {segment.segment_id} is of codec {segment.codec_id}, expected {codec_id}; "
        f"{MEND_SEGMENTS}"
        for segment in snapshot.segments
        if segment.codec_id != codec_id
    ]
    num_live = sum(segment.num_live for segment in snapshot.segments)
    if num_live != snapshot.num_vectors:
        problems.append(
            f"{name}: its segments have {num_live:,} vectors that searches may find, the record says "
            f"{snapshot.num_vectors:,}; {MEND_SEGMENTS}"
        )
    if snapshot.indexed + snapshot.quarantined > snapshot.listed:
        problems.append(
            f"{name}: {snapshot.indexed:,} images indexed and {snapshot.quarantined:,} quarantined are more "
            f"than the {snapshot.listed:,} listed; run jobs/index.py again"
        )
    return problems


def audit_counts(snapshot: Snapshot, found: RangeAudit, table: str) -> list[str]:
    """Where the snapshot's counts are not those of its table; not asked where rows could not be read."""
    if not found.is_read:
        return []
    return [
        f"{table} has {count:,} {name}, snapshot {snapshot.snapshot_id} says {said:,}; go back to a sound "
        "snapshot (--rollback), or run jobs/index.py again when images have changed"
        for name, count, said in (
            ("indexed images", found.num_indexed, snapshot.indexed),
            ("quarantined images", found.num_quarantined, snapshot.quarantined),
            ("vectors", found.num_vectors, snapshot.num_vectors),
        )
        if count != said
    ]


def audit_range(job: AuditJob, part: AuditRange, *, deleted: NDArray[np.int64], folder: Path) -> RangeAudit:
    """Check the rows of a range, the files of its segments, and each against the other.

    Memory: a batch of rows, 24 bytes an image of the range, and 40 bytes a vector of its segments.

    Args:
        job: The snapshot.
        part: Which images.
        deleted: Ids in the range that the snapshot calls deleted; ascending.
        folder: For segments of a bucket, one at a time.
    """
    found = RangeAudit()
    rows = _audit_rows(job, part, found, deleted=deleted)
    ids = [_audit_segment(job, segment, rows, found, folder=folder) for segment in part.segments]
    whole = [each for each in ids if each is not None]
    if rows is not None:
        _compare(rows, whole, found, deleted=deleted, is_whole=len(whole) == len(ids))
    return found


def _audit_rows(
    job: AuditJob, part: AuditRange, found: RangeAudit, *, deleted: NDArray[np.int64]
) -> Rows | None:
    """Check the rows of a range; None where they cannot be read."""
    found.is_read = False
    if job.version is None:
        return None
    try:
        rows = read_rows(job.open_table(job.version), part.first, part.end, broken=job.broken)
        latest = rows.all_ids
        if job.latest_version not in (None, job.version):
            latest = read_ids(job.open_table(job.latest_version), part.first, part.end)
    except ForRayError as error:
        found.problems.append(str(error))
        return None
    found.num_indexed, found.num_quarantined = rows.num_indexed, rows.num_quarantined
    found.num_vectors, found.is_read = rows.num_vectors, not rows.num_unread
    found.faults.merge(rows.faults)
    undead, dropped = np.intersect1d(deleted, rows.all_ids), np.setdiff1d(rows.all_ids, latest)
    for kind, image_ids in (("undead", undead), ("dropped", dropped)):
        if len(image_ids):
            found.faults.add(kind, len(image_ids), f"image {image_ids[0]}")
    return rows


def _audit_segment(
    job: AuditJob, segment: Segment, rows: Rows | None, found: RangeAudit, *, folder: Path
) -> NDArray[np.int64] | None:
    """Check a segment's file and its record; the vector ids in its range, or None where it cannot be read."""
    uri = job.layout.segment_uri(job.fingerprint, segment.file_name)
    try:
        path = fetch_part(job.layout, job.fingerprint, segment, folder)
        vector_ids = read_vector_ids(path, job.layout, job.fingerprint, job.codec)
    except ForRayError as error:
        found.problems.append(str(error))
        found.unsound.append(segment.segment_id)
        return None
    finally:
        if is_s3(uri):
            (folder / segment.file_name).unlink(missing_ok=True)
    said = _compare_record(segment, vector_ids, rows)
    found.problems += [f"{shown(uri)} holds {each}; {MEND_SEGMENTS}" for each in said]
    return vector_ids[_is_inside(segment, vector_ids)]


def _is_inside(segment: Segment, vector_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    image_ids = image_ids_of(vector_ids)
    return (image_ids >= segment.first_image_id) & (image_ids < segment.end_image_id)


def _compare_record(segment: Segment, vector_ids: NDArray[np.int64], rows: Rows | None) -> list[str]:
    """What a segment holds that its record does not say."""
    problems = []
    if len(vector_ids) != segment.num_vectors:
        problems.append(f"{len(vector_ids):,} vectors, the snapshot says {segment.num_vectors:,}")
    is_inside = _is_inside(segment, vector_ids)
    if not is_inside.all():
        problems.append(
            f"vectors of images outside its range of {segment.first_image_id} to {segment.end_image_id - 1}, "
            f"which belong to another segment or to none: {np.count_nonzero(~is_inside):,} "
            f"({name_of(vector_ids[np.argmin(is_inside)])})"
        )
    if rows is not None:
        is_dead = ~np.isin(image_ids_of(vector_ids), rows.all_ids) & is_inside
        if (num_dead := int(np.count_nonzero(is_dead))) != segment.num_dead:
            problems.append(
                f"{num_dead:,} vectors of images that are not in the table, the snapshot says "
                f"{segment.num_dead:,}"
            )
    return problems


def _compare(
    rows: Rows,
    segments: Sequence[NDArray[np.int64]],
    found: RangeAudit,
    *,
    deleted: NDArray[np.int64],
    is_whole: bool,
) -> None:
    """Each vector of the rows is in one segment, once; segments have no others but those of deleted images.

    Args:
        rows: Of the range.
        segments: The vector ids of its segments.
        found: Takes what is wrong.
        deleted: Image ids; ascending.
        is_whole: Whether all segments of the range could be read.
    """
    vector_ids = np.sort(np.concatenate([np.empty(0, np.int64), *segments]))
    is_again = np.zeros(len(vector_ids), bool)
    is_again[1:] = vector_ids[1:] == vector_ids[:-1]
    _tell(found, "doubled", vector_ids[is_again])
    vector_ids = vector_ids[~is_again]
    image_ids = image_ids_of(vector_ids)
    # Of an image in a file that cannot be read the id is known, but not how many slots it has.
    is_known = np.isin(image_ids, rows.all_ids) | np.isin(image_ids, deleted)
    _tell(found, "orphaned", vector_ids[~is_known])
    if not len(rows.image_ids):
        return
    position = np.minimum(np.searchsorted(rows.image_ids, image_ids), len(rows.image_ids) - 1)
    is_read = rows.image_ids[position] == image_ids
    position, vector_ids = position[is_read], vector_ids[is_read]
    is_slot = slots_of(vector_ids) < rows.counts[position]
    _tell(found, "slots", vector_ids[~is_slot])
    if is_whole:
        lacks = rows.counts - np.bincount(position[is_slot], minlength=len(rows.counts))
        if lacks.any():
            found.faults.add("unindexed", int(lacks.sum()), f"image {rows.image_ids[np.argmax(lacks > 0)]}")


def _tell(found: RangeAudit, kind: str, vector_ids: NDArray[np.int64]) -> None:
    if len(vector_ids):
        found.faults.add(kind, len(vector_ids), name_of(vector_ids[0]))
