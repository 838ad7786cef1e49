"""The evaluation job: a data set with labels, and how well its images are found by what they show.

    encoders    read → score, each by itself → measure
    an index    read → compare → exact → search → measure

All that can be refused is refused before a cluster is started, and nothing is written but the CSV.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from for_ray.config import EvaluateSettings
from for_ray.config.index import Head
from for_ray.datasets.labelled import CategoryShare, LabelledImages
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.evaluation.exact import recall_at_k
from for_ray.evaluation.summary import DEPTH, multilabel_scores, summarise_rankings, summarise_scores
from for_ray.index import snapshots
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import Layout, Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.progress import Progress
from for_ray.stages.ranges import RangeJob
from for_ray.stages.results import Evaluation, Method
from for_ray.storage import (
    canonical_uri,
    check_writable,
    is_s3,
    local_path,
    shown,
    temporary_folder,
    write_bytes,
)

# Ray and torch take seconds to import: what is wrong with the settings or the data is said before.
if TYPE_CHECKING:
    from for_ray.stages.rank import Members
    from for_ray.stages.score import Scores


def run_evaluate(settings: EvaluateSettings, *, progress: Progress) -> Evaluation:
    """Measure encoders, or an index, on a data set.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met.
        DataError: The annotations or the index are not what they should be, or share too few images.
        StorageError: The store refused.
        StageError: Encoding failed, or too many images cannot be read.
    """
    if settings.csv is not None:
        check_writable(folder_of(settings.csv))
    bundles = open_encoders(settings)
    with progress.stage("read", unit="images") as update:
        images = open_dataset(settings.dataset, split=settings.split)
        update(len(images))
    progress.say(images.describe())
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack)
        if settings.index is not None:
            evaluation = _IndexRun(settings, images, cluster, progress).measure(settings.index)
        else:
            evaluation = _EncoderRun(settings, images, cluster, progress).measure(bundles)
    if settings.csv is not None:
        write_bytes(settings.csv, evaluation.to_csv().encode())
    return evaluation


def folder_of(uri: str) -> str:
    """Where a file lies."""
    return uri.rpartition("/")[0] if is_s3(uri) else str(local_path(uri).parent)


def open_encoders(settings: EvaluateSettings) -> dict[str, Bundle]:
    """The encoders by what tables call them: as they were given, with their head.

    Raises:
        ConfigError: One is unknown, incomplete, or given twice.
        DataError: A file of a bundle is not what its checksum says.
        StorageError: The store refused.
    """
    bundles: dict[str, Bundle] = {}
    for given in settings.encoder or ():
        encoder, _, head = given.rpartition("#")
        if head not in get_args(Head):
            encoder, head = given, settings.head or ""
        bundle = open_bundle(
            encoder,
            head=head or None,
            num_slots=settings.num_slots,
            image_size=settings.image_size,
            keep_threshold=settings.keep_threshold,
        )
        name = f"{encoder}#{bundle.config.head}"
        if name in bundles:
            raise ConfigError(f"{name} is measured once: leave out one of its names, {given} is another")
        bundles[name] = bundle
    return bundles


class _EncoderRun:
    """Encoders on a data set."""

    def __init__(
        self, settings: EvaluateSettings, images: LabelledImages, cluster: Cluster, progress: Progress
    ) -> None:
        self._settings, self._images, self._cluster, self._progress = settings, images, cluster, progress

    def measure(self, bundles: dict[str, Bundle]) -> Evaluation:
        """All of them, on the images that each could read."""
        from for_ray.model.towers import check_weights

        for bundle in bundles.values():
            check_weights(bundle)
        with self._progress.stage("start"):  # a cluster that does not answer ends the run here
            _ = self._cluster.resources
        started = time.monotonic()
        scored, seconds = {}, {}
        for name, bundle in bundles.items():
            scored[name] = self._score(name, bundle)
            seconds[name], started = time.monotonic() - started, time.monotonic()
        is_measured = np.logical_and.reduce([scores.is_read for scores in scored.values()])
        if not is_measured.any():
            raise DataError(f"no image of {self._images.name} could be read, so there is nothing to measure")
        relevant = self._images.relevant()[:, is_measured]
        methods = [
            self._method(name, scores.values[:, is_measured], relevant, _about(bundles[name], seconds[name]))
            for name, scores in scored.items()
        ]
        return _evaluation(self._images, relevant, methods)

    def _score(self, name: str, bundle: Bundle) -> Scores:
        from for_ray.stages.encode import choose_pool
        from for_ray.stages.score import ScoreJob, score_images

        settings, num_images = self._settings, len(self._images)
        job = ScoreJob.of(
            bundle,
            self._images.categories,
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
        self._progress.say(f"encoder  {name}")
        with failures("score"), self._progress.stage("score", total=num_images) as update:
            most_bad = settings.max_bad_fraction * num_images
            return score_images(self._images.uris, job, pool, most_bad=most_bad, on_progress=update)

    def _method(
        self, name: str, scores: NDArray[np.float32], relevant: NDArray[np.bool_], about: dict[str, Any]
    ) -> Method:
        is_novel = self._images.is_novel
        found = summarise_scores(scores, relevant, is_novel)
        has_labels = self._settings.task == "multilabel"
        multilabel = multilabel_scores(scores, relevant, is_novel) if has_labels else None
        return Method(name, about, found.map50, found.ap50, multilabel)


class _IndexRun:
    """A published index on a data set."""

    def __init__(
        self, settings: EvaluateSettings, images: LabelledImages, cluster: Cluster, progress: Progress
    ) -> None:
        self._settings, self._images, self._cluster, self._progress = settings, images, cluster, progress

    def measure(self, index_uri: str) -> Evaluation:
        """The index beside exact search over its vectors, on the images that the data set has, too."""
        from for_ray.stages.rank import as_columns

        layout = Layout(canonical_uri(index_uri))
        number = self._settings.snapshot
        snapshot = snapshots.latest(layout) if number is None else snapshots.by_id(layout, number)
        bundle = _open_bundle(layout, snapshot)
        job = RangeJob(layout.index_uri, snapshot.fingerprint, snapshot.images_version, run_id="evaluate")
        members = self._compare(job)
        found, exact = self._rank(job, snapshot, members, self._embed(bundle))
        rows = np.sort(members.rows)
        column_of_row = np.full(len(self._images), -1, np.int64)
        column_of_row[rows] = np.arange(len(rows))
        relevant = self._images.relevant()[:, rows]
        methods = []
        for name, rankings in (("index", found), ("exact search", exact)):
            columns = as_columns(rankings, members, column_of_row, DEPTH)
            summary = summarise_rankings(columns, relevant, self._images.is_novel)
            methods.append(Method(name, {}, summary.map50, summary.ap50))
        about = {
            "recall_at_50": recall_at_k(found, exact),
            "index": layout.index_uri,
            "snapshot": snapshot.snapshot_id,
            "codec": snapshot.codec.factory if snapshot.codec else None,
            "nprobe": snapshot.nprobe,
            "images_of_other_data": len(members.strangers),
            **_about(bundle),
        }
        return _evaluation(self._images, relevant, methods, about)

    def _compare(self, job: RangeJob) -> Members:
        from for_ray.stages.rank import find_members

        images = self._images
        with self._progress.stage("compare") as update:
            members = find_members(job.open_table(), images.uris)
            update(len(members.rows))
        num_missing = len(images) - len(members.rows)
        if not len(members.rows):
            raise DataError(
                f"the index {shown(job.index_uri)} holds no image of {images.name}: expected uris like "
                f"{shown(images.uris[0].as_py())}; give the data set's images the place that was indexed"
            )
        if num_missing > self._settings.max_bad_fraction * len(images):
            raise DataError(
                f"the index {shown(job.index_uri)} lacks {num_missing:,} of the {len(images):,} images of "
                f"{images.name}, more than max_bad_fraction allows; index them, or raise it"
            )
        return members

    def _embed(self, bundle: Bundle) -> NDArray[np.float32]:
        from for_ray.model.encoder import load_encoder

        with self._progress.stage("embed", unit="categories") as update:
            queries = load_encoder(bundle, device="cpu").embed_text(self._images.categories)
            update(len(queries))
        return queries

    def _rank(
        self, job: RangeJob, snapshot: Snapshot, members: Members, queries: NDArray[np.float32]
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """The first images of each query through the index, and by exact search."""
        from for_ray.stages.rank import rank_by_index, rank_exactly

        with (
            temporary_folder() as folder,
            self._progress.stage("search", total=len(queries), unit="queries") as update,
        ):
            found = rank_by_index(
                job, snapshot, queries, members, depth=DEPTH, cache_path=folder, on_progress=update
            )
        with failures("exact"), self._progress.stage("exact", unit="queries") as update:
            exact = rank_exactly(self._cluster, job, queries, members, depth=DEPTH)
            update(len(exact))
        return found, exact


def _open_bundle(layout: Layout, snapshot: Snapshot) -> Bundle:
    uri = layout.bundle_uri(snapshot.fingerprint)
    bundle = open_bundle(uri, allow_untrained=True)
    if bundle.fingerprint != snapshot.fingerprint:
        raise DataError(
            f"{shown(uri)} holds the encoder {bundle.fingerprint}, expected {snapshot.fingerprint}; restore "
            "the folder, or build the index anew"
        )
    return bundle


def _about(bundle: Bundle, seconds: float | None = None) -> dict[str, Any]:
    about = {
        "encoder": bundle.name,
        "head": bundle.config.head,
        "num_slots": bundle.num_slots,
        "image_size": bundle.image_size,
        "fingerprint": bundle.fingerprint,
    }
    return about if seconds is None else about | {"seconds": round(seconds, 2)}


def _evaluation(
    images: LabelledImages,
    relevant: NDArray[np.bool_],
    methods: list[Method],
    index: dict[str, Any] | None = None,
) -> Evaluation:
    num_images = relevant.shape[1]
    shares = [
        CategoryShare(share.name, share.group, int(count), int(count) / num_images)
        for share, count in zip(images.shares(), relevant.sum(axis=1), strict=True)
    ]
    return Evaluation(
        dataset=images.name,
        num_images=num_images,
        num_left_out=len(images) - num_images,
        shares=shares,
        methods=methods,
        index=index,
    )
