"""The index job from its first write on: what the diff found becomes a published snapshot.

    encode → build → merge → verify → publish → sweep

Changed and gone images leave the table when what takes their place is there; a uri that a dead run leaves
twice is found by the next diff. An image that was replaced again before it was read leaves, too: its row is
of something that the bucket holds no longer, and the next run encodes what it finds. Searches see none of it,
since they stay with a published version.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from for_ray.config import IndexSettings
from for_ray.errors import ForRayError, StorageError
from for_ray.index import snapshots, table
from for_ray.index.growth import is_measured_for
from for_ray.model.bundle import Bundle
from for_ray.pipeline.encoding import encode_gap
from for_ray.pipeline.index_report import Findings
from for_ray.pipeline.queries import recall_queries
from for_ray.schema import Layout, Snapshot, images_schema
from for_ray.stages.cluster import Cluster
from for_ray.stages.diff import Gap, write_gap
from for_ray.stages.failures import failures
from for_ray.stages.listing import Listing
from for_ray.stages.progress import Progress
from for_ray.stages.run_report import sweep_reports
from for_ray.stages.sweep import sweep
from for_ray.storage import Lease, delete_tree, join_uri, upload

# Ray and torch take seconds to import: a run that finds nothing to do is done before.
if TYPE_CHECKING:
    from for_ray.stages.blocks import EncodeCounts
    from for_ray.stages.built import Built
    from for_ray.stages.ranges import RangeJob
    from for_ray.stages.verify import Recall


@dataclass(frozen=True)
class IndexWriter:
    """One run's writing half; the methods are its stages.

    Attributes:
        settings: Of the job.
        layout: The index.
        bundle: The encoder.
        run_id: Goes into the names of what it writes.
        base: The snapshot of this encoder to go on from; None for the first.
        wanted_codec: The factory string that the user asked for; None: the plan's.
        cluster: Where the tasks run.
        lease: Checked before whatever others see.
        progress: Where the stages are told.
        folder: On this disk; the caller removes it.
        found: What the report will say; filled on the way.
    """

    settings: IndexSettings
    layout: Layout
    bundle: Bundle
    run_id: str
    base: Snapshot | None
    wanted_codec: str | None
    cluster: Cluster
    lease: Lease
    progress: Progress
    folder: Path
    found: Findings

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.bundle.fingerprint

    def write(self, listing: Listing, gap: Gap, images: Any) -> str:
        """Encode, build, merge, verify, publish, sweep; what to say of it.

        Args:
            listing: All images.
            gap: Between them and the table.
            images: The table at its latest version; None where there is none yet.

        Raises:
            StageError: A stage failed. What was committed stays; nothing was published.
        """
        try:
            images, counts = self._close(listing, gap, images)
            built = self._build(images)
            recall = self._verify(listing, images, built, num_skipped=counts.skipped)
            with failures("publish"):
                self.lease.check()
                snapshot = snapshots.publish(self.layout, self._snapshot(listing, images, built, recall))
        finally:
            with contextlib.suppress(StorageError):  # the next run that publishes sweeps it away
                delete_tree(self.layout.work_uri(self.run_id))
        self.found.snapshot, self.found.has_published = snapshot, True
        return self._told(snapshot, built) + counts.told + self._sweep()

    def _told(self, snapshot: Snapshot, built: Built) -> str:
        message = f"published snapshot {snapshot.snapshot_id}"
        if built.retrained:
            message += f"; the codec was trained anew: {built.retrained}"
        return message

    def _close(self, listing: Listing, gap: Gap, images: Any) -> tuple[Any, EncodeCounts]:
        """The table without the gap, and what came out."""
        with failures("encode"):
            images = self._prepare(listing, gap, images)
        images, counts = self._encode(images, listing, gap)
        with failures("encode"):
            # After their successors are there: a run that is refused, or dies, has lost nothing.
            for ids in itertools.chain(gap.changed_image_ids(), gap.gone_image_ids()):
                self.lease.check()
                table.delete_images(images, ids)
            images = table.compact(images, rows=self._small_file_rows, check=self.lease.check)
        self.found.images, self.found.num_skipped = images, counts.skipped
        return images, counts

    def _sweep(self) -> str:
        keep = self.settings
        try:
            with self.progress.stage("sweep", unit="files") as update:
                swept = sweep(
                    self.layout, self.lease, keep_snapshots=keep.keep_snapshots, keep_days=keep.keep_days
                )
                sweep_reports(self.layout)
                update(swept.num_files)
        except ForRayError as error:  # the snapshot is out: what lies about is the next run's to sweep
            return f"; sweeping failed: {error}"
        return ""

    @property
    def _small_file_rows(self) -> int:
        """Rows of a table's file that are too few: a quarter of what the encode stage makes at most."""
        from for_ray.stages.blocks import FRAGMENT_BYTES

        row_bytes = 2 * self.bundle.num_slots * self.bundle.dim
        return max(1, min(8192, FRAGMENT_BYTES // row_bytes) // 4)

    def _prepare(self, listing: Listing, gap: Gap, images: Any) -> Any:
        """What the workers need: the encoder, a table with all columns, and the gap; the table."""
        self.lease.check()
        self.bundle.save(self.layout.bundle_uri(self.fingerprint))
        if images is None:
            table_uri = self.layout.images_uri(self.fingerprint)
            images = table.create_table(table_uri, images_schema(self.bundle.dim, listing.metadata))
        table.add_missing_columns(images, listing.metadata)
        for uri in gap.file_uris:
            upload(Path(uri), join_uri(self.layout.work_uri(self.run_id), Path(uri).name))
        return images

    def _encode(self, images: Any, listing: Listing, gap: Gap) -> tuple[Any, EncodeCounts]:
        """The table with the new rows, and what came out."""
        from for_ray.stages.blocks import EncodeCounts, EncodeJob
        from for_ray.stages.encode import choose_pool
        from for_ray.stages.verify import check_readable

        num_images, settings, counts = gap.num_to_encode, self.settings, EncodeCounts()
        started = time.monotonic()
        if num_images:
            job = EncodeJob.of(
                self.bundle,
                self.layout.bundle_uri(self.fingerprint),
                images,
                device=settings.device,
                batch_size=settings.batch_size,
                read_threads=settings.read_threads,
            )
            pool = choose_pool(
                self.cluster.resources,
                num_batches=-(-num_images // settings.batch_size),
                min_actors=settings.min_actors,
                max_actors=settings.max_actors,
                device=settings.device,
            )
            with self._stage("encode", total=num_images) as update:
                encoded = encode_gap(
                    images,
                    gap,
                    work_uri=self.layout.work_uri(self.run_id),
                    folder=self.folder / secrets.token_hex(4),
                    job=job,
                    pool=pool,
                    commit_seconds=settings.commit_seconds,
                    most_bad=settings.max_bad_fraction * listing.num_listed - gap.num_quarantined,
                    lease=self.lease,
                    on_progress=update,
                )
            images, counts, self.found.work = encoded.table, encoded.counts, encoded.work
            self.found.images, self.found.num_skipped = images, counts.skipped
            self.found.images_per_second = counts.stored / (time.monotonic() - started)
        with failures("encode"):
            check_readable(
                images,
                num_quarantined=gap.num_quarantined + counts.quarantined,
                num_skipped=counts.skipped,
                num_denied=counts.denied,
                num_listed=listing.num_listed,
                most=settings.max_bad_fraction,
            )
        return images, counts

    def _build(self, images: Any) -> Built:
        from for_ray.stages.build import update_segments
        from for_ray.stages.merge import merge_small

        job = self._job(images)
        with self._stage("build", unit="segments") as update:
            built = update_segments(
                job,
                self.base,
                cluster=self.cluster,
                wanted=self.wanted_codec,
                floor=self.settings.target_recall,
                memory_bytes=self.cluster.planned_memory_bytes,
                on_progress=update,
            )
        with self._stage("merge", unit="segments") as update:
            return merge_small(job, built, cluster=self.cluster, on_progress=update)

    def _verify(self, listing: Listing, images: Any, built: Built, *, num_skipped: int) -> Recall:
        from for_ray.stages.verify import Recall, check_closed, check_recall, measure_recall

        with self._stage("verify"):
            folder = self.folder / secrets.token_hex(4)
            gap = write_gap(
                listing.rows, table.scan_state(images), folder=folder, gap_uri=str(folder / "gap")
            )
            check_closed(
                num_missing=gap.num_to_encode,
                num_skipped=num_skipped,
                num_stale=gap.num_gone + gap.num_duplicates,
            )
            if not built.num_vectors:
                return Recall(None, 1)
            base, target = self.base, self.settings.target_recall
            if base and not built.is_new and is_measured_for(base, target):
                return Recall(base.recall_at_50, base.nprobe, base.target_recall)
            recall = measure_recall(
                self.cluster,
                self._job(images),
                built.segments,
                recall_queries(self.layout, self.fingerprint, self.bundle),
                deleted=built.deleted,
                nprobe=built.nprobe,
                target=target,
                cache_path=self.folder / "segments",
            )
            check_recall(recall, least=self.settings.least_recall, codec=built.codec)
            return recall

    def _snapshot(self, listing: Listing, images: Any, built: Built, recall: Recall) -> Snapshot:
        num_indexed, num_quarantined = table.count_images(images)
        codec = built.codec
        if (
            codec is not None and codec.recall_at_50 is None
        ):  # its first snapshot: drift is measured against it
            codec = codec.model_copy(update={"recall_at_50": recall.recall})
        return Snapshot(
            snapshot_id=0,  # given when it is published
            created_at=datetime.datetime.now(datetime.UTC),
            fingerprint=self.fingerprint,
            images_version=table.version_of(images),
            codec=codec,
            segments=built.segments,
            deleted_image_ids=built.deleted,
            nprobe=recall.nprobe,
            listed=listing.num_listed,
            indexed=num_indexed,
            quarantined=num_quarantined,
            num_vectors=built.num_vectors,
            recall_at_50=recall.recall,
            target_recall=recall.target,
        )

    def _job(self, images: Any) -> RangeJob:
        from for_ray.stages.ranges import RangeJob

        return RangeJob(
            index_uri=self.layout.index_uri,
            fingerprint=self.fingerprint,
            version=table.version_of(images),
            run_id=self.run_id,
        )

    @contextlib.contextmanager
    def _stage(self, name: str, *, total: int | None = None, unit: str = "images") -> Iterator[Any]:
        with self.progress.stage(name, total=total, unit=unit) as update, failures(name):
            yield update
