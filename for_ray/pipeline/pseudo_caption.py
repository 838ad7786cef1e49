"""The job of pseudo-captions: from images and a set of captions to the table that recipe `mcip` learns from.

    read → embed the images → embed the captions, or take their vectors as they were kept → index these →
    look up → write

The images come first: too many that cannot be read are told before the captions, which may be far more, are
embedded. The record is written last. The same settings, images and captions again: nothing to do; others in
the same place are refused. Captions stream, those that some image has, too: see `stages.caption_vectors` for
what 10⁷ of them take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.config import PseudoCaptionSettings
from for_ray.datasets.captions import CaptionStream
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.stages.caption_table import (
    CaptionLists,
    CaptionRun,
    read_record,
    record_uri,
    write_captions,
)
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.progress import Progress
from for_ray.storage import canonical_uri, check_writable, exists, join_uri, shown, temporary_folder

if TYPE_CHECKING:
    from for_ray.evaluation.similarity import VectorSets
    from for_ray.stages.caption_vectors import SpooledCaptions
    from for_ray.stages.encode import Pool
    from for_ray.stages.pseudo_captions import CaptionRecall, Nearest


def run_pseudo_caption(settings: PseudoCaptionSettings, *, progress: Progress) -> CaptionRun:
    """Give images their nearest captions.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met, or another table lies in the output.
        DataError: Images or captions cannot be read, or no caption is over the threshold.
        StorageError: The store refused.
        StageError: Too many images are unreadable; nothing was written.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        return _Run(settings, Cluster(stack), progress, folder).run()


