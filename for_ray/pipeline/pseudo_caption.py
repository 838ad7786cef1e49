"""The job of pseudo-captions: from images and a set of captions to the table that recipe `mcip` learns from.

    read → embed the captions → index them → embed the images → look up → write

The record is written last. The same settings, images and captions again: nothing to do; others in the same
place are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from for_ray.config import PseudoCaptionSettings
from for_ray.datasets.captions import Captions, read_captions
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.stages.caption_table import (
    CaptionRun,
    CaptionTable,
    read_record,
    record_uri,
    write_captions,
)
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.progress import Progress
from for_ray.storage import canonical_uri, check_writable, exists, shown

if TYPE_CHECKING:
    from for_ray.evaluation.similarity import VectorSets
    from for_ray.stages.encode import Pool
    from for_ray.stages.pseudo_captions import Nearest


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
    output_uri = canonical_uri(settings.output)
    bundle = open_bundle(settings.encoder, head="clip", image_size=settings.image_size)
    with progress.stage("read") as update:
        dataset = open_dataset(settings.dataset)
        captions = read_captions(settings.captions)
        update(len(dataset))
    progress.say(f"{dataset.name}: {len(dataset):,} images; {captions.describe()}")
    identity = _identity(settings, bundle, dataset.uris, captions)
    if exists(record_uri(output_uri)):
        before = read_record(output_uri)
        if before.identity == identity:
            progress.say("written before; nothing to do")
            return before
        raise ConfigError(
            f"{shown(output_uri)} holds pseudo-captions of other images, captions or settings: give another "
            "--output, or delete those"
        )
    check_writable(output_uri)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="for-ray-")))
        run = _Run(settings, bundle, Cluster(stack), progress)
        table = run.compare(dataset.uris, captions, folder, identity)
        with failures("write"), progress.stage("write") as update:
            write_captions(output_uri, table)
            update(len(table.uris))
    return table.run


class _Run:
    """One run of the job."""

    def __init__(
        self, settings: PseudoCaptionSettings, bundle: Bundle, cluster: Cluster, progress: Progress
    ) -> None:
        self._settings, self._bundle, self._cluster, self._progress = settings, bundle, cluster, progress

    def compare(self, uris: pa.ChunkedArray, captions: Captions, folder: Path, identity: str) -> CaptionTable:
        """The table of images and their nearest captions; those that no image has are left out."""
        from for_ray.model.towers import check_weights
        from for_ray.stages.pseudo_captions import CaptionIndex, embed_captions

        settings, progress = self._settings, self._progress
        check_weights(self._bundle)
        with progress.stage("start"):
            _ = self._cluster.resources
        total = len(captions.texts)
        with failures("captions"), progress.stage("captions", total=total, unit="captions") as update:
            vectors = embed_captions(
                captions.texts,
                self._bundle,
                self._pool(total),
                folder / "vectors",
                device=settings.device,
                on_progress=update,
            )
        with failures("index"), progress.stage("index", unit="captions") as update:
            index = CaptionIndex(vectors, folder)
            update(total)
        images = self._embed(uris)
        with contextlib.closing(index), progress.stage("compare", total=len(uris)) as update:
            nearest = index.nearest(
                images,
                threshold=settings.threshold,
                most=settings.captions_per_image,
                on_progress=update,
            )
        return self._table(uris, images, captions, nearest, vectors, identity)

    def _table(
        self,
        uris: pa.ChunkedArray,
        images: VectorSets,
        captions: Captions,
        nearest: Nearest,
        vectors: np.ndarray,
        identity: str,
    ) -> CaptionTable:
        settings = self._settings
        used = np.unique(nearest.of_image.values)
        if not len(used):
            raise DataError(
                f"none of the {len(captions.texts):,} captions has a cosine of {settings.threshold} or more "
                "with any image: lower --threshold, or take captions of what the images show"
            )
        rows = np.flatnonzero(images.is_read)
        of_image = nearest.of_image.select(rows)  # what cannot be read has none, so the cosines stay in place
        run = CaptionRun(
            identity=identity,
            encoder=self._bundle.name,
            fingerprint=self._bundle.fingerprint,
            threshold=settings.threshold,
            most=settings.captions_per_image,
            num_images=len(uris),
            num_unreadable=len(uris) - len(rows),
            num_bare=int((np.diff(of_image.offsets) == 0).sum()),
            num_captions=len(captions.texts),
            num_used=len(used),
        )
        places = np.searchsorted(used, of_image.values).astype(np.int32)
        of_image = type(of_image)(of_image.offsets, places)
        texts = [captions.texts[row] for row in used.tolist()]
        found = uris.take(pa.array(rows)).to_pylist()
        return CaptionTable(run, found, of_image, nearest.cosines, texts, np.array(vectors[used]))

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
    settings: PseudoCaptionSettings, bundle: Bundle, uris: pa.ChunkedArray, captions: Captions
) -> str:
    """A hash of what decides the table."""
    content = hashlib.sha256()
    decisive = [bundle.fingerprint, settings.threshold, settings.captions_per_image]
    content.update(json.dumps(decisive).encode())
    for text in (*uris.to_pylist(), "", *captions.texts):
        content.update(text.encode() + b"\n")
    return content.hexdigest()
