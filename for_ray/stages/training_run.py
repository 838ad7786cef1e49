"""A fine-tuning from its first to its last epoch, as one worker sees it; it knows torch, but not Ray.

    batches     rows of a global batch, the same on all workers; worker r takes rows r::world of each
    read        features (or pixels) and pseudo-labels, ahead of the step that needs them
    step        `model.finetuning`
    measure     mAP@50 on validation images, and on held-out ones; each worker encodes its part

The same class runs on a cluster (`stages/finetune.py`) and alone in a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.federated import FederatedCandidates
from for_ray.datasets.sampling import epoch_batches, pad
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.encoder_config import POOLING_PREFIX
from for_ray.model.finetuning import Finetuner, max_cosines, set_dropout
from for_ray.model.objectives import LossLabels, LossName, Objective, RankObjective
from for_ray.model.slot_model import SlotModel, as_features, as_tokens
from for_ray.model.trained_bundle import save_trained
from for_ray.model.trainer import HaltedError
from for_ray.schema import EpochMetrics
from for_ray.stages.loss_curve import LossCurve
from for_ray.stages.training_images import BatchReader, ReadBatch, TrainingImages
from for_ray.stages.training_job import FinetuneJob
from for_ray.stages.training_measures import Measures
from for_ray.storage import read_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from for_ray.model.backbone import Features


NAMES_A_STEP = 1024
"""Of the vocabulary, that a step of the ranking loss is about: all 21,843 would cost more than the head."""


@dataclass(frozen=True)
class Best:
    """The epoch that measured best on held-out images, and its weights."""

    epoch: int
    measure: float
    state: dict[str, Tensor]


Gathered = TypeVar("Gathered")


class TrainingRun:
    """One worker's part of a fine-tuning; all workers call the same methods at the same time.

    Args:
        job: The fine-tuning.
        device: Where this worker computes.
        rank: Which worker this is.
        world: How many there are; above 1 torch's process group must be there.

    Raises:
        ConfigError: The head cannot be trained as asked.
        DataError: A file is not what its checksum says.
        StorageError: The store refused.
    """

    def __init__(self, job: FinetuneJob, *, device: str, rank: int = 0, world: int = 1) -> None:
        self.job, self._rank, self._world = job, rank, world
        self.bundle: Bundle = open_bundle(job.bundle_uri, allow_untrained=True)
        encoder = load_encoder(self.bundle, device, precision=job.precision)
        self.device, self._dtype = encoder.device, choose_dtype(job.precision, encoder.device)
        self.slots = _make_slots(encoder, job)
        self._texts = {name: self._text(name, encoder) for name in job.losses.losses}
        val_text = _embed(encoder, job.val_categories) if job.val is not None else None
        self._measures = Measures(job, self._texts, val_text, self.score)
        objective = self._make_objective(encoder.logit_scale).to(self.device)
        self._num_others = len(objective.others) if isinstance(objective, RankObjective) else 0
        self.finetuner = Finetuner(objective, job.losses, job.adam, dtype=self._dtype)
        self._candidates = _federated(job)
        sets = [images for images in (job.train, job.held_out, job.val) if images is not None]
        self._encoder = None if all(images.has_features for images in sets) else encoder
        self.history: list[EpochMetrics] = []
        self._best: Best | None = None

    def _make_objective(self, logit_scale: float) -> Objective | RankObjective:
        losses = self.job.losses
        if losses.objective == "set":
            return Objective(self.slots, self._texts, losses, logit_scale=logit_scale)
        with_positions = self.bundle.config.dense_positions
        return RankObjective(
            self.slots, self._texts, losses, logit_scale=logit_scale, with_positions=with_positions
        )

    @property
    def is_done(self) -> bool:
        """Whether all epochs are over."""
        return len(self.history) >= self.job.epochs

    @property
    def selected_epoch(self) -> int:
        """The epoch whose weights the bundle gets, from 1."""
        return self._best.epoch if self._best is not None else len(self.history)

    def run_epoch(self) -> EpochMetrics:
        """Train the next epoch, and measure what came of it.

        Raises:
            HaltedError: The loss is not finite, or too many images are unreadable.
        """
        metrics = self._train(len(self.history))
        started = time.monotonic()
        measured = {"val": self._measures.val(), **self._measures.held_out()}
        seconds = time.monotonic() - started
        metrics = metrics.model_copy(update={**measured, "seconds_measuring": seconds})
        self.history.append(metrics)
        if self.job.select == "best" and metrics.held_out is not None:
            self._keep_best(metrics.held_out)
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; tensors and plain values, some of them by reference."""
        best = None
        if self._best is not None:
            best = {"epoch": self._best.epoch, "measure": self._best.measure, "state": self._best.state}
        history = [metrics.model_dump_json() for metrics in self.history]
        return {"finetuner": self.finetuner.state(), "history": history, "best": best}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.finetuner.restore(state["finetuner"])
        self.history = [EpochMetrics.model_validate_json(metrics) for metrics in state["history"]]
        self._best = Best(**state["best"]) if state["best"] is not None else None

    def select_best(self) -> None:
        """Go back to the weights of the selected epoch: those that the bundle gets."""
        import torch

        if self._best is None:
            return
        held = self.slots.head.state_dict(keep_vars=True)
        held |= {f"{POOLING_PREFIX}{name}": value for name, value in self.slots.pooling.named_parameters()}
        with torch.no_grad():
            for name, value in self._best.state.items():
                held[name].copy_(value)

    def embed(self, names: Sequence[str]) -> Tensor:
        """Names as unit vectors [V, D], on this worker's device."""
        return _embed(load_encoder(self.bundle, str(self.device)), names)

    def save_bundle(self, uri: str, *, name: str | None = None) -> Bundle:
        """Write the encoder that came out; one worker does it for all."""
        state = self._best.state if self._best is not None else self.slots.trained_state()
        return save_trained(self.bundle, state, uri, name=name)

    def _train(self, epoch: int) -> EpochMetrics:
        job, started = self.job, time.monotonic()
        batches = epoch_batches(len(job.train), batch_size=job.batch_size, seed=job.seed, epoch=epoch)
        mine = [rows[self._rank :: self._world] for rows in batches]
        curve, num_unreadable = LossCurve(len(batches)), 0
        _seed_torch(job.seed, epoch, self._rank)
        is_set = job.losses.objective == "set"
        reader = self._reader(job.train, with_pseudo=is_set and "pse" in job.losses.losses)
        for index, batch in enumerate(reader.batches(mine)):
            labels = self._labels(batch, batches[index], epoch=epoch, index=index)
            step = epoch * len(batches) + index
            curve.add(self.finetuner.step(self._features(job.train, batch), labels, epoch=epoch, step=step))
            num_unreadable += int((~batch.is_readable).sum())
        self.finetuner.check(epoch)
        num_unreadable = sum(self._gather(num_unreadable))
        if num_unreadable > job.max_bad_fraction * len(job.train):
            raise HaltedError(
                f"{num_unreadable:,} of {len(job.train):,} images cannot be read; at most "
                f"{job.max_bad_fraction:.0%} may (--max-bad-fraction)"
            )
        last_step = (epoch + 1) * len(batches) - 1
        return EpochMetrics(
            epoch=epoch + 1,
            lr=job.adam.lr_at(epoch, last_step),
            num_unreadable=num_unreadable,
            seconds=time.monotonic() - started,
            **curve.totals(epoch * len(batches)),
        )

    def _labels(
        self, batch: ReadBatch, rows: NDArray[np.int64], *, epoch: int, index: int
    ) -> dict[LossName, LossLabels]:
        """The labels of this worker's part of a global batch."""
        import torch

        train, mine = self.job.train, rows[self._rank :: self._world]
        most_rows = -(-len(rows) // self._world)
        labels: dict[LossName, LossLabels] = {}
        if "sup" in self.job.losses.losses:
            candidates = None
            if self._candidates is not None:
                if self.job.losses.objective == "rank":  # what nobody looked for is not absent
                    found = self._candidates.annotated(rows)
                else:
                    found = self._candidates.draw(rows, seed=(self.job.seed, epoch, index))
                candidates = torch.from_numpy(found[self._rank :: self._world])
            known = torch.from_numpy(train.is_labelled[mine]) & batch.is_readable
            padded = torch.from_numpy(pad(train.labels.select(mine)))
            labels["sup"] = LossLabels(padded, known, candidates=candidates, most_rows=most_rows)
        if "pse" in self.job.losses.losses:
            names = self._draw_names(epoch, index)
            labels["pse"] = LossLabels(batch.pseudo, batch.is_readable, names=names, most_rows=most_rows)
        return {name: each.to(self.device) for name, each in labels.items()}

    def _draw_names(self, epoch: int, index: int) -> Tensor | None:
        """The names that a step's ranking loss is about, the same on all workers; None: all."""
        import torch

        if self._num_others <= NAMES_A_STEP:
            return None
        drawn = np.random.default_rng([self.job.seed, epoch, index]).choice(
            self._num_others, NAMES_A_STEP, replace=False
        )
        return torch.from_numpy(drawn)

    def _features(self, images: TrainingImages, batch: ReadBatch) -> Features:
        import torch

        if batch.tokens is not None and images.run is not None:
            tokens = batch.tokens.to(self.device, non_blocking=True).float()
            run = images.run
            return as_features(tokens, num_prefix=run.num_prefix, height=run.height, width=run.width)
        if self._encoder is None or batch.pixels is None:
            raise ValueError("neither features nor pixels were read")
        with torch.no_grad():
            features = self._encoder.features(batch.pixels)
        return as_features(
            as_tokens(features).float(),
            num_prefix=features.prefix.shape[1],
            height=features.height,
            width=features.width,
        )

    def _reader(self, images: TrainingImages, *, with_pseudo: bool = False) -> BatchReader:
        return BatchReader(
            images,
            self.bundle.config,
            with_pseudo=with_pseudo,
            threads=self.job.read_threads,
            is_pinned=self.device.type == "cuda",
        )

    def score(self, images: TrainingImages, text: Tensor) -> NDArray[np.float32]:
        """Each category's score of each image [V, B]; the workers share the images, and all get all."""
        import torch

        self.slots.eval()
        rows = np.arange(len(images))[self._rank :: self._world]
        batches = np.array_split(rows, max(1, -(-len(rows) * self._world // self.job.batch_size)))
        parts = [np.empty((len(text), 0), np.float32)]
        is_lower = self._dtype != torch.float32
        for batch in self._reader(images).batches(batches):
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, dtype=self._dtype if is_lower else None, enabled=is_lower),
            ):
                vectors = self.slots(self._features(images, batch))
            threshold, rule = self.bundle.config.keep_threshold, self.bundle.keep_rule
            found = max_cosines(vectors, text, keep_threshold=threshold, keep_rule=rule)
            parts.append(np.where(batch.is_readable.numpy(), found.cpu().numpy(), np.float32(-2.0)))
        scores = np.empty((len(text), len(images)), np.float32)
        for rank, part in enumerate(self._gather(np.concatenate(parts, axis=1))):
            scores[:, rank :: self._world] = part
        return scores

    def _keep_best(self, measure: float) -> None:
        if self._best is None or measure > self._best.measure:
            state = {name: value.clone() for name, value in self.slots.trained_state().items()}
            self._best = Best(len(self.history), measure, state)

    def _gather(self, mine: Gathered) -> list[Gathered]:
        """What every worker has, by rank."""
        if self._world == 1:
            return [mine]
        from torch import distributed

        found: list[Any] = [None] * self._world
        distributed.all_gather_object(found, mine)
        return found

    def _text(self, name: LossName, encoder: Encoder) -> Tensor:
        if name == "sup":
            return _embed(encoder, self.job.categories)
        from safetensors.torch import load

        text: Tensor = load(read_bytes(str(self.job.names_text_uri)))["text"]
        return text.to(encoder.device)


def _make_slots(encoder: Encoder, job: FinetuneJob) -> SlotModel:
    set_dropout(encoder.head, job.dropout)
    return SlotModel(encoder.head, encoder.pooling, freeze=job.freeze)


def _federated(job: FinetuneJob) -> FederatedCandidates | None:
    if job.train.negatives is None:
        return None
    return FederatedCandidates(job.train.labels, job.train.negatives, len(job.categories))


def _embed(encoder: Encoder, names: Sequence[str]) -> Tensor:
    import torch

    return torch.from_numpy(encoder.embed_text(names)).to(encoder.device)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What is computed in: on a CPU float32, on a GPU a lower one, unless `precision` names one."""
    import torch

    if precision != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _seed_torch(seed: int, epoch: int, rank: int) -> None:
    """Dropout's: the same after a restart; workers drop different things."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))


def train_here(job: FinetuneJob, *, device: str = "auto") -> TrainingRun:
    """All epochs, in this process alone, without a checkpoint: benchmarks."""
    run = TrainingRun(job, device=device)
    while not run.is_done:
        run.run_epoch()
    return run