class _Run:
    """One run of the job.

    Args:
        settings: The job's.
        cluster: Where it runs.
        progress: Where the stages are told.
        folder: For this alone, on this disk; the caller removes it.
    """

    def __init__(
        self, settings: PseudoCaptionSettings, cluster: Cluster, progress: Progress, folder: Path
    ) -> None:
        self._settings, self._cluster, self._progress, self._folder = settings, cluster, progress, folder
        self._bundle = open_bundle(settings.encoder, head="clip", image_size=settings.image_size)

    def run(self) -> CaptionRun:
        """All of it."""
        settings, progress = self._settings, self._progress
        output_uri = canonical_uri(settings.output)
        vectors_uri = canonical_uri(settings.vectors or join_uri(output_uri, "vectors"))
        dataset = open_dataset(settings.dataset)
        captions = self._read(dataset.name, len(dataset))
        identity = _identity(settings, self._bundle, dataset.uris, captions)
        if exists(record_uri(output_uri)):
            before = read_record(output_uri)
            if before.identity == identity:
                progress.say("written before; nothing to do")
                return before
            raise ConfigError(
                f"{shown(output_uri)} holds pseudo-captions of other images, captions or settings: give "
                "another --output, or delete those"
            )
        for uri in (output_uri, vectors_uri):
            check_writable(uri)
        lists, used = self._compare(dataset.uris, captions, vectors_uri, identity)
        with failures("write"), progress.stage("write") as update:
            write_captions(output_uri, lists, used)
            update(len(lists.uris))
        return lists.run

    def _read(self, name: str, num_images: int) -> SpooledCaptions:
        """The captions, on this disk; what is wrong with them is said before anything is computed."""
        from for_ray.stages.caption_vectors import spool_captions

        stream = CaptionStream(self._settings.captions)
        with self._progress.stage("read", unit="captions") as update:
            captions = spool_captions(stream, self._folder / "texts", on_progress=update)
        self._progress.say(f"{name}: {num_images:,} images; {stream.counts.describe()}")
        return captions

    def _compare(
        self, uris: pa.ChunkedArray, captions: SpooledCaptions, vectors_uri: str, identity: str
    ) -> tuple[CaptionLists, Iterator[pa.Table]]:
        """The nearest captions of the images, and these captions; those that no image has are left out."""
        from for_ray.model.towers import check_weights
        from for_ray.stages.caption_vectors import captions_at, local_vectors
        from for_ray.stages.pseudo_captions import CaptionIndex

        settings, progress, most = self._settings, self._progress, self._settings.captions_per_image
        check_weights(self._bundle)
        with progress.stage("start"):
            _ = self._cluster.resources
        images = self._embed(uris)
        kept = self._vectors(captions, vectors_uri)
        with failures("index"), progress.stage("index", unit="captions") as update:
            vectors = local_vectors(kept, self._folder / "vectors")
            index = CaptionIndex(vectors, self._folder)
            update(len(vectors))
        with contextlib.closing(index), progress.stage("compare", total=len(uris)) as update:
            recall = index.measure(images, most=most)
            nearest = index.nearest(images, threshold=settings.threshold, most=most, on_progress=update)
        used = self._used(nearest, captions)
        run = self._record(images, nearest, len(used), captions, recall, identity)
        rows = np.flatnonzero(images.is_read)
        of_image = nearest.of_image.select(rows)  # what cannot be read has none, so the cosines stay in place
        of_image = type(of_image)(of_image.offsets, np.searchsorted(used, of_image.values).astype(np.int32))
        found = uris.take(pa.array(rows)).to_pylist()
        lists = CaptionLists(run, found, of_image, nearest.cosines)
        return lists, captions_at(kept, vectors, used.astype(np.int64))

    def _vectors(self, captions: SpooledCaptions, vectors_uri: str) -> Any:
        """The table of the captions' vectors, of this run or of an earlier one."""
        from for_ray.stages.caption_vectors import embed_captions, find_kept

        total = captions.num_captions
        kept = find_kept(vectors_uri, captions, self._bundle)
        if kept is not None:
            self._progress.say(f"captions: vectors as they were kept at {shown(kept.uri)}")
            return kept
        with failures("captions"), self._progress.stage("captions", total=total, unit="captions") as update:
            return embed_captions(
                captions,
                self._bundle,
                self._pool(total),
                vectors_uri,
                device=self._settings.device,
                on_progress=update,
            )

    def _used(self, nearest: Nearest, captions: SpooledCaptions) -> NDArray[np.int32]:
        """The captions that some image has; none at all is refused."""
        used = np.unique(nearest.of_image.values)
        if not len(used):
            raise DataError(
                f"none of the {captions.num_captions:,} captions has a cosine of {self._settings.threshold} "
                "or more with any image: lower --threshold, or take captions of what the images show"
            )
        return used

    def _record(
        self,
        images: VectorSets,
        nearest: Nearest,
        num_used: int,
        captions: SpooledCaptions,
        recall: CaptionRecall,
        identity: str,
    ) -> CaptionRun:
        is_read = images.is_read
        return CaptionRun(
            identity=identity,
            encoder=self._bundle.name,
            fingerprint=self._bundle.fingerprint,
            threshold=self._settings.threshold,
            most=self._settings.captions_per_image,
            num_images=len(images),
            num_unreadable=int((~is_read).sum()),
            num_bare=int((np.diff(nearest.of_image.offsets)[is_read] == 0).sum()),
            num_captions=captions.num_captions,
            num_used=num_used,
            recall=recall.recall,
            nprobe=recall.nprobe,
        )

    def _embed(self, uris: pa.ChunkedArray) -> VectorSets:
        from for_ray.stages.embed import EmbedJob, embed_images

        settings = self._settings
        job = EmbedJob.of(
            self._bundle,
            device=settings.device,
            batch_size=settings.batch_size,
            read_threads=settings.read_threads,
        )
        with failures("embed"), self._progress.stage("embed", total=len(uris)) as update:
            most_bad = settings.max_bad_fraction * len(uris)
            return embed_images(uris, job, self._pool(len(uris)), most_bad=most_bad, on_progress=update)

    def _pool(self, num_rows: int) -> Pool:
        from for_ray.stages.encode import choose_pool

        settings = self._settings
        return choose_pool(
            self._cluster.resources,
            num_batches=-(-num_rows // settings.batch_size),
            min_actors=settings.min_actors,
            max_actors=settings.max_actors,
            device=settings.device,
        )


def _identity(
    settings: PseudoCaptionSettings, bundle: Bundle, uris: pa.ChunkedArray, captions: SpooledCaptions
) -> str:
    """A hash of what decides the table."""
    decisive = [bundle.fingerprint, settings.threshold, settings.captions_per_image, captions.content]
    content = hashlib.sha256(json.dumps(decisive).encode())
    for uri in uris.to_pylist():
        content.update(uri.encode() + b"\n")
    return content.hexdigest()
