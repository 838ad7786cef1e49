"""The index job: the order of the stages, and what stands between them.

    list → diff → encode → build → verify → publish

Nothing is written before the settings, the encoder and the images have been looked at; from then on the run
holds the index's lease. The table of encoded images is the only checkpoint: a run that died is made good by
the next one, which finds a smaller gap. Changed and gone images leave the table when what takes their place
is there; a uri that a dead run leaves twice is found by the next diff. Searches see none of it, since they
stay with a published version.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from for_ray.config import IndexSettings
from for_ray.datasets.vocabulary import imagenet21k_names
from for_ray.errors import ForRayError, StorageError
from for_ray.index import snapshots, table
from for_ray.index.growth import codec_kind
from for_ray.index.plan import IndexPlan, plan_index
from for_ray.model.bundle import Bundle, check_indexable, open_bundle
from for_ray.schema import Layout, Snapshot, images_schema
from for_ray.stages.cluster import Cluster
from for_ray.stages.diff import Gap, write_gap
from for_ray.stages.failures import failures
from for_ray.stages.listing import Listing, write_listing
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from for_ray.stages.sweep import sweep
from for_ray.storage import Lease, canonical_uri, check_writable, delete_tree, exists, join_uri, upload

# Ray and torch take seconds to import: a run that finds nothing to do is done before.
if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder
    from for_ray.stages.blocks import EncodeCounts
    from for_ray.stages.build import Built
    from for_ray.stages.ranges import RangeJob
    from for_ray.stages.verify import Recall

DEFAULT_ENCODER = "picturebook"

NUM_QUERIES = 64
"""Text queries that recall is measured with: names of ImageNet-21K, evenly from the list."""


def run_index(settings: IndexSettings, *, progress: Progress) -> IndexSummary:
    """Close the gap between a bucket of images and their index, and publish the result.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met; nothing was written.
        DataError: The images, the manifest or the index are not what they should be; nothing was written.
        StorageError: The store refused; nothing was written.
        StageError: A stage failed after the first write. What was committed stays; nothing was published.
    """
    with tempfile.TemporaryDirectory(prefix="for-ray-") as folder:
        run = _Run(settings, progress, Path(folder))
        return run.look() if settings.dry_run else run.close_gap()


class _Run:
    """One run of the job; the methods are its stages."""

    def __init__(self, settings: IndexSettings, progress: Progress, folder: Path) -> None:
        self.started = time.monotonic()
        self.settings, self.progress, self.folder = settings, progress, folder
        self.layout = Layout(canonical_uri(settings.index))
        self.run_id = secrets.token_hex(4)
        self.latest = next(snapshots.list_snapshots(self.layout), None)
        self.bundle = _open_encoder(settings, self.layout, self.latest)
        self.fingerprint = self.bundle.fingerprint
        self.base = self._find_base()
        self.table_uri = self.layout.images_uri(self.fingerprint)
        plan_index(1, self.bundle.dim, codec=self._codec)  # refuses a wrong codec while nothing is written
        self._encoder: Encoder | None = None

    def _find_base(self) -> Snapshot | None:
        # An encoder that was here before continues its own segments, whoever published last.
        return next(snapshots.list_snapshots(self.layout, fingerprint=self.fingerprint), None)

    @property
    def _codec(self) -> str | None:
        """The codec that was asked for, now or when the index got the one it has; None: the plan's."""
        wanted = self.settings.codec
        if wanted is None and self.base and self.base.codec:
            wanted = self.base.codec.wanted
        return None if wanted == "auto" else wanted

    @property
    def encoder(self) -> Encoder:
        """The encoder on the driver's CPU: proves that the weights fit, embeds the queries of `verify`."""
        if self._encoder is None:
            from for_ray.model.encoder import load_encoder

            self._encoder = load_encoder(self.bundle, device="cpu")
        return self._encoder

    def look(self) -> IndexSummary:
        """The dry run: list, diff, and the layout that the index would have."""
        if self.base is None:
            self._check_weights()
        listing = self._list()
        images = table.open_table(self.table_uri)
        gap = self._diff(listing, images)
        held = table.count_held(images, 0) if images is not None else table.Held(0, 0, 0)
        per_image = held.num_vectors / held.num_images if held.num_images else self.bundle.num_slots
        plan = plan_index(round(per_image * listing.num_listed), self.bundle.dim, codec=self._codec)
        message = (
            f"dry run: {gap.num_to_encode:,} images would be encoded, {_num_to_delete(gap):,} rows deleted; "
            "nothing was written"
        )
        return self._summary(listing, gap, self.base, message=message, plan=plan)

    def close_gap(self) -> IndexSummary:
        """The run. Whatever can be refused is refused before the lease, the first thing that is written."""
        if not exists(join_uri(self.layout.bundle_uri(self.fingerprint), "encoder.toml")):
            self._check_weights()
        images = table.open_table(self.table_uri)
        listing, gap = self._compare(images)
        if self._is_current(gap, images):
            return self._unchanged(listing, gap)
        check_writable(self.layout.index_uri)
        with contextlib.ExitStack() as stack:
            self._cluster = Cluster(stack)
            if gap.num_to_encode:
                with self.progress.stage("start"):  # a cluster that does not answer ends the run here
                    _ = self._cluster.resources
            lease = stack.enter_context(
                Lease.acquire(self.layout.lease_uri, f"jobs/index.py (run {self.run_id})")
            )
            latest = table.open_table(self.table_uri)
            if table.version_of(latest) != table.version_of(images):
                # Another run wrote meanwhile: what it encoded may be newer than this list.
                images, self.base = latest, self._find_base()
                listing, gap = self._compare(images)
            try:
                return self._write(listing, gap, images, lease)
            finally:
                with contextlib.suppress(StorageError):  # the next run that publishes sweeps it away
                    delete_tree(self.layout.work_uri(self.run_id))

    def _check_weights(self) -> None:
        from for_ray.model.towers import check_weights

        check_weights(self.bundle)

    def _compare(self, images: Any) -> tuple[Listing, Gap]:
        listing = self._list()
        if images is not None:
            table.check_columns(images, listing.metadata)
        return listing, self._diff(listing, images)

    def _list(self) -> Listing:
        folder = self.folder / secrets.token_hex(4)
        with self.progress.stage("list") as update:
            return write_listing(self.settings.images, folder, progress=update)

    def _diff(self, listing: Listing, images: Any) -> Gap:
        rows = table.scan_state(images) if images is not None else iter(())
        folder = self.folder / secrets.token_hex(4)
        with self.progress.stage("diff", total=listing.num_listed) as update:
            gap_uri = str(folder / "gap")
            return write_gap(listing.rows, rows, folder=folder, gap_uri=gap_uri, progress=update)

    def _is_current(self, gap: Gap, images: Any) -> bool:
        base = self.base
        if gap.num_to_encode or _num_to_delete(gap) or base is None or base != self.latest:
            return False
        if base.images_version != table.version_of(images):
            return False
        if self.settings.codec is None or base.codec is None:
            return True
        if self._codec is None:
            return base.codec.wanted is None
        return codec_kind(self._codec) == codec_kind(base.codec.factory)

    def _unchanged(self, listing: Listing, gap: Gap) -> IndexSummary:
        stays = self.base.snapshot_id if self.base else 0
        return self._summary(listing, gap, self.base, message=f"nothing changed; snapshot {stays} stays")

    def _write(self, listing: Listing, gap: Gap, images: Any, lease: Lease) -> IndexSummary:
        """From here on the index changes: encode, build, verify, publish."""
        with failures("encode"):
            images = self._prepare(listing, gap, images, lease)
        images, counts, seconds = self._encode(images, listing, gap, lease)
        with failures("encode"):
            # After their successors are there: a run that is refused, or dies, has lost nothing.
            lease.check()
            for ids in itertools.chain(gap.changed_image_ids(), gap.gone_image_ids()):
                table.delete_images(images, ids)
        built = self._build(images)
        recall = self._verify(listing, images, built, num_skipped=counts.skipped)
        with failures("publish"):
            lease.check()
            snapshot = snapshots.publish(self.layout, self._snapshot(listing, images, built, recall))
        message = f"published snapshot {snapshot.snapshot_id}"
        if counts.skipped:
            message += f"; {counts.skipped:,} images were not there, or not as listed, when they were read"
        try:
            sweep(self.layout, self.fingerprint, lease)
        except ForRayError as error:  # the snapshot is out: what lies about is the next run's to sweep
            message += f"; sweeping failed: {error}"
        rate = counts.stored / seconds if counts.stored else 0.0
        return self._summary(listing, gap, snapshot, message=message, images_per_second=rate)

    def _prepare(self, listing: Listing, gap: Gap, images: Any, lease: Lease) -> Any:
        """What the workers need: the encoder, a table with all columns, and the gap; the table."""
        lease.check()
        self.bundle.save(self.layout.bundle_uri(self.fingerprint))
        if images is None:
            images = table.create_table(self.table_uri, images_schema(self.bundle.dim, listing.metadata))
        table.add_missing_columns(images, listing.metadata)
        for uri in gap.file_uris:
            upload(Path(uri), join_uri(self.layout.work_uri(self.run_id), Path(uri).name))
        return images

    def _encode(
        self, images: Any, listing: Listing, gap: Gap, lease: Lease
    ) -> tuple[Any, EncodeCounts, float]:
        """The table with the new rows, what came out, and the seconds that it took."""
        from for_ray.stages.blocks import EncodeCounts, EncodeJob
        from for_ray.stages.encode import choose_pool, encode
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
                self._cluster.resources,
                num_batches=-(-num_images // settings.batch_size),
                min_actors=settings.min_actors,
                max_actors=settings.max_actors,
                device=settings.device,
            )
            with self._stage("encode", total=num_images) as update:
                images, counts = encode(
                    images,
                    self.layout.work_uri(self.run_id),
                    job=job,
                    pool=pool,
                    num_images=num_images,
                    commit_seconds=settings.commit_seconds,
                    most_bad=settings.max_bad_fraction * listing.num_listed - gap.num_quarantined,
                    lease=lease,
                    on_progress=update,
                )
        seconds = time.monotonic() - started
        with failures("encode"):
            check_readable(
                images,
                num_quarantined=gap.num_quarantined + counts.quarantined,
                num_skipped=counts.skipped,
                num_listed=listing.num_listed,
                most=settings.max_bad_fraction,
            )
        return images, counts, seconds

    def _build(self, images: Any) -> Built:
        from for_ray.stages.build import update_segments

        with self._stage("build", unit="segments") as update:
            return update_segments(
                self._job(images),
                self.base,
                cluster=self._cluster,
                wanted=self._codec,
                on_progress=update,
            )

    def _verify(self, listing: Listing, images: Any, built: Built, *, num_skipped: int) -> Recall:
        from for_ray.stages.verify import Recall, check_closed, measure_recall

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
            if not built.is_new:
                known = self.base.recall_at_50 if self.base else None
                return Recall(known, self.base.nprobe if self.base else 1)
            names = imagenet21k_names()
            return measure_recall(
                self._cluster,
                self._job(images),
                built.segments,
                self.encoder.embed_text(names[:: len(names) // NUM_QUERIES][:NUM_QUERIES]),
                deleted=built.deleted,
                nprobe=built.nprobe,
                target=self.settings.target_recall,
                cache_path=self.folder / "segments",
            )

    def _snapshot(self, listing: Listing, images: Any, built: Built, recall: Recall) -> Snapshot:
        num_indexed, num_quarantined = table.count_images(images)
        return Snapshot(
            snapshot_id=0,  # given when it is published
            created_at=datetime.datetime.now(datetime.UTC),
            fingerprint=self.fingerprint,
            images_version=table.version_of(images),
            codec=built.codec,
            segments=built.segments,
            deleted_image_ids=built.deleted.tolist(),
            nprobe=recall.nprobe,
            listed=listing.num_listed,
            indexed=num_indexed,
            quarantined=num_quarantined,
            num_vectors=built.num_vectors,
            recall_at_50=recall.recall,
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

    def _summary(
        self,
        listing: Listing,
        gap: Gap,
        snapshot: Snapshot | None,
        *,
        message: str,
        images_per_second: float = 0.0,
        plan: IndexPlan | None = None,
    ) -> IndexSummary:
        if listing.num_ignored:
            message += f"; {listing.num_ignored:,} objects are no images by their names, and were ignored"
        return IndexSummary.of(
            snapshot,
            listed=listing.num_listed,
            new=gap.num_new,
            changed=gap.num_changed,
            gone=gap.num_gone,
            unchanged=gap.num_unchanged,
            seconds=round(time.monotonic() - self.started, 3),
            images_per_second=round(images_per_second, 1),
            message=message,
            plan=plan,
        )


def _open_encoder(settings: IndexSettings, layout: Layout, latest: Snapshot | None) -> Bundle:
    """The encoder that was asked for, or the index's own, or the default one."""
    encoder = settings.encoder
    if encoder is None:
        encoder = layout.bundle_uri(latest.fingerprint) if latest else DEFAULT_ENCODER
    bundle = open_bundle(
        encoder,
        head=settings.head,
        num_slots=settings.num_slots,
        image_size=settings.image_size,
        keep_threshold=settings.keep_threshold,
    )
    check_indexable(bundle)
    return bundle


def _num_to_delete(gap: Gap) -> int:
    return gap.num_changed + gap.num_gone + gap.num_duplicates
