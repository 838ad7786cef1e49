"""The recipes of the second paper: from classes, pseudo-captions or pairs to an encoder of head `mcip`.

    read → train → report

The job is that of `pipeline.finetune`: the same record, lease, checkpoints, resume and report; another data
set, and other workers.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.config import FinetuneSettings
from for_ray.config.finetune import HEAD_FIELDS
from for_ray.datasets.captions import open_captioned
from for_ray.datasets.classes import classes_of
from for_ray.datasets.labelled import Ragged
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import open_bundle
from for_ray.pipeline.finetune import DEFAULT_ENCODER, UNDECISIVE, Tuning
from for_ray.schema import FinetuneRun
from for_ray.stages.caption_table import CaptionTable, read_table
from for_ray.stages.finetune_report import FinetuneSummary
from for_ray.stages.progress import Progress
from for_ray.stages.training_data import digest
from for_ray.stages.training_images import TrainingImages
from for_ray.storage import join_uri

if TYPE_CHECKING:
    from for_ray.model.tower_tuning import AdamWSettings, TuneSettings
    from for_ray.stages.tower_job import TowerJob


def run_tower_tuning(settings: FinetuneSettings, *, progress: Progress) -> FinetuneSummary:
    """Tune the towers of an encoder, or go on with that; at the end there is a bundle and a report.

    Args:
        settings: The job's; its recipe is not `for`.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met, or another run lies in the output; nothing was written.
        DataError: The images, classes or captions are not what they should be; nothing was written.
        StorageError: The store refused; nothing was written.
        StageError: The training failed. Run again, it goes on from its last epoch.
    """
    return TowerTuning(settings, progress).train()


def make_tower_job(settings: FinetuneSettings) -> TowerJob:
    """What `run_tower_tuning` would hand to its workers, for those who train without Ray: `tune_here`.

    The encoder that it begins with is written to the output, and nothing else.

    Raises:
        ConfigError: See `run_tower_tuning`; likewise for the others.
    """
    run = TowerTuning(settings, Progress(is_quiet=True))
    run.bundle.save(run.layout.start_uri)
    return run.work()


NUM_LOOKED_AT = 32
"""Images that are opened before the workers start."""


class _Dataset(NamedTuple):
    """What messages call the images, and what they are trained with.

    Attributes:
        name: Of the data set.
        images: With one label each, but for `realign`.
        num_classes: V.
        of_image: The captions of each image.
        vectors: Of the captions; `mcip` alone.
        texts: The captions; `realign` alone.
    """

    name: str
    images: TrainingImages
    num_classes: int
    of_image: Ragged
    vectors: NDArray[np.float16] | None = None
    texts: tuple[str, ...] = ()


class TowerTuning(Tuning):
    """One run of the job, of a recipe that tunes towers."""

    def __init__(self, settings: FinetuneSettings, progress: Progress) -> None:
        super().__init__(settings, progress)
        self.bundle = open_bundle(
            settings.encoder or DEFAULT_ENCODER, head="clip", image_size=settings.image_size
        )
        with progress.stage("read") as update:
            self.towers = self._read_pairs() if settings.recipe == "realign" else self._read_classes()
            update(len(self.towers.images))
        self._check_batches()

    @property
    def dataset_name(self) -> str:
        """What the report calls the data set."""
        return self.towers.name

    @property
    def bundle_name(self) -> str:
        """What people will call the encoder."""
        return self.settings.name or f"{self.bundle.name}, {self.settings.recipe}"

    def work(self) -> TowerJob:
        """What the workers have to know."""
        from for_ray.stages.tower_job import TowerJob

        settings = self.settings
        return TowerJob(
            bundle_uri=self.layout.start_uri,
            vectors_uri=self._vectors_uri(),
            tune=self._tune(),
            adam=self._adam(),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            precision=settings.precision,
            images=self.towers.images,
            num_classes=self.towers.num_classes,
            of_image=self.towers.of_image,
            caption_vectors=self.towers.vectors,
            caption_texts=self.towers.texts,
            read_threads=settings.read_threads,
            max_bad_fraction=settings.max_bad_fraction,
        )

    def check_images(self) -> None:
        """Look at some of the images: an epoch is late to find out that they lie elsewhere.

        Raises:
            DataError: None of those that were looked at can be read.
            StorageError: The store refused.
        """
        from for_ray.stages.training_images import look_at

        looked = look_at(self.towers.images, self.bundle.config, most=NUM_LOOKED_AT)
        if not looked.problems:
            return
        num_bad, worst = len(looked.problems), looked.problems[0]
        found = (
            f"{num_bad} of {looked.num_images} images of {self.towers.name} that were looked at cannot be "
            f"read: {worst}"
        )
        if num_bad == looked.num_images:
            raise DataError(found)
        self.progress.say(f"{found}; an epoch tells of all")

    def _vectors_uri(self) -> str:
        """Named after what decides the vectors: those of another encoder are never taken for these."""
        decisive = f"{self.bundle.fingerprint} {digest([self.towers.images])}"
        name = hashlib.sha256(decisive.encode()).hexdigest()[:16]
        return join_uri(self.layout.output_uri, f"locked-vectors-{name}.safetensors")

    def _tune(self) -> TuneSettings:
        from for_ray.model.tower_tuning import TuneSettings

        settings = self.settings
        if settings.recipe == "for":
            raise ConfigError("recipe for trains a head: it is another pipeline's")
        is_tuned = settings.tune_projection
        return TuneSettings(
            settings.recipe,
            num_blocks=settings.tune_blocks,
            with_projection=settings.recipe == "mcip" if is_tuned is None else is_tuned,
            scale=settings.scale,
            margin=settings.margin,
            gamma_classes=settings.gamma_classes,
            gamma_captions=settings.gamma_captions,
            seed=settings.seed,
        )

    def _adam(self) -> AdamWSettings:
        from for_ray.model.tower_tuning import AdamWSettings

        settings = self.settings
        return AdamWSettings(
            lr=settings.lr,
            lr_end=settings.lr / 10 if settings.lr_end is None else settings.lr_end,
            num_steps=settings.epochs * self._num_steps(),
            weight_decay=settings.weight_decay,
            proxies_factor=settings.proxies_lr_factor,
        )

    def _num_steps(self) -> int:
        """Of an epoch."""
        return max(1, -(-len(self.towers.images) // self.settings.batch_size))

    def _record(self) -> FinetuneRun:
        """What this run is, before it has any result."""
        towers = self.towers
        decisive = self.settings.model_dump(mode="json", exclude=UNDECISIVE | HEAD_FIELDS | {"captions"})
        captions = hashlib.sha256(towers.of_image.offsets.tobytes() + towers.of_image.values.tobytes())
        captions.update("\n".join(towers.texts).encode())
        captions.update(towers.vectors.tobytes() if towers.vectors is not None else b"")
        content = [decisive, self.bundle.fingerprint, digest([towers.images]), captions.hexdigest()]
        return FinetuneRun(
            identity=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            settings=self.settings.model_dump(mode="json", exclude={"config", "json_", *HEAD_FIELDS}),
            num_images=len(towers.images),
            num_labelled=len(towers.images) if self.settings.recipe != "realign" else 0,
            num_held_out=0,
            num_missing=0,
        )

    def _read_classes(self) -> _Dataset:
        settings = self.settings
        dataset = open_dataset(settings.dataset, split=settings.split)
        classes = classes_of(dataset, why=f"--recipe {settings.recipe}")
        rows = np.flatnonzero(classes >= 0)
        uris = pa.chunked_array(dataset.uris).combine_chunks().take(pa.array(rows))
        names, classes = np.unique(classes[rows], return_inverse=True)
        num_alone = int((np.bincount(classes) == 1).sum())
        self.progress.say(
            f"{dataset.name}: {len(rows):,} images of {len(names):,} classes, {num_alone:,} with one image; "
            f"{len(dataset) - len(rows):,} images without a class are left out"
        )
        images = TrainingImages(
            Ragged.of([[label] for label in classes]), np.ones(len(rows), bool), uris=uris.cast(pa.string())
        )
        of_image, vectors = Ragged(np.zeros(len(rows) + 1, np.int64), np.empty(0, np.int32)), None
        if settings.captions is not None:
            table = self._read_captions(settings.captions)
            asked = uris.to_pylist()
            of_image = table.nearest(
                asked, threshold=settings.caption_threshold, most=settings.captions_per_image
            )
            vectors = table.vectors
            self._tell_captions(of_image, table.holds(asked))
        return _Dataset(dataset.name, images, len(names), of_image, vectors)

    def _read_captions(self, output: str) -> CaptionTable:
        table = read_table(output)
        if table.vectors.shape[1] != self.bundle.dim:
            raise ConfigError(
                f"the pseudo-captions at {output} are of an encoder of dimension {table.vectors.shape[1]} "
                f"({table.run.encoder}), this one's is {self.bundle.dim}: compare them with this one"
            )
        if table.run.fingerprint != self.bundle.fingerprint:
            raise ConfigError(
                f"the pseudo-captions at {output} were compared by another encoder ({table.run.encoder}), "
                f"or at another image size, than {self.bundle.name} at {self.bundle.image_size} pixels: give "
                "--encoder and --image-size of then, or compare them with these"
            )
        return table

    def _tell_captions(self, of_image: Ragged, is_held: NDArray[np.bool_]) -> None:
        """Say how many captions the images have; refuse none at all, and those of other images."""
        threshold, output = self.settings.caption_threshold, self.settings.captions
        if not is_held.any():
            raise DataError(
                f"{output} was made for other images: none of these {len(is_held):,} is in it; run "
                "jobs/pseudo_caption.py with this --dataset"
            )
        lengths = np.diff(of_image.offsets)
        if not lengths.any():
            raise DataError(
                f"no image has a pseudo-caption of cosine {threshold} or more in {output}: "
                "lower --caption-threshold, there and here, or take --recipe gpr"
            )
        num_bare = int((lengths[is_held] == 0).sum())
        self.progress.say(
            f"pseudo-captions: {lengths.mean():.1f} an image, {num_bare:,} images without one over "
            f"{threshold}, {int((~is_held).sum()):,} that are not in {output}: the loss on captions leaves "
            "these out"
        )

    def _read_pairs(self) -> _Dataset:
        dataset = open_captioned(self.settings.dataset)
        self.progress.say(dataset.describe())
        uris = dataset.uris.combine_chunks()
        no_labels = Ragged(np.zeros(len(dataset) + 1, np.int64), np.empty(0, np.int32))
        images = TrainingImages(no_labels, np.ones(len(dataset), bool), uris=uris)
        return _Dataset(dataset.name, images, 0, dataset.of_image, texts=dataset.captions.texts)

    def _check_batches(self) -> None:
        smallest = len(self.towers.images) // self._num_steps()
        if smallest < self.settings.workers:
            raise DataError(
                f"{len(self.towers.images)} images make batches of {smallest}, which do not go round "
                f"{self.settings.workers} workers: take fewer --workers, or another --batch-size"
            )
        if self.settings.recipe == "realign" and smallest < 2:
            raise DataError(
                "recipe realign compares the pairs of a batch, and there is a batch of one: take a larger "
                "--batch-size, or more pairs"
            )
