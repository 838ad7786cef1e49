"""The job that fine-tunes: from a data set and its pseudo-labels to an encoder.

    read → train → report

Nothing is written before the settings, the data and the encoder have been looked at. What decides the result
is hashed to the run's identity: the same run goes on where it ended, and another one in the same place is
refused. `finetune.json` gets its result last: where it names a fingerprint, bundle and report are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from typing import TYPE_CHECKING, NamedTuple

from for_ray.config import FinetuneSettings
from for_ray.config.finetune import TOWER_FIELDS
from for_ray.datasets.labelled import LabelledImages
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.model import catalog
from for_ray.model.bundle import Bundle
from for_ray.model.trained_bundle import HeadSettings, untrained_bundle
from for_ray.reports.training import render_training
from for_ray.schema import FinetuneLayout, FinetuneRun
from for_ray.stages.cluster import Cluster
from for_ray.stages.failures import failures
from for_ray.stages.finetune_report import FinetuneSummary, epoch_line
from for_ray.stages.progress import Progress
from for_ray.stages.training_data import (
    Found,
    LabelTable,
    Parts,
    digest,
    find_images,
    open_labels,
    part_images,
)
from for_ray.storage import Lease, canonical_uri, check_writable, exists, read_bytes, shown, write_bytes

if TYPE_CHECKING:
    from for_ray.model.slot_model import Freeze
    from for_ray.schema import EpochMetrics
    from for_ray.stages.finetune import Finetuned, Workers
    from for_ray.stages.tower_job import TowerJob
    from for_ray.stages.training_job import FinetuneJob

DEFAULT_ENCODER = "picturebook"

RANK_GAMMA_SUP = 0.1

UNDECISIVE = {
    *("dataset", "split", "encoder", "labels", "val", "val_split", "val_labels"),  # their content is hashed
    *("output", "preset", "workers", "device", "read_threads", "max_bad_fraction", "name", "config", "json_"),
    "grad_checkpointing",
}
"""Settings that a run may be continued with whatever they were before: they name places, or say by whom
and how it is trained, which changes rounding and what dropout draws, not what is learnt from."""


def run_finetune(settings: FinetuneSettings, *, progress: Progress) -> FinetuneSummary:
    """Train the head of an encoder, or go on with that; at the end there is a bundle and a report.

    The other recipes are in `pipeline.tower_tuning`.

    Args:
        settings: The job's.
        progress: Where the stages are told.

    Raises:
        ConfigError: The settings cannot be met, or another run lies in the output; nothing was written.
        DataError: The data sets, or the pseudo-labels, are not what they should be; nothing was written.
        StorageError: The store refused; nothing was written.
        StageError: The training failed. Run again, it goes on from its last epoch.
    """
    return HeadTuning(settings, progress).train()


def make_job(settings: FinetuneSettings) -> FinetuneJob:
    """What `run_finetune` would hand to its workers, for those who train without Ray: `training_run`.

    The encoder that it begins with is written to the output, and nothing else.

    Raises:
        ConfigError: See `run_finetune`; likewise for the others.
    """
    run = HeadTuning(settings, Progress(is_quiet=True))
    run.bundle.save(run.layout.start_uri)
    return run.job()


class _Val(NamedTuple):
    """The validation images, and whose categories they show."""

    found: Found
    dataset: LabelledImages


class Tuning:
    """One run of the job, of whatever recipe: who inherits reads the data, and knows what is learnt from it.

    Args:
        settings: The job's.
        progress: Where the stages are told.
    """

    bundle: Bundle

    def __init__(self, settings: FinetuneSettings, progress: Progress) -> None:
        self.started = time.monotonic()
        self.settings, self.progress = settings, progress
        self.layout = FinetuneLayout(canonical_uri(settings.output))

    @property
    def dataset_name(self) -> str:
        """What the report calls the data set."""
        raise NotImplementedError

    @property
    def bundle_name(self) -> str:
        """What people will call the encoder."""
        raise NotImplementedError

    def work(self) -> FinetuneJob | TowerJob:
        """What the workers have to know."""
        raise NotImplementedError

    def check_images(self) -> None:
        """Look at what a run that begins would find out late."""

    def _record(self) -> FinetuneRun:
        """What this run is, before it has any result."""
        raise NotImplementedError

    def train(self) -> FinetuneSummary:
        """Everything from here on is written to the output."""
        run = self._record()
        before = self._record_before(run)
        if before is not None and before.fingerprint is not None:
            return self._nothing_to_do(before)
        if before is None:
            from for_ray.model.towers import check_weights

            check_weights(self.bundle)
            self.check_images()
        check_writable(self.layout.output_uri)
        with contextlib.ExitStack() as stack:
            cluster = Cluster(stack)
            with self.progress.stage("start"):
                workers = _choose_workers(self.settings, cluster)
            lease = stack.enter_context(
                Lease.acquire(self.layout.lease_uri, f"jobs/finetune.py ({run.identity[:8]})")
            )
            before = self._record_before(run)  # another run may have begun meanwhile, or ended
            if before is not None and before.fingerprint is not None:
                return self._nothing_to_do(before)
            with failures("finetune"):
                self.bundle.save(self.layout.start_uri)
                self._write(run)
            done = self._train(run, workers)
            with failures("report"):
                lease.check()
                run = run.model_copy(
                    update={
                        "fingerprint": _saved_fingerprint(self.layout.bundle_uri),
                        "selected_epoch": done.selected_epoch,
                        "epochs": tuple(done.epochs),
                    }
                )
                page = render_training(run, title=f"Fine-tuning of {self.bundle.name} on {self.dataset_name}")
                write_bytes(self.layout.report_uri, page.encode())
                self._write(run)
        return self._summary(run, f"trained {len(run.epochs)} epochs; {shown(self.layout.bundle_uri)}")

    def _train(self, run: FinetuneRun, workers: Workers) -> Finetuned:
        from for_ray.stages.finetune import finetune

        num_epochs, num_images = self.settings.epochs, run.num_images
        with self.progress.stage("train", total=num_epochs * num_images) as update:

            def tell(metrics: EpochMetrics) -> None:
                update(metrics.epoch * num_images)
                self.progress.say(epoch_line(metrics, num_epochs))

            return finetune(
                self.work(),
                workers,
                training_uri=self.layout.training_uri,
                run_name=f"finetune-{run.identity[:16]}",
                bundle_uri=self.layout.bundle_uri,
                bundle_name=self.bundle_name,
                on_epoch=tell,
            )

    def _record_before(self, run: FinetuneRun) -> FinetuneRun | None:
        """What the output says of this run; another one there is refused."""
        if not exists(self.layout.run_uri):
            return None
        try:
            before = FinetuneRun.model_validate_json(read_bytes(self.layout.run_uri))
        except ValueError as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{self.layout.run_uri} is no record of a fine-tuning: {reason}") from error
        if before.identity != run.identity:
            raise ConfigError(_another_run(self.layout, before, run))
        return before

    def _write(self, run: FinetuneRun) -> None:
        write_bytes(self.layout.run_uri, run.model_dump_json(indent=1).encode())

    def _nothing_to_do(self, run: FinetuneRun) -> FinetuneSummary:
        return self._summary(run, f"trained before: {len(run.epochs)} epochs; nothing to do")

    def _summary(self, run: FinetuneRun, message: str) -> FinetuneSummary:
        return FinetuneSummary.of(
            run,
            bundle_uri=self.layout.bundle_uri,
            seconds=time.monotonic() - self.started,
            message=message,
        )


class HeadTuning(Tuning):
    """One run of the job, of recipe `for`."""

    def __init__(self, settings: FinetuneSettings, progress: Progress) -> None:
        super().__init__(settings, progress)
        self.labels = open_labels(canonical_uri(settings.labels)) if settings.labels else None
        self.bundle = _open_encoder(settings, self.labels)
        self.freeze = _choose_freeze(settings, is_resnet=catalog.is_resnet(self.bundle.model_config))
        with progress.stage("read") as update:
            self.dataset = open_dataset(settings.dataset, split=settings.split)
            update(len(self.dataset))
        progress.say(self.dataset.describe())
        self.base = _base_categories(self.dataset)
        self.found = self._find(self.dataset, self.labels, num_categories=len(self.base))
        self.parts: Parts = part_images(
            self.found,
            self.labels,
            held_out=settings.held_out,
            labelled_fraction=settings.labelled_fraction,
            fold=settings.fold,
            labelled_only=not settings.has_pse,
        )
        self.val = self._find_val()
        _check_parts(settings, self.parts)

    @property
    def dataset_name(self) -> str:
        """What the report calls the data set."""
        return self.dataset.name

    @property
    def bundle_name(self) -> str:
        """What people will call the encoder."""
        return self.settings.name or f"{self.bundle.name}, {self.settings.head} fine-tuned"

    def _find(self, dataset: LabelledImages, labels: LabelTable | None, *, num_categories: int) -> Found:
        fits = labels is not None and labels.run.backbone_fingerprint == self.bundle.backbone_fingerprint
        if labels is not None and labels.run.has_features and not fits:
            raise ConfigError(
                f"the features at {labels.layout.output_uri} are of another encoder or image size "
                f"({labels.run.encoder}) than {self.bundle.name}: leave out --encoder and --image-size, or "
                "label with this one"
            )
        if labels is not None and labels.run.text_fingerprint != self.bundle.text_fingerprint:
            raise ConfigError(
                f"the names at {labels.layout.output_uri} were embedded by another encoder, or with other "
                f"prompts ({labels.run.encoder}) than those of {self.bundle.name}: leave out --encoder, or "
                "label with this one"
            )
        return find_images(
            dataset, labels, num_categories=num_categories, max_bad_fraction=self.settings.max_bad_fraction
        )

    def _find_val(self) -> _Val | None:
        settings = self.settings
        if settings.val is None:
            return None
        dataset = open_dataset(settings.val, split=settings.val_split or settings.split)
        labels = open_labels(canonical_uri(settings.val_labels)) if settings.val_labels else None
        return _Val(self._find(dataset, labels, num_categories=len(dataset.categories)), dataset)

    def _record(self) -> FinetuneRun:
        """What this run is, before it has any result."""
        train, held_out, _ = self.parts
        decisive = self.settings.model_dump(mode="json", exclude=UNDECISIVE | TOWER_FIELDS | {"recipe"})
        val = self.val.found.images if self.val is not None else None
        encoder = [self.bundle.fingerprint, self.bundle.text_fingerprint]
        content = [decisive, encoder, self.base, digest([train, held_out, val])]
        if self.val is not None:
            content += [self.val.dataset.categories, self.val.dataset.is_novel.tolist()]
        return FinetuneRun(
            identity=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            settings=self.settings.model_dump(mode="json", exclude={"config", "json_"}),
            num_images=len(train),
            num_labelled=int(train.is_labelled.sum()),
            num_held_out=len(held_out) if held_out is not None else 0,
            num_missing=self.found.num_missing,
        )

    def work(self) -> FinetuneJob:
        """What the workers have to know."""
        return self.job()

    def job(self) -> FinetuneJob:
        """What the workers have to know."""
        from for_ray.model.finetuning import AdamSettings
        from for_ray.model.objectives import LossName, LossSettings
        from for_ray.stages.training_job import FinetuneJob

        settings = self.settings
        is_cosine = settings.lr_schedule == "cosine"
        num_batches = _num_batches(settings, self.parts)
        losses: tuple[LossName, ...] = ("sup",) * settings.has_sup + ("pse",) * settings.has_pse  # type: ignore[assignment]
        return FinetuneJob(
            bundle_uri=self.layout.start_uri,
            freeze=self.freeze,
            losses=LossSettings(
                losses, self._gamma_sup, settings.gamma_pse, settings.null_weight, settings.objective
            ),
            adam=AdamSettings(
                lr=settings.lr,
                lr_drop_epoch=None if is_cosine else settings.lr_drop_epoch,
                warmup_steps=settings.warmup_steps,
                weight_decay=settings.weight_decay,
                num_steps=settings.epochs * num_batches if is_cosine else None,
            ),
            dropout=settings.dropout,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            precision=settings.precision,
            categories=self.base,
            names_text_uri=self.labels.layout.text_uri if self.labels is not None else None,
            train=self.parts.train,
            held_out=self.parts.held_out,
            held_out_pseudo=self.parts.held_out_pseudo,
            val=self.val.found.images if self.val is not None else None,
            val_categories=self.val.dataset.categories if self.val is not None else (),
            val_is_novel=self.val.dataset.is_novel if self.val is not None else None,
            select=settings.select,
            read_threads=settings.read_threads,
            max_bad_fraction=settings.max_bad_fraction,
        )

    @property
    def _gamma_sup(self) -> float:
        """In the ranking loss a larger weight gains on base categories, and loses on novel ones."""
        default = RANK_GAMMA_SUP if self.settings.objective == "rank" else 1.0
        return default if self.settings.gamma_sup is None else self.settings.gamma_sup


def _open_encoder(settings: FinetuneSettings, labels: LabelTable | None) -> Bundle:
    head = HeadSettings(
        head=settings.head,
        num_slots=settings.slots,
        num_layers=settings.layers,
        feedforward_width=settings.feedforward,
        mean_token=settings.mean_token,
        seed=settings.seed,
    )
    own = labels.layout.bundle_uri if labels is not None else DEFAULT_ENCODER
    return untrained_bundle(settings.encoder or own, head, image_size=settings.image_size)


def _choose_freeze(settings: FinetuneSettings, *, is_resnet: bool) -> Freeze:
    """What was asked for; else the paper's, and with the ranking loss nothing: the tuned pooling learns more.

    Raises:
        ConfigError: The tower's pooling layer cannot be tuned.
    """
    is_tuned = settings.head != "sum" or (settings.objective == "rank" and is_resnet)
    freeze = settings.freeze or ("none" if is_tuned else "qkvo")
    if freeze != "qkvo" and not is_resnet:
        way_out = "take freeze qkvo" if settings.head == "sum" else "take head sum"
        raise ConfigError(
            f"only the pooling layer of CLIP's ResNets can be tuned (freeze {freeze}): {way_out}"
        )
    return freeze


def _base_categories(dataset: LabelledImages) -> tuple[str, ...]:
    num_base = int((~dataset.is_novel).sum())
    if not num_base or dataset.is_novel[:num_base].any():
        raise ConfigError(f"{dataset.name} has no base categories to train on: name some with --split")
    return dataset.categories[:num_base]


def _check_parts(settings: FinetuneSettings, parts: Parts) -> None:
    """Refuse what leaves nothing to learn from."""
    num_batches = _num_batches(settings, parts)
    if len(parts.train) // num_batches < settings.workers:  # batches differ by one image at most
        raise DataError(
            f"{len(parts.train)} images make batches of {len(parts.train) // num_batches}, which do not go "
            f"round {settings.workers} workers: take fewer --workers, or another --batch-size"
        )
    if settings.objective == "rank" and len(parts.train) // num_batches < 2:
        raise DataError(
            "the ranking loss compares the images of a batch, and there is a batch of one: take a larger "
            "--batch-size, or --objective set"
        )
    if settings.has_sup and not parts.train.labels.values.size:
        raise DataError(
            f"none of the {int(parts.train.is_labelled.sum()):,} labelled images shows a base category: "
            "take --losses pse, or another --labelled-fraction or --split"
        )


def _num_batches(settings: FinetuneSettings, parts: Parts) -> int:
    return max(1, -(-len(parts.train) // settings.batch_size))


def _choose_workers(settings: FinetuneSettings, cluster: Cluster) -> Workers:
    """By whom it is trained.

    Raises:
        ConfigError: The cluster has no room for so many workers.
    """
    from for_ray.stages.finetune import Workers

    num_cpus, num_gpus = (int(cluster.resources.get(name, 0)) for name in ("CPU", "GPU"))
    use_gpu = settings.device == "cuda" or (settings.device == "auto" and num_gpus > 0)
    room, kind = (num_gpus, "GPUs") if use_gpu else (num_cpus, "CPUs")
    if settings.workers > room and settings.device != "cuda":
        raise ConfigError(
            f"--workers {settings.workers}: the cluster has {room} {kind}; take {room} or fewer"
        )
    threads = 1 if use_gpu else min(cluster.task_cpus, num_cpus // settings.workers)
    return Workers(settings.workers, num_cpus=max(1, threads), use_gpu=use_gpu)


def _saved_fingerprint(bundle_uri: str) -> str:
    from for_ray.model.bundle import open_bundle

    return open_bundle(bundle_uri).fingerprint


def _another_run(layout: FinetuneLayout, before: FinetuneRun, run: FinetuneRun) -> str:
    """What differs, in one line."""
    changed = [
        f"{name} {before.settings.get(name)} → {value}"
        for name, value in run.settings.items()
        if name not in UNDECISIVE and before.settings.get(name) != value
    ]
    vals = [each.settings.get("val") for each in (before, run)]
    if vals.count(None) == 1:
        changed.append(f"val {vals[0]} → {vals[1]}")
    unseen = "images, labels or encoder" if vals == [None, None] else "images, labels, --val or encoder"
    differs = ", ".join(changed[:3]) or f"other {unseen}"
    return (
        f"{shown(layout.output_uri)} holds a fine-tuning with other settings ({differs}): give another "
        "--output, or delete that one"
    )
