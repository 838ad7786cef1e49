"""The index job: what there is and what the index has, and whether anything is to be done.

    list → diff → encode → build → merge → verify → publish → sweep

Nothing is written before the settings, the encoder and the images have been looked at; from then on the run
holds the index's lease, and `index_write` goes on. The table of encoded images is the only checkpoint: a run
that died is made good by the next one, which finds a smaller gap. Every run leaves a report in the index, but
for a dry one, one that is refused before its first write, and one that ends before it where no index is yet.

An index holds what `--images` lists, and nothing else: of another prefix all images are new, and those of the
one before are gone. More gone images than `max_gone_fraction` allows are taken for a mistake, and refused.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any

from for_ray.command import how_ended
from for_ray.config import IndexSettings
from for_ray.errors import DataError, ForRayError, StageError
from for_ray.index import snapshots, table
from for_ray.index.capacity import Capacity
from for_ray.index.growth import codec_kind, is_measured_for, why_retrain_snapshot
from for_ray.index.plan import plan_index
from for_ray.index.spread import Spread
from for_ray.pipeline.capacity import plans_of, task_bytes
from for_ray.pipeline.chosen_encoder import open_encoder
from for_ray.pipeline.index_report import Findings, report_run
from for_ray.pipeline.index_write import IndexWriter
from for_ray.pipeline.upkeep import sweep_idle
from for_ray.schema import Layout, Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.diff import Gap, why_too_many_gone, write_gap
from for_ray.stages.listing import Listing, write_listing
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from for_ray.stages.sweep import finish_removals, is_removed
from for_ray.storage import Lease, canonical_uri, check_writable, exists, join_uri, shown, temporary_folder


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
    with temporary_folder() as folder:
        run = _Run(settings, progress, folder)
        if settings.dry_run:
            return run.look()
        try:
            summary = run.close_gap()
        except StageError as error:
            progress.say(run.report("failed", str(error)))
            run.sweep_idle(has_failed=True)
            raise
        except BaseException as error:  # an interrupt too, and what nobody foresaw: the morning wants to know
            if run.holds_lease or (run.latest and not isinstance(error, ForRayError)):  # there is an index
                progress.say(run.report("failed", how_ended(error)))
            raise
        progress.say(run.report("published" if run.found.has_published else "unchanged", summary.message))
        if not run.found.has_published:
            run.sweep_idle(has_failed=False)
        return summary


class _Run:
    """One run of the job; the methods are its stages."""

    def __init__(self, settings: IndexSettings, progress: Progress, folder: Path) -> None:
        self.found = Findings()
        self.settings, self.progress, self.folder = settings, progress, folder
        self.images_uri = settings.images or ""  # settings without are not of a run
        self.layout = Layout(canonical_uri(settings.index))
        self.run_id = secrets.token_hex(4)
        self.holds_lease = False
        self.new_columns: list[str] = []  # of a manifest, which the table of encoded images lacks
        self.latest = snapshots.find_latest(self.layout)
        own = self.layout.bundle_uri(self.latest.fingerprint) if self.latest else None
        self.bundle = open_encoder(settings, own=own)
        self.fingerprint = self.bundle.fingerprint
        self.base = self._find_base()
        self.table_uri = self.layout.images_uri(self.fingerprint)
        plan_index(1, self.bundle.dim, codec=self._codec)  # refuses a wrong codec while nothing is written

    def _find_base(self) -> Snapshot | None:
        # An encoder that was here before continues its own segments, whoever published last. Of one that is
        # just being swept away, the snapshot may have been read before it left the list.
        base = snapshots.find_latest(self.layout, fingerprint=self.fingerprint)
        return base if base and self._open_images() is not None else None

    def _open_images(self) -> Any | None:
        # What a sweep that died has left of an encoder is deleted before this run writes.
        is_there = not is_removed(self.layout, self.fingerprint)
        return table.open_table(self.layout.images_uri(self.fingerprint)) if is_there else None

    @property
    def _codec(self) -> str | None:
        """The codec that was asked for, now or when the index got the one it has; None: the plan's."""
        wanted = self.settings.codec
        if wanted is None and self.base and self.base.codec:
            wanted = self.base.codec.wanted
        return None if wanted == "auto" else wanted

    def look(self) -> IndexSummary:
        """The dry run: list, diff, and the layout that the index would have."""
        if self.base is None:
            self._check_weights()
        images = self._open_images()
        listing = self._list(images)
        gap = self._diff(listing, images)
        held = table.count_held(images, 0) if images is not None else Spread(0)
        per_image = held.num_vectors / held.num_images if held.num_vectors else self.bundle.num_slots
        plans = plans_of(
            self.settings, self.bundle.dim, per_image, num_images=listing.num_listed, codec=self._codec
        )
        message = (
            f"dry run: {gap.num_to_encode:,} images would be encoded, {_num_to_delete(gap):,} rows deleted; "
            "nothing was written"
        )
        most_bad = self.settings.max_bad_fraction
        if too_many := self._too_many_gone(listing, gap):
            message += f"; a run would be refused: {too_many}"
        elif gap.num_quarantined > most_bad * listing.num_listed and not self._is_current(gap, images):
            message += (
                f"; a run would publish nothing: {gap.num_quarantined:,} images are in quarantine, more than "
                f"max_bad_fraction {most_bad:g} allows"
            )
        return self._summary(listing, gap, self.base, message=message, plans=plans)

    def close_gap(self) -> IndexSummary:
        """The run. Whatever can be refused is refused before the lease, the first thing that is written."""
        if not exists(join_uri(self.layout.bundle_uri(self.fingerprint), "encoder.toml")):
            self._check_weights()
        images = self._open_images()
        listing, gap = self._compare(images)
        self.found.snapshot = self.latest
        if self._is_current(gap, images):
            return self._unchanged(listing, gap)
        check_writable(self.layout.index_uri)
        with contextlib.ExitStack() as stack:
            cluster = Cluster(stack, task_memory_bytes=task_bytes(self.settings))
            if gap.num_to_encode:
                with self.progress.stage("start"):  # a cluster that does not answer ends the run here
                    _ = cluster.resources
            lease = stack.enter_context(
                Lease.acquire(self.layout.lease_uri, f"jobs/index.py (run {self.run_id})")
            )
            self.holds_lease = True
            finish_removals(self.layout, lease)
            listing, gap, images = self._look_again(listing, gap, images)
            if self._is_current(gap, images, cluster):
                return self._unchanged(listing, gap)
            writer = IndexWriter(
                settings=self.settings,
                layout=self.layout,
                bundle=self.bundle,
                run_id=self.run_id,
                base=self.base,
                wanted_codec=self._codec,
                cluster=cluster,
                lease=lease,
                progress=self.progress,
                folder=self.folder,
                found=self.found,
            )
            message = writer.write(listing, gap, images)
        return self._summary(listing, gap, self.found.snapshot, message=message)

    def _look_again(self, listing: Listing, gap: Gap, images: Any) -> tuple[Listing, Gap, Any]:
        """What another run may have done before this one had the lease: listing can take an hour."""
        known = {self.fingerprint, self.latest.fingerprint if self.latest else None}
        self.latest = snapshots.find_latest(self.layout)
        self.found.snapshot, self.base = self.latest, self._find_base()
        if self.settings.encoder is None and self.latest and self.latest.fingerprint not in known:
            raise DataError(
                f"{self.layout.index_uri} was published with another encoder ({self.latest.fingerprint}) "
                "while this run listed the images; run again to go on with it, or name yours with --encoder"
            )
        latest = self._open_images()
        if table.version_of(latest) != table.version_of(images):
            listing, gap = self._compare(latest)  # what was encoded meanwhile may be newer than the list
        return listing, gap, latest

    def sweep_idle(self, *, has_failed: bool) -> None:
        """Sweep what a run that published nothing may sweep."""
        said = sweep_idle(
            self.layout,
            keep_snapshots=self.settings.keep_snapshots,
            keep_days=self.settings.keep_days,
            has_failed=has_failed,
        )
        if said:
            self.progress.say(said)

    def report(self, outcome: str, message: str) -> str:
        """Write the run's report; what to say of it."""
        return report_run(
            self.found,
            self.layout,
            self.progress,
            outcome=outcome,
            message=message,
            run_id=self.run_id,
            images_uri=self.images_uri,
            index_uri=self.layout.index_uri,
            encoder=f"{self.bundle.name}, {self.bundle.config.head}",
            fingerprint=self.fingerprint,
        )

    def _check_weights(self) -> None:
        from for_ray.model.towers import check_weights

        check_weights(self.bundle)

    def _compare(self, images: Any) -> tuple[Listing, Gap]:
        listing = self._list(images)
        gap = self._diff(listing, images)
        self.found.listing, self.found.gap, self.found.images = listing, gap, images
        if too_many := self._too_many_gone(listing, gap):
            raise DataError(too_many)
        return listing, gap

    def _too_many_gone(self, listing: Listing, gap: Gap) -> str | None:
        # Another encoder's index is about to be replaced as a whole: of its images only the number is known.
        other = self.latest if self.latest and self.latest.fingerprint != self.fingerprint else None
        return why_too_many_gone(
            gap,
            has_published=self.base is not None,
            num_listed=listing.num_listed,
            num_published=other.indexed + other.quarantined if other else 0,
            images_uri=canonical_uri(self.images_uri),
            most=self.settings.max_gone_fraction,
        )

    def _list(self, images: Any) -> Listing:
        folder = self.folder / secrets.token_hex(4)
        with self.progress.stage("list") as update:
            known = images.schema if images is not None else None
            listing = write_listing(self.images_uri, folder, known=known, progress=update)
        self.new_columns = [name for name in listing.metadata.names if known and name not in known.names]
        return listing

    def _diff(self, listing: Listing, images: Any) -> Gap:
        rows = table.scan_state(images) if images is not None else iter(())
        folder = self.folder / secrets.token_hex(4)
        with self.progress.stage("diff", total=listing.num_listed) as update:
            gap_uri = str(folder / "gap")
            return write_gap(
                listing.rows,
                rows,
                folder=folder,
                gap_uri=gap_uri,
                retry_quarantined=self.settings.retry_quarantined,
                progress=update,
            )

    def _is_current(self, gap: Gap, images: Any, cluster: Cluster | None = None) -> bool:
        base = self.base
        if gap.num_to_encode or _num_to_delete(gap) or base is None or base != self.latest:
            return False
        if base.images_version != table.version_of(images):
            return False
        if self._drift(base, cluster) or not is_measured_for(base, self.settings.target_recall):
            return False
        if self.settings.codec is None or base.codec is None:
            return True
        if self._codec is None:
            return base.codec.wanted is None
        return codec_kind(self._codec) == codec_kind(base.codec.factory)

    def _drift(self, base: Snapshot, cluster: Cluster | None) -> str | None:
        # By the setting while no cluster is joined, which a night without work shall not cost: its tasks may
        # have less, and then nothing would be trained anew.
        return why_retrain_snapshot(
            base,
            wanted=self._codec,
            floor=self.settings.target_recall,
            memory_bytes=cluster.planned_memory_bytes if cluster else task_bytes(self.settings),
        )

    def _unchanged(self, listing: Listing, gap: Gap) -> IndexSummary:
        stays = self.base.snapshot_id if self.base else 0
        return self._summary(listing, gap, self.base, message=f"nothing changed; snapshot {stays} stays")

    def _summary(
        self,
        listing: Listing,
        gap: Gap,
        snapshot: Snapshot | None,
        *,
        message: str,
        plans: dict[str, Capacity] | None = None,
    ) -> IndexSummary:
        if self.new_columns and gap.num_unchanged:
            named = ", ".join(map(shown, self.new_columns))
            message += (
                f"; {gap.num_unchanged:,} unchanged images have no value in {named}, new in the manifest: "
                "metadata is taken when an image is encoded"
            )
        if listing.ignored is not None:
            message += (
                f"; {listing.num_ignored:,} objects are no images by their names, and were ignored, like "
                f"{shown(listing.ignored)}"
            )
        return IndexSummary.of(
            snapshot,
            listed=listing.num_listed,
            new=gap.num_new,
            changed=gap.num_changed,
            gone=gap.num_gone,
            unchanged=gap.num_unchanged,
            ignored=listing.num_ignored,
            seconds=round(self.found.seconds, 3),
            images_per_second=round(self.found.images_per_second, 1),
            message=message,
            plans=plans or {},
        )


def _num_to_delete(gap: Gap) -> int:
    return gap.num_changed + gap.num_gone + gap.num_duplicates
