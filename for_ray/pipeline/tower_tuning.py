"""The recipes of the second paper: from classes, pseudo-captions or pairs to an encoder of head `mcip`.

    read → train → report

The job is that of `pipeline.finetune`: the same record, lease, checkpoints, resume and report; other data
sets (`pipeline.tower_sets`), other workers, and other measures of each epoch (`stages.tower_measures`).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from for_ray.config import FinetuneSettings
from for_ray.config.finetune import HEAD_FIELDS
from for_ray.errors import ConfigError, DataError
from for_ray.model import catalog
from for_ray.model.bundle import open_bundle
from for_ray.pipeline.finetune import DEFAULT_ENCODER, UNDECISIVE, Tuning
from for_ray.pipeline.tower_sets import TowerSet, look_at_some, read_set, read_val, settle_captions
from for_ray.schema import FinetuneRun
from for_ray.stages.finetune_report import FinetuneSummary
from for_ray.stages.progress import Progress
from for_ray.stages.training_data import digest
from for_ray.storage import join_uri

if TYPE_CHECKING:
    from for_ray.model.tower_tuning import AdamWSettings, TuneSettings
    from for_ray.stages.tower_job import TowerJob
    from for_ray.stages.tower_val import TowerVal


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


class TowerTuning(Tuning):
    """One run of the job, of a recipe that tunes towers."""

    def __init__(self, settings: FinetuneSettings, progress: Progress) -> None:
        settings = settle_captions(settings)
        super().__init__(settings, progress)
        self.bundle = open_bundle(
            settings.encoder or DEFAULT_ENCODER, head="clip", image_size=settings.image_size
        )
        self._check_checkpointing()
        with progress.stage("read") as update:
            self.towers: TowerSet = read_set(settings, self.bundle, progress.say)
            self.val: TowerVal | None = read_val(settings, self.bundle, progress.say)
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
            val=self.val,
            read_threads=settings.read_threads,
            max_bad_fraction=settings.max_bad_fraction,
            grad_checkpointing=settings.grad_checkpointing,
        )

    def check_images(self) -> None:
        """Look at some of the images: an epoch is late to find out that they lie elsewhere.

        Raises:
            DataError: None of those of a set that were looked at can be read.
            StorageError: The store refused.
        """
        look_at_some(self.towers.name, self.towers.images, self.bundle.config, self.progress.say)
        if self.val is not None:
            look_at_some(f"--val {self.val.name}", self.val.images, self.bundle.config, self.progress.say)

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
        captions.update(towers.vectors.data if towers.vectors is not None else b"")
        content = [decisive, self.bundle.fingerprint, digest([towers.images]), captions.hexdigest()]
        if self.val is not None:
            content.append(self.val.digest())
            if self.settings.recipe != "realign":  # the prompts decide which names are near
                content.append(self.bundle.text_fingerprint)
        return FinetuneRun(
            identity=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            settings=self.settings.model_dump(mode="json", exclude={"config", "json_", *HEAD_FIELDS}),
            num_images=len(towers.images),
            num_labelled=len(towers.images) if self.settings.recipe != "realign" else 0,
            num_held_out=0,
            num_missing=0,
        )

    def _check_checkpointing(self) -> None:
        """Refuse it before the model is built."""
        from for_ray.model.tower_tuning import no_checkpointing

        settings, config = self.settings, self.bundle.model_config
        is_refused = (
            "hf_model_name" in config["text_cfg"]
            if settings.recipe == "realign"
            else catalog.is_resnet(config)
        )
        if settings.grad_checkpointing and is_refused:
            raise ConfigError(no_checkpointing("text" if settings.recipe == "realign" else "image"))

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
