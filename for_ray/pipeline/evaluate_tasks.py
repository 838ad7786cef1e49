"""The tasks of the second paper: pictures by pictures, k-NN, zero-shot, and pictures by captions.

    image-to-image, knn    embed the images → compare them with each other
    zero-shot              score the images with the names of the classes, through the prompts
    text-to-image          score the images with all captions, as they stand

Encoders with several vectors an image are measured, too: as a search would rank with them.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.config import EvaluateSettings
from for_ray.datasets.captions import CaptionedImages, open_captioned
from for_ray.datasets.classes import ClassImages, no_pair
from for_ray.datasets.spec import open_dataset
from for_ray.errors import DataError
from for_ray.evaluation.similarity import (
    RANKS,
    VectorSets,
    image_to_image,
    knn_accuracy,
    text_to_image,
    zero_shot_accuracy,
)
from for_ray.model.bundle import Bundle
from for_ray.pipeline.evaluate import folder_of, open_encoders
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.progress import Progress
from for_ray.stages.task_results import TaskEvaluation, TaskMethod
from for_ray.storage import check_writable, write_bytes

# Ray and torch take seconds to import: what is wrong with the settings or the data is said before.
if TYPE_CHECKING:
    from for_ray.stages.encode import Pool
    from for_ray.stages.score import Scores

TASKS = ("image-to-image", "knn", "zero-shot", "text-to-image")


def open_images(settings: EvaluateSettings) -> ClassImages | CaptionedImages:
    """What the task is about.

    Raises:
        ConfigError: The spec is of another kind.
        DataError: The files cannot be read, or images have no class, or several.
        StorageError: The store refused.
    """
    if settings.task == "text-to-image":
        return open_captioned(settings.dataset)
    dataset = open_dataset(settings.dataset, split=settings.split)
    found = ClassImages.of(dataset, why=f"--task {settings.task}")
    if _is_with_itself(settings) and not found.has_pair:
        raise DataError(f"--task {settings.task}: {no_pair(found.name)}")
    return found


def _is_with_itself(settings: EvaluateSettings) -> bool:
    """Whether the images of a set are to find each other."""
    return settings.task == "image-to-image" or (settings.task == "knn" and settings.gallery is None)


def run_task(settings: EvaluateSettings, *, progress: Progress) -> TaskEvaluation:
    """Measure encoders on one of `TASKS`.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met.
        DataError: See `open_images`, or no image could be read.
        StorageError: The store refused.
        StageError: Encoding failed, or too many images cannot be read.
    """
    if settings.csv is not None:
        check_writable(folder_of(settings.csv))
    bundles = open_encoders(settings)
    with contextlib.ExitStack() as stack:
        evaluation = TaskRun(settings, Cluster(stack), progress).measure(bundles)
    if settings.csv is not None:
        write_bytes(settings.csv, evaluation.to_csv().encode())
    return evaluation


class TaskRun:
    """Encoders on one of the tasks.

    Args:
        settings: The job's.
        cluster: Where it runs.
        progress: Where the stages are told.

    Raises:
        ConfigError: See `open_images`; likewise for the others.
    """

    def __init__(self, settings: EvaluateSettings, cluster: Cluster, progress: Progress) -> None:
        self._settings, self._cluster, self._progress = settings, cluster, progress
        with progress.stage("read", unit="images") as update:
            self._images = open_images(settings)
            update(len(self._images.uris))
        if isinstance(self._images, CaptionedImages):
            progress.say(self._images.describe())
        self._gallery: ClassImages | None = None
        if settings.gallery is not None:
            self._gallery = ClassImages.of(open_dataset(settings.gallery), why="--gallery")

    def measure(self, bundles: dict[str, Bundle]) -> TaskEvaluation:
        """All encoders; each on the images that it could read, which are the same for all."""
        from for_ray.model.towers import check_weights

        for bundle in bundles.values():
            check_weights(bundle)
        with self._progress.stage("start"):
            _ = self._cluster.resources
        methods: list[TaskMethod] = []
        counts: dict[str, int] = {}
        num_images = 0
        for name, bundle in bundles.items():
            self._progress.say(f"encoder  {name}")
            started = time.monotonic()
            measures, num_images, counts = self._measure(bundle)
            about = _about(bundle, time.monotonic() - started)
            methods.append(TaskMethod(name, about, measures))
        num_bare = self._images.num_bare if isinstance(self._images, ClassImages) else 0
        return TaskEvaluation(
            task=self._settings.task,
            dataset=self._images.name,
            num_images=num_images,
            num_left_out=len(self._images.uris) - num_images + num_bare,
            counts=counts,
            methods=methods,
        )

    def _measure(self, bundle: Bundle) -> tuple[dict[str, float], int, dict[str, int]]:
        """Measures, the number of images, and what else there is to know."""
        images = self._images
        if isinstance(images, CaptionedImages):
            return self._measure_captions(bundle, images)
        num_classes = {"classes": len(np.unique(images.classes))}
        if self._settings.task == "zero-shot":
            scores = self._score(bundle, images.uris, images.names, are_captions=False)
            classes = _some(images.classes[scores.is_read], images.name)
            found = zero_shot_accuracy(scores.values[:, scores.is_read], classes)
            return {"accuracy": found}, len(classes), num_classes
        embedded = self._embed(bundle, images.uris)
        is_read = embedded.is_read
        classes, vectors = _some(images.classes[is_read], images.name), embedded.select(is_read)
        if self._settings.task == "knn":
            alone = {}
            if self._gallery is None:  # without a neighbour of their class they are wrong in any case
                alone = {"alone_in_their_class": int((np.bincount(classes) == 1).sum())}
            return {"accuracy": self._knn(bundle, vectors, classes)}, len(classes), num_classes | alone
        if np.bincount(classes).max() < 2:
            num_unread = len(images.uris) - len(classes)
            lacking = no_pair(images.name, are_read=True)
            raise DataError(f"--task image-to-image: {lacking}; {num_unread:,} cannot be read")
        ranked = image_to_image(vectors, classes)
        measures = {"mAP": ranked.mean_average_precision, "R@1": ranked.recall_at_1}
        return measures, len(classes), num_classes | {"alone_in_their_class": ranked.num_alone}

    def _knn(self, bundle: Bundle, vectors: VectorSets, classes: NDArray[np.int64]) -> float:
        """With the neighbours of another set, classes are matched by name."""
        k = self._settings.neighbours
        gallery, images = self._gallery, self._images
        if gallery is None or not isinstance(images, ClassImages):
            return knn_accuracy(vectors, classes, k=k)
        held = self._embed(bundle, gallery.uris)
        number = {name: place for place, name in enumerate(images.names)}
        for name in gallery.names:
            number.setdefault(name, len(number))
        numbers = np.array([number[name] for name in gallery.names])
        held_classes = _some(numbers[gallery.classes][held.is_read], gallery.name)
        return knn_accuracy(
            vectors, classes, gallery=held.select(held.is_read), gallery_classes=held_classes, k=k
        )

    def _measure_captions(
        self, bundle: Bundle, images: CaptionedImages
    ) -> tuple[dict[str, float], int, dict[str, int]]:
        scores = self._score(bundle, images.uris, images.captions.texts, are_captions=True)
        rows = _some(np.flatnonzero(scores.is_read), images.name)
        of_image = images.of_image.select(rows)
        owners = np.repeat(np.arange(len(rows)), np.diff(of_image.offsets))
        found = text_to_image(scores.values[:, rows], of_image.values, owners, RANKS)
        measures = {f"R@{k}": value for k, value in zip(RANKS, found, strict=True)}
        return measures, len(rows), {"captions": len(np.unique(of_image.values))}

    def _score(
        self, bundle: Bundle, uris: pa.ChunkedArray, names: tuple[str, ...], *, are_captions: bool
    ) -> Scores:
        from for_ray.stages.score import ScoreJob, score_images

        settings = self._settings
        job = ScoreJob.of(
            bundle,
            names,
            device=settings.device,
            batch_size=settings.batch_size,
            read_threads=settings.read_threads,
            are_captions=are_captions,
        )
        with failures("score"), self._progress.stage("score", total=len(uris)) as update:
            most_bad = settings.max_bad_fraction * len(uris)
            return score_images(uris, job, self._pool(len(uris)), most_bad=most_bad, on_progress=update)

    def _embed(self, bundle: Bundle, uris: pa.ChunkedArray) -> VectorSets:
        from for_ray.stages.embed import EmbedJob, embed_images

        settings = self._settings
        job = EmbedJob.of(
            bundle, device=settings.device, batch_size=settings.batch_size, read_threads=settings.read_threads
        )
        with failures("embed"), self._progress.stage("embed", total=len(uris)) as update:
            most_bad = settings.max_bad_fraction * len(uris)
            return embed_images(uris, job, self._pool(len(uris)), most_bad=most_bad, on_progress=update)

    def _pool(self, num_images: int) -> Pool:
        from for_ray.stages.encode import choose_pool

        settings = self._settings
        return choose_pool(
            self._cluster.resources,
            num_batches=-(-num_images // settings.batch_size),
            min_actors=settings.min_actors,
            max_actors=settings.max_actors,
            device=settings.device,
        )


def _some(found: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    if not len(found):
        raise DataError(f"no image of {name} could be read, so there is nothing to measure")
    return found


def _about(bundle: Bundle, seconds: float) -> dict[str, Any]:
    return {
        "encoder": bundle.name,
        "head": bundle.config.head,
        "num_slots": bundle.num_slots,
        "image_size": bundle.image_size,
        "fingerprint": bundle.fingerprint,
        "seconds": round(seconds, 2),
    }
