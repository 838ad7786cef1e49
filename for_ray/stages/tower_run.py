"""A tuning of CLIP's towers from its first to its last epoch, as one worker sees it; torch, but not Ray.

    gpr, mcip    rows of a global batch, the same on all workers; worker r reads the pixels of rows r::world.
                 Every worker knows the captions of the whole batch, so that none has to be sent
    realign      before the first epoch the image tower, which is locked, embeds all images once, each worker
                 its part; then an epoch passes over the images, each with one of its captions, drawn anew.
                 The vectors are kept in the output: a run that goes on embeds what it could not read before
    measure      validation images after each epoch, and once before the first: `tower_measures`

The same class runs on a cluster (`stages/finetune.py`) and alone in a benchmark.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.sampling import epoch_batches
from for_ray.model.bundle import Bundle
from for_ray.model.tower_tuning import (
    ClassObjective,
    ImageBatch,
    PairBatch,
    PairObjective,
    TowerTrainer,
    checkpoint_activations,
    save_tuned,
)
from for_ray.model.trainer import HaltedError, halt_together
from for_ray.schema import EpochMetrics
from for_ray.stages.loss_curve import LossCurve
from for_ray.stages.shared_towers import Embedded, SharedTowers
from for_ray.stages.tower_job import TowerJob
from for_ray.stages.tower_measures import TowerMeasures
from for_ray.storage import download, exists, is_s3, local_path, temporary_folder, upload
from for_ray.storage.refusals import full_disk

if TYPE_CHECKING:
    from torch import Tensor


class TowerRun:
    """One worker's part of a tuning; all workers call the same methods at the same time.

    Args:
        job: The tuning.
        device: Where this worker computes.
        rank: Which worker this is.
        world: How many there are; above 1 torch's process group must be there.

    Raises:
        ConfigError: The towers cannot be trained as asked.
        DataError: A file is not what its checksum says.
        StorageError: The store refused.
    """

    def __init__(self, job: TowerJob, *, device: str, rank: int = 0, world: int = 1) -> None:
        self.job, self._rank, self._world = job, rank, world
        self._towers = SharedTowers(job, device=device, rank=rank, world=world)
        self.bundle, self.clip, self.device = self._towers.bundle, self._towers.clip, self._towers.device
        self._num_unreadable = 0
        self._rows = np.arange(len(job.images))
        self._vectors: Tensor | None = None
        self._is_pairs = job.tune.recipe == "realign"
        if job.grad_checkpointing:
            checkpoint_activations(self.clip, job.tune.recipe)
        objective = (
            PairObjective(self.clip)
            if self._is_pairs
            else ClassObjective(self.clip, job.num_classes, self.bundle.dim, job.tune)
        )
        self.trainer = TowerTrainer(objective.to(self.device), job.tune, job.adam, dtype=self._towers.dtype)
        self._measures = None
        if job.val is not None:
            self._measures = TowerMeasures(
                job.val,
                self._towers,
                are_captions=self._is_pairs,
                max_bad_fraction=job.max_bad_fraction,
            )
        self.history: list[EpochMetrics] = []

    @property
    def is_done(self) -> bool:
        """Whether all epochs are over."""
        return len(self.history) >= self.job.epochs

    @property
    def selected_epoch(self) -> int:
        """The epoch whose weights the bundle gets, from 1: the last, whatever was measured."""
        return len(self.history)

    def run_epoch(self) -> EpochMetrics:
        """Train the next epoch, and measure what came of it; before the first, what there was.

        An epoch that was trained is kept, whatever keeps it from being measured.

        Raises:
            HaltedError: The loss is not finite, too many images are unreadable, or what there was before the
                first epoch cannot be measured.
            StorageError: The store refused, or the network failed again and again; not where it is measured
                what came of an epoch.
        """
        started = time.monotonic()
        before = self._measures.measure() if self._measures is not None and not self.history else None
        seconds = time.monotonic() - started
        metrics = self._train(len(self.history))
        started = time.monotonic()
        measured = {"measures_before": before, **self._measure_trained()}
        measured["seconds_measuring"] = seconds + time.monotonic() - started
        metrics = metrics.model_copy(update=measured)
        self.history.append(metrics)
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; tensors and plain values, some of them by reference."""
        history = [metrics.model_dump_json() for metrics in self.history]
        return {"trainer": self.trainer.state(), "history": history}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.trainer.restore(state["trainer"])
        self.history = [EpochMetrics.model_validate_json(metrics) for metrics in state["history"]]

    def save_bundle(self, uri: str, *, name: str | None = None) -> Bundle:
        """Write the encoder that came out; one worker does it for all."""
        return save_tuned(self.bundle, self.clip, uri, recipe=self.job.tune.recipe, name=name)

    def _measure_trained(self) -> dict[str, Any]:
        """What is known of an epoch besides its training."""
        if self._measures is None:
            return {}
        measures, problem = None, None
        try:
            measures = self._measures.measure(goes_on=True)
        except HaltedError as error:  # all workers find it: they see the same vectors
            problem = str(error)
        unreadable = self._measures.num_unreadable
        return {"measures": measures, "val_problem": problem, "num_val_unreadable": unreadable}

    def _train(self, epoch: int) -> EpochMetrics:
        job, started = self.job, time.monotonic()
        if self._is_pairs and self._vectors is None:
            self._embed_images()
        batches = epoch_batches(len(self._rows), batch_size=job.batch_size, seed=job.seed, epoch=epoch)
        curve, self._num_unreadable = LossCurve(len(batches)), self._num_unreadable if self._is_pairs else 0
        coming: Iterator[ImageBatch | PairBatch] = (
            self._pairs(batches, epoch) if self._is_pairs else self._images(batches)
        )
        for index, batch in enumerate(coming):
            means = self.trainer.step(batch, step=epoch * len(batches) + index)
            curve.add(means)
            if not self._is_pairs:  # each image that any worker could read weighs 1
                self._num_unreadable += len(batches[index]) - round(means["classes"].weight)
                self._check_readable()
        self.trainer.check(epoch)
        return EpochMetrics(
            epoch=epoch + 1,
            lr=job.adam.lr_at((epoch + 1) * len(batches) - 1),
            num_unreadable=self._num_unreadable,
            seconds=time.monotonic() - started,
            **(curve.totals(epoch * len(batches)) | {"num_matched": {}, "num_dropped": {}}),
        )

    # gpr, mcip

    def _images(self, batches: list[NDArray[np.int64]]) -> Iterator[ImageBatch]:
        import torch

        mine = [rows[self._rank :: self._world] for rows in batches]
        reader = self._towers.reader(self.job.images)
        for rows, own, read in zip(batches, mine, reader.batches(mine), strict=True):
            classes = self.job.images.labels.select(own).values.astype(np.int64)
            parts = (torch.from_numpy(each) for each in (classes, *self._captions(rows, own)))
            labels, captions, is_own = (each.to(self.device, non_blocking=True) for each in parts)
            is_known = read.is_readable.to(self.device, non_blocking=True)
            yield ImageBatch(self._towers.normalised(read), labels, is_known, captions, is_own)

    def _captions(
        self, rows: NDArray[np.int64], own: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The distinct captions of a batch's images [M, D], and which are whose of this worker's [b, M]."""
        vectors = self.job.caption_vectors
        if vectors is None:
            return np.empty((0, self.bundle.dim), np.float32), np.zeros((len(own), 0), bool)
        used = np.unique(self.job.of_image.select(rows).values)
        lists = self.job.of_image.select(own)
        is_own = np.zeros((len(own), len(used)), bool)
        owners = np.repeat(np.arange(len(own)), np.diff(lists.offsets))
        is_own[owners, np.searchsorted(used, lists.values)] = True
        return vectors[used].astype(np.float32), is_own

    def _check_readable(self) -> None:
        job = self.job
        if self._num_unreadable > job.max_bad_fraction * len(job.images):
            raise HaltedError(
                f"{self._num_unreadable:,} of {len(job.images):,} images cannot be read; at most "
                f"{job.max_bad_fraction:.0%} may (--max-bad-fraction)"
            )

    # realign

    def _embed_images(self) -> None:
        """Vectors of all images, once; what cannot be read is left out of the training.

        What is found is kept before too many unreadable images end the run: once these are there, the next
        run embeds them alone.
        """
        images, kept, found = self.job.images, self._kept_vectors(), None
        if kept is None:
            kept = found = self._towers.embed_images(images)
        elif len(missing := np.flatnonzero(~kept.is_readable.numpy())):
            found = self._towers.embed_images(images.select(missing))
            kept.vectors[missing], kept.is_readable[missing] = found
        if found is not None and found.is_readable.any():
            halt_together(self._keep_vectors(kept), self.device)
        self._rows = np.flatnonzero(kept.is_readable.numpy())
        self._num_unreadable = len(images) - len(self._rows)
        self._check_readable()
        self._vectors = kept.vectors

    def _kept_vectors(self) -> Embedded | None:
        """Those of a run before; mapped from the disk, so that memory holds what is used of them."""
        from safetensors.torch import load_file

        uri = self.job.vectors_uri
        if not exists(uri):
            return None
        with contextlib.ExitStack() as stack:
            if is_s3(uri):  # the mapping outlives the file's name
                path = stack.enter_context(temporary_folder()) / "vectors.safetensors"
                download(uri, path)
            else:
                path = local_path(uri)
            return Embedded(**load_file(path))

    def _keep_vectors(self, found: Embedded) -> str | None:
        """By rank 0, through a file: a large object reaches a store in parts. Says where a disk is full."""
        from safetensors.torch import save_file

        def write() -> None:
            with temporary_folder() as folder:
                save_file(found._asdict(), folder / "vectors.safetensors")
                upload(folder / "vectors.safetensors", self.job.vectors_uri)

        return full_disk(write, tempfile.gettempdir()) if self._rank == 0 else None

    def _pairs(self, batches: list[NDArray[np.int64]], epoch: int) -> Iterator[PairBatch]:
        import torch

        if self._vectors is None:
            raise ValueError("the images are not embedded")
        for index, places in enumerate(batches):
            rows = self._rows[places]
            rng = np.random.default_rng([self.job.seed, epoch, index])
            drawn = [self._draw_caption(rng, row) for row in rows.tolist()]
            # By worker, so that each worker's part is one piece: the loss does not depend on the order.
            parts = [rows[rank :: self._world] for rank in range(self._world)]
            first = sum(len(part) for part in parts[: self._rank])
            images = self._vectors[torch.from_numpy(np.concatenate(parts))]
            tokens = self._towers.tokens(drawn[self._rank :: self._world])
            yield PairBatch(tokens, images.float().to(self.device), first)

    def _draw_caption(self, rng: np.random.Generator, row: int) -> str:
        own = self.job.of_image.row(row)
        return self.job.caption_texts[int(own[int(rng.integers(len(own)))])]


def tune_here(job: TowerJob, *, device: str = "cpu") -> TowerRun:
    """All epochs, in this process alone, without a checkpoint: benchmarks and tests."""
    run = TowerRun(job, device=device)
    while not run.is_done:
        run.run_epoch()
    return run
