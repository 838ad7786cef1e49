"""Audit: a published snapshot from end to end, read only; what `jobs/index.py --verify` runs.

One Ray task for each segment and the rows of its range, so that memory is that of one segment; the driver
holds counts. No check stops at what it finds, nothing is listed, and no lease is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import DataError, ForRayError
from for_ray.index import snapshots
from for_ray.index.audit import (
    AuditJob,
    AuditRange,
    RangeAudit,
    audit_counts,
    audit_range,
    audit_record,
    plan_ranges,
)
from for_ray.index.audit_files import check_codec, fetch_checked, find_broken
from for_ray.index.audit_rows import end_of_ids, find_doubled
from for_ray.index.faults import MEND_SEGMENTS
from for_ray.index.table import require_table, take_vectors, version_of
from for_ray.model.bundle import open_bundle
from for_ray.schema import Layout, Segment, Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.ranges import RangeJob
from for_ray.stages.verify import SAMPLED_VECTORS, measure_recall
from for_ray.storage import shown, temporary_folder

IMAGES_A_RANGE = 50_000
"""Image ids that one task looks at where no segment says how many."""

BYTES_A_VECTOR, BYTES_A_TASK = 40, 256 << 20
"""What a task needs of memory: for each vector of its segment, and besides."""

NUM_QUERIES = 64
"""Stored vectors that recall is measured with where no queries are given."""

RECALL_TOLERANCE, SAMPLE_TOLERANCE = 0.02, 0.05
"""By how much recall may be below what the snapshot says: images have gone since it was measured. More where
it is measured over a sample: what the snapshot says is of the night when its codec was trained, when there
were other segments, and another sample of them."""

TASK_RETRIES = 3


def audit_index(
    layout: Layout,
    snapshot: Snapshot,
    *,
    cluster: Cluster,
    queries: NDArray[np.float32] | None,
    cache_path: Path,
    on_progress: Callable[[int], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Check what a snapshot names, and what its parts say of each other.

    Args:
        layout: The index.
        snapshot: A published one.
        cluster: Where the tasks run.
        queries: What recall is measured with: [Q, D], unit length; stored vectors where None.
        cache_path: For what is compared on this disk, and for segments of a bucket; the caller removes it.
        on_progress: Called with the number of images whose rows were looked at.
        on_note: Called with what is worth knowing and not wrong.

    Returns:
        A line for each thing that is wrong, and what to do; none where all is sound.

    Raises:
        StorageError: The store refused.
        StageError: A worker died again and again.
    """
    return _Audit(layout, snapshot, cluster=cluster, folder=cache_path, on_note=on_note).run(
        queries, on_progress
    )


