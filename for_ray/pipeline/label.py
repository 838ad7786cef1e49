"""The job that labels images: the order of the stages, and what stands between them.

    list → diff → embed → label → report

The images are those that a data set names; what is listed of them is compared with the table, and the gap is
labelled. As with an index, the table is the only checkpoint: a run that died is made good by the next one. A
table belongs to one encoder, vocabulary and threshold, which `labels.json` says; others are refused. The
report is taken away first and written last: where it lies, the table is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from for_ray.config import LabelSettings
from for_ray.datasets.labelled import Ragged
from for_ray.datasets.spec import open_dataset
from for_ray.datasets.vocabulary import meanings, read_vocabulary
from for_ray.errors import ConfigError, DataError, StorageError
from for_ray.index import table
from for_ray.index.labels import read_label_run, refuse_other_settings
from for_ray.model.bundle import open_bundle
from for_ray.model.text import fill
from for_ray.pipeline.encoding import encode_gap
from for_ray.pipeline.label_findings import LookedAt, findings_of, group_qualities, look_at_labels
from for_ray.reports.labels import label_page
from for_ray.schema import LabelLayout, LabelRun, labels_schema
from for_ray.stages.cluster import Cluster
from for_ray.stages.dataset_images import DatasetImages, list_dataset
from for_ray.stages.diff import Gap, write_gap
from for_ray.stages.failures import failures
from for_ray.stages.progress import Progress
from for_ray.stages.report import LabelSummary
from for_ray.storage import (
    Lease,
    canonical_uri,
    check_writable,
    delete,
    delete_tree,
    exists,
    join_uri,
    shown,
    temporary_folder,
    upload,
    write_bytes,
)

# Ray and torch take seconds to import: a run that finds nothing to do is done before.
if TYPE_CHECKING:
    from for_ray.stages.blocks import EncodeCounts


def run_label(settings: LabelSettings, *, progress: Progress) -> LabelSummary:
    """Label the images of a data set that a table of labels does not have yet, and report on all of them.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met, or the table is of other settings; nothing was written.
        DataError: The data set or its images are not what they should be; nothing was written.
        StorageError: The store refused; nothing was written.
        StageError: A stage failed after the first write. What was committed stays.
    """
    with temporary_folder() as folder:
        run = _Run(settings, progress, folder)
        return run.look() if settings.dry_run else run.close_gap()


class _Run:
    """One run of the job; the methods are its stages."""

    def __init__(self, settings: LabelSettings, progress: Progress, folder: Path) -> None:
        self.started = time.monotonic()
        self.settings, self.progress, self.folder = settings, progress, folder
        self.layout = LabelLayout(canonical_uri(settings.output))
        self.run_id = secrets.token_hex(4)
        self.bundle = open_bundle(
            settings.encoder,
            head=settings.head,
            num_slots=settings.num_slots,
            image_size=settings.image_size,
        )
        with progress.stage("read") as update:
            self.dataset = open_dataset(settings.dataset, split=settings.split)
            update(len(self.dataset))
        novel = list(itertools.compress(self.dataset.categories, self.dataset.is_novel.tolist()))
        self.vocabulary = read_vocabulary(
            settings.vocabulary, excluded=novel if settings.exclude_novel else []
        )
        self.names_file = "".join(f"{name}\n" for name in self.vocabulary.names).encode()
        _check_names(self.vocabulary.names, self.bundle.config.prompts)
        self.record = self._read_record()

    def look(self) -> LabelSummary:
        """The dry run: list and diff."""
        if self.record is None:
            self._check_weights()
        images = table.open_table(self.layout.table_uri)
        found, gap = self._compare(images)
        message = (
            f"dry run: {gap.num_to_encode:,} images would be labelled, {_num_to_delete(gap):,} rows deleted; "
            "nothing was written"
        )
        return self._summary(found, gap, images, message=message)

    def close_gap(self) -> LabelSummary:
        """The run. Whatever can be refused is refused before the lease, the first thing that is written."""
        if self.record is None:
            self._check_weights()
        images = table.open_table(self.layout.table_uri)
        found, gap = self._compare(images)
        if images is not None and not _num_to_do(gap) and exists(self.layout.report_uri):
            return self._summary(found, gap, images, message="nothing changed; nothing to label")
        check_writable(self.layout.output_uri)
        with contextlib.ExitStack() as stack:
            self._cluster = Cluster(stack)
            if gap.num_to_encode:
                with self.progress.stage("start"):  # a cluster that does not answer ends the run here
                    _ = self._cluster.resources
            owner = f"jobs/pseudo_label.py (run {self.run_id})"
            lease = stack.enter_context(Lease.acquire(self.layout.lease_uri, owner))
            self.record = self._read_record()  # another run may have begun meanwhile, with other settings
            latest = table.open_table(self.layout.table_uri)
            if table.version_of(latest) != table.version_of(images):
                images = latest
                found, gap = self._compare(images)
            try:
                return self._write(found, gap, images, lease)
            finally:
                with contextlib.suppress(StorageError):
                    delete_tree(join_uri(self.layout.output_uri, "work"))  # of dead runs too

    def _check_weights(self) -> None:
        from for_ray.model.towers import check_weights

        check_weights(self.bundle)

    # What was made before

    @cached_property
    def _wanted(self) -> dict[str, Any]:
        """What `labels.json` must say for this run to go on with it; in the names of its fields."""
        return {
            "dataset": self.dataset.name,
            "images_uri": self.dataset.images_uri,
            "fingerprint": self.bundle.fingerprint,
            "text_fingerprint": self.bundle.text_fingerprint,
            "vocabulary_sha256": hashlib.sha256(self.names_file).hexdigest(),
            "exclude_novel": self.settings.exclude_novel,
            "threshold": self.settings.threshold,
            "num_labels": self.settings.num_labels,
            "has_features": self.settings.features,
        }

    def _read_record(self) -> LabelRun | None:
        record = read_label_run(self.layout)
        if record is not None:
            refuse_other_settings(record, self._wanted, output_uri=self.layout.output_uri)
        elif table.open_table(self.layout.table_uri) is not None:
            raise DataError(
                f"{shown(self.layout.output_uri)} holds labels.lance without labels.json, which says how it "
                "was made; give another --output"
            )
        return record

    # List and diff

    def _compare(self, images: Any) -> tuple[DatasetImages, Gap]:
        found = self._list()
        return found, self._diff(found, images)

    def _list(self) -> DatasetImages:
        with self.progress.stage("list") as update:
            return list_dataset(
                self.dataset,
                self._new_folder(),
                most_missing=self.settings.max_bad_fraction,
                progress=update,
            )

    def _diff(self, found: DatasetImages, images: Any) -> Gap:
        rows = table.scan_state(images) if images is not None else iter(())
        folder = self._new_folder()
        with self.progress.stage("diff", total=found.rows.num_rows) as update:
            return write_gap(found.rows, rows, folder=folder, gap_uri=str(folder / "gap"), progress=update)

    def _new_folder(self) -> Path:
        return self.folder / secrets.token_hex(4)

    # From here on there is something to lose

    def _write(self, found: DatasetImages, gap: Gap, images: Any, lease: Lease) -> LabelSummary:
        with failures("label"):
            lease.check()
            delete(self.layout.report_uri)
        record = self.record or self._embed(lease)
        with failures("label"):
            lease.check()
            if images is None:
                images = table.create_table(self.layout.table_uri, labels_schema(record))
            for uri in gap.file_uris:
                upload(Path(uri), join_uri(self.layout.work_uri(self.run_id), Path(uri).name))
        images, counts, seconds = self._label(record, images, found, gap, lease)
        with failures("label"):
            # After their successors are there: a run that dies has lost nothing.
            lease.check()
            for ids in itertools.chain(gap.changed_image_ids(), gap.gone_image_ids()):
                table.delete_images(images, ids)
            self._check_closed(found, images, num_skipped=counts.skipped)
            table.sweep_versions(self.layout.table_uri, ())
        looked_at = self._look_at(images)
        self._report(record, found, images, looked_at, lease)
        message = f"labelled {counts.stored:,} images; the report is {shown(self.layout.report_uri)}"
        message += counts.told
        rate = counts.stored / seconds if counts.stored else 0.0
        return self._summary(found, gap, images, message=message, looked_at=looked_at, images_per_second=rate)

    def _embed(self, lease: Lease) -> LabelRun:
        """Write the encoder, the vocabulary with its vectors, and the record of all that, in this order."""
        from safetensors.numpy import save

        from for_ray.stages.label import embed_vocabulary

        names = self.vocabulary.names
        with self._stage("embed", total=len(names), unit="names") as update:
            self.bundle.save(self.layout.bundle_uri)
            write_bytes(self.layout.names_uri, self.names_file)
            embedded = embed_vocabulary(
                self._cluster,
                self.layout.bundle_uri,
                names,
                device=self.settings.device,
                on_progress=update,
            )
            lease.check()
            write_bytes(self.layout.text_uri, save({"text": embedded.text}))
            record = LabelRun(
                **self._wanted,
                encoder=self.bundle.name,
                backbone_fingerprint=self.bundle.backbone_fingerprint,
                head=self.bundle.config.head,
                num_slots=self.bundle.num_slots,
                vocabulary=self.vocabulary.source,
                num_names=len(names),
                dropped_names=self.vocabulary.dropped,
                logit_scale=embedded.logit_scale,
                num_prefix=embedded.num_prefix,
                height=embedded.height,
                width=embedded.width,
                channels=embedded.channels,
            )
            write_bytes(self.layout.run_uri, record.model_dump_json(indent=1).encode())
        return record

    def _label(
        self, record: LabelRun, images: Any, found: DatasetImages, gap: Gap, lease: Lease
    ) -> tuple[Any, EncodeCounts, float]:
        """The table with the new rows, what came out, and the seconds that it took."""
        from for_ray.stages.blocks import EncodeCounts
        from for_ray.stages.encode import choose_pool
        from for_ray.stages.label import LabelJob
        from for_ray.stages.verify import check_readable

        settings, counts = self.settings, EncodeCounts()
        most_bad = settings.max_bad_fraction * len(self.dataset)
        started = time.monotonic()
        if gap.num_to_encode:
            job = LabelJob.of(
                self.bundle,
                self.layout.bundle_uri,
                images,
                run=record,
                text_uri=self.layout.text_uri,
                device=settings.device,
                batch_size=settings.batch_size,
                read_threads=settings.read_threads,
            )
            pool = choose_pool(
                self._cluster.resources,
                num_batches=-(-gap.num_to_encode // settings.batch_size),
                min_actors=settings.min_actors,
                max_actors=settings.max_actors,
                device=settings.device,
            )
            with self._stage("label", total=gap.num_to_encode) as update:
                encoded = encode_gap(
                    images,
                    gap,
                    work_uri=self.layout.work_uri(self.run_id),
                    folder=self._new_folder(),
                    job=job,
                    pool=pool,
                    commit_seconds=settings.commit_seconds,
                    most_bad=most_bad - found.num_missing - gap.num_quarantined,
                    lease=lease,
                    on_progress=update,
                    stage="label",
                )
            images, counts = encoded.table, encoded.counts
        seconds = time.monotonic() - started
        with failures("label"):
            check_readable(
                images,
                num_quarantined=gap.num_quarantined + counts.quarantined,
                num_skipped=found.num_missing + counts.skipped,
                num_denied=counts.denied,
                num_listed=len(self.dataset),
                most=settings.max_bad_fraction,
            )
        return images, counts, seconds

    def _check_closed(self, found: DatasetImages, images: Any, *, num_skipped: int) -> None:
        from for_ray.stages.verify import check_closed

        folder = self._new_folder()
        gap = write_gap(found.rows, table.scan_state(images), folder=folder, gap_uri=str(folder / "gap"))
        check_closed(
            num_missing=gap.num_to_encode,
            num_skipped=num_skipped,
            num_stale=gap.num_gone + gap.num_duplicates,
        )

    @contextlib.contextmanager
    def _stage(self, name: str, *, total: int | None = None, unit: str = "images") -> Iterator[Any]:
        with self.progress.stage(name, total=total, unit=unit) as update, failures("label"):
            yield update

    # What came of it

    def _report(
        self, record: LabelRun, found: DatasetImages, images: Any, looked_at: LookedAt, lease: Lease
    ) -> None:
        with self._stage("report"):
            num_labelled, num_quarantined = table.count_images(images)
            tally = looked_at.tally
            counts = [
                ("images of the data set", len(self.dataset)),
                ("missing in the store", found.num_missing),
                ("labelled", num_labelled),
                ("unreadable", num_quarantined),
                ("labels", tally.num_labels),
                (
                    "labels of an image, in the mean",
                    tally.num_labels / num_labelled if num_labelled else None,
                ),
                ("images without a label", int(tally.images_with[0])),
            ]
            findings = findings_of(
                looked_at, self.dataset, self.vocabulary.names, self._meanings, counts=counts
            )
            made_at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            page = label_page(record, findings, made_at=made_at)
            lease.check()
            write_bytes(self.layout.report_uri, page.encode())

    @cached_property
    def _meanings(self) -> Ragged:
        return meanings(self.vocabulary.names, self.dataset.categories, only_missing=True)

    def _look_at(self, images: Any) -> LookedAt:
        return look_at_labels(images, self.dataset, self._meanings, most=self.settings.num_labels)

    def _summary(
        self,
        found: DatasetImages,
        gap: Gap,
        images: Any,
        *,
        message: str,
        looked_at: LookedAt | None = None,
        images_per_second: float = 0.0,
    ) -> LabelSummary:
        tally = (looked_at or self._look_at(images)).tally
        groups = group_qualities(tally, self.dataset)
        num_labelled, num_quarantined = table.count_images(images) if images is not None else (0, 0)
        return LabelSummary(
            images=len(self.dataset),
            missing=found.num_missing,
            new=gap.num_new,
            changed=gap.num_changed,
            gone=gap.num_gone,
            unchanged=gap.num_unchanged,
            labelled=num_labelled,
            quarantined=num_quarantined,
            labels=tally.num_labels,
            without_labels=int(tally.images_with[0]),
            names=len(self.vocabulary.names),
            dropped_names=len(self.vocabulary.dropped),
            precision={group.group: group.precision for group in groups},
            recall={group.group: group.recall for group in groups},
            seconds=round(time.monotonic() - self.started, 3),
            images_per_second=round(images_per_second, 1),
            message=message,
        )


def _check_names(names: Sequence[str], prompts: Sequence[str]) -> None:
    """Refuse names of which the prompts leave nothing, such as `.`, before workers meet them.

    Raises:
        ConfigError: The first such name.
    """
    for name in names:
        try:
            fill(prompts[:1], name)
        except ConfigError:
            raise ConfigError(f"the vocabulary holds {name!r}, which names nothing; take it out") from None


def _num_to_delete(gap: Gap) -> int:
    return gap.num_changed + gap.num_gone + gap.num_duplicates


def _num_to_do(gap: Gap) -> int:
    return gap.num_to_encode + _num_to_delete(gap)