class _Audit:
    """One audit, and what it found so far."""

    def __init__(
        self,
        layout: Layout,
        snapshot: Snapshot,
        *,
        cluster: Cluster,
        folder: Path,
        on_note: Callable[[str], None],
    ) -> None:
        self.layout, self.snapshot, self.cluster, self.folder = layout, snapshot, cluster, folder
        self.on_note = on_note
        self.table_uri = layout.images_uri(snapshot.fingerprint)
        self.table_name = f"version {snapshot.images_version} of {shown(self.table_uri)}"
        self.problems: list[str] = []
        self.found = RangeAudit()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, queries: NDArray[np.float32] | None, on_progress: Callable[[int], None]) -> list[str]:
        """All checks, the cheap ones first; what is wrong."""
        is_newest = True
        with self._tells():
            is_newest = self._read_snapshots()
        with self._tells():
            _check_bundle(self.layout, self.snapshot.fingerprint, self.folder)
        if self.snapshot.codec is not None:
            with self._tells():
                check_codec(self.layout, self.snapshot.fingerprint, self.snapshot.codec, self.folder)
        self.problems += audit_record(self.snapshot)
        images = latest = None
        with self._tells():
            images = require_table(self.table_uri, version=self.snapshot.images_version)
        with self._tells():
            latest = require_table(self.table_uri)
        job = self._plan(images, latest if is_newest else None)
        self._audit_ranges(job, images, on_progress)
        self.problems += self.found.problems
        self.problems += audit_counts(self.snapshot, self.found, self.table_name)
        self.problems += self.found.faults.lines(self.table_name)
        if images is not None:
            with self._tells():
                self._check_recall(images, queries)
        return self.problems

    @contextmanager
    def _tells(self) -> Iterator[None]:
        """What the block refuses becomes a problem."""
        try:
            yield
        except ForRayError as error:
            self.problems.append(str(error))

    def _read_snapshots(self) -> bool:
        """Read all records; whether no snapshot of the encoder is of a newer version of the table."""
        own = snapshots.list_snapshots(self.layout, fingerprint=self.snapshot.fingerprint)
        return max(each.images_version for each in own) <= self.snapshot.images_version

    def _plan(self, images: Any, latest: Any) -> AuditJob:
        """Look at the table's files and uris, which is the driver's part; what the tasks have to know."""
        broken: frozenset[int] = frozenset()
        if images is not None:
            problems, broken = find_broken(images)
            self.problems += problems
            self._find_doubled(images, "twice", ["uri"], broken=broken)
        if latest is not None and version_of(latest) != self.snapshot.images_version:
            self.on_note(
                f"the table is at version {version_of(latest)}, the snapshot at "
                f"{self.snapshot.images_version}: a run is under way or has died, or rewrote files only"
            )
            _, unread = find_broken(latest)
            self._find_doubled(latest, "twice_later", ["uri", "etag", "is_quarantined"], broken=unread)
        return AuditJob(
            index_uri=self.layout.index_uri,
            fingerprint=self.snapshot.fingerprint,
            version=None if images is None else self.snapshot.images_version,
            latest_version=None if latest is None else version_of(latest),
            codec=self.snapshot.codec,
            broken=broken,
        )

    def _find_doubled(self, images: Any, kind: str, keys: list[str], *, broken: frozenset[int]) -> None:
        with self._tells(), tempfile.TemporaryDirectory(dir=self.folder) as folder:
            doubled = find_doubled(images, Path(folder), keys=keys, broken=broken)
            if doubled is not None:
                self.found.faults.add(kind, *doubled)

    def _audit_ranges(self, job: AuditJob, images: Any, on_progress: Callable[[int], None]) -> None:
        end = 0
        if images is not None:
            with self._tells():
                end = end_of_ids(images)
        ranges = plan_ranges(self.snapshot.segments, end, images_a_range=IMAGES_A_RANGE)
        deleted = np.sort(np.asarray(self.snapshot.deleted_image_ids, np.int64))
        _ = self.cluster.resources
        with failures("verify"):
            waiting = [self._start(job, part, deleted) for part in ranges]
            while waiting:
                done, waiting = ray.wait(waiting, timeout=10)
                for audit in ray.get(done):
                    self.found.merge(audit)
                on_progress(self.found.num_indexed + self.found.num_quarantined)

    def _start(self, job: AuditJob, part: AuditRange, deleted: NDArray[np.int64]) -> Any:
        num_vectors = sum(segment.num_vectors for segment in part.segments)
        wanted = BYTES_A_TASK + BYTES_A_VECTOR * num_vectors
        memory = min(wanted, self.cluster.task_memory_bytes)
        task = ray.remote(_audit_range).options(num_cpus=1, memory=memory, max_retries=TASK_RETRIES)
        low, high = np.searchsorted(deleted, [part.first, part.end])
        return task.remote(job, part, deleted[low:high])

    def _check_recall(self, images: Any, queries: NDArray[np.float32] | None) -> None:
        """Measure recall over the segments that can be searched, where all rows can be read."""
        said, unsound = self.snapshot.recall_at_50, set(self.found.unsound)
        segments = [each for each in self.snapshot.segments if each.segment_id not in unsound]
        if said is None or not segments:
            return
        if not self.found.is_read:
            self.on_note("recall was not measured: not all rows of the table can be read")
            return
        if queries is None:
            queries = _draw_queries(images)
        job = RangeJob(
            index_uri=self.layout.index_uri,
            fingerprint=self.snapshot.fingerprint,
            version=self.snapshot.images_version,
            run_id="",
        )
        with failures("verify"):
            measured = measure_recall(
                self.cluster,
                job,
                segments,
                queries,
                deleted=np.sort(np.asarray(self.snapshot.deleted_image_ids, np.int64)),
                nprobe=self.snapshot.nprobe,
                target=0.0,  # at this nprobe alone
                cache_path=self.folder,
            )
        if measured.recall is not None and measured.recall < said - _tolerance(segments):
            self.problems.append(
                f"recall at 50 is {measured.recall:.3f} with {measured.nprobe} lists looked at, snapshot "
                f"{self.snapshot.snapshot_id} says {said:.3f}; {MEND_SEGMENTS}"
            )


def _tolerance(segments: Sequence[Segment]) -> float:
    is_sampled = sum(each.num_vectors for each in segments) > SAMPLED_VECTORS
    return SAMPLE_TOLERANCE if is_sampled else RECALL_TOLERANCE


def _audit_range(job: AuditJob, part: AuditRange, deleted: NDArray[np.int64]) -> RangeAudit:
    with temporary_folder() as folder:
        return audit_range(job, part, deleted=deleted, folder=folder)


def _check_bundle(layout: Layout, fingerprint: str, folder: Path) -> None:
    """Raise unless the encoder is there, and is the one that the snapshot was made with.

    Raises:
        ConfigError: It is no encoder any more, or incomplete.
        DataError: A file of it is another.
        StorageError: The store refused.
    """
    uri = layout.bundle_uri(fingerprint)
    restore = f"copy the encoder to {shown(uri)} again: searches need it"
    try:
        bundle = open_bundle(uri, allow_untrained=True)
        for file_uri, sha256 in (
            (bundle.weights_uri, bundle.config.weights_sha256),
            (bundle.head_uri, bundle.config.head_sha256),
        ):
            if file_uri is not None and sha256 is not None:
                fetch_checked(file_uri, sha256, folder)
    except ForRayError as error:
        raise type(error)(f"{error}; {restore}") from error
    if bundle.fingerprint != fingerprint:
        raise DataError(
            f"{shown(uri)} is the encoder {bundle.fingerprint}, the snapshot is of {fingerprint}; {restore}"
        )


def _draw_queries(images: Any) -> NDArray[np.float32]:
    """The first vectors of images that lie evenly in the table; [Q, D], unit length."""
    ids = np.unique(np.linspace(0, end_of_ids(images) - 1, 2 * NUM_QUERIES).astype(np.int64))
    held = take_vectors(images, ids)
    firsts = held.offsets[:-1][np.diff(held.offsets) > 0]
    return held.vectors[firsts[:NUM_QUERIES]].astype(np.float32)
