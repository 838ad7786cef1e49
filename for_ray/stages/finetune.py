"""Fine-tune: Ray Train runs the workers; a checkpoint an epoch, from which a run that died goes on.

    driver     starts the workers (again, when one dies), and hears of each epoch
    worker     `training_run`; rank 0 writes the checkpoints, and the bundle at the end

The run's name is the hash of what decides its result: Ray Train goes on with a run of the same name.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from for_ray.errors import StageError
from for_ray.model.trainer import HaltedError, halt_together
from for_ray.schema import EpochMetrics
from for_ray.stages.failures import failures
from for_ray.stages.tower_job import TowerJob
from for_ray.stages.tower_run import TowerRun
from for_ray.stages.training_job import FinetuneJob
from for_ray.stages.training_run import TrainingRun
from for_ray.storage import arrow_filesystem, temporary_folder
from for_ray.storage.refusals import full_disk

WORKER_RESTARTS = 3
"""How often the workers are started again after one died: a lost node, a killed process."""

CHECKPOINT_FILE = "state.pt"

SECONDS_BETWEEN_LOOKS = 0.5
"""Of the driver, for what the workers tell."""


@dataclass(frozen=True)
class Workers:
    """The processes that train.

    Attributes:
        num_workers: How many.
        num_cpus: CPUs of each, and threads.
        use_gpu: Whether each has a GPU.
    """

    num_workers: int
    num_cpus: int
    use_gpu: bool


class Finetuned(NamedTuple):
    """What came out: the metrics of all epochs, and which of them the bundle is of, from 1."""

    epochs: list[EpochMetrics]
    selected_epoch: int


def finetune(
    job: FinetuneJob | TowerJob,
    workers: Workers,
    *,
    training_uri: str,
    run_name: str,
    bundle_uri: str,
    bundle_name: str,
    on_epoch: Callable[[EpochMetrics], None],
) -> Finetuned:
    """Train to the last epoch, and write the bundle.

    Args:
        job: What is trained.
        workers: By whom.
        training_uri: Where Ray Train keeps checkpoints.
        run_name: Another one is another run; the same goes on where it ended.
        bundle_uri: Where the trained encoder goes.
        bundle_name: What people call it.
        on_epoch: Called with each epoch that ends.

    Raises:
        StageError: The training cannot go on, or workers died again and again.
    """
    filesystem, path = arrow_filesystem(training_uri)
    _quiet()
    with failures("finetune"), _listening(on_epoch) as told:
        trainer = ray.train.torch.TorchTrainer(
            _train,
            train_loop_config={
                "job": job,
                "told": told,
                "device": "cuda" if workers.use_gpu else "cpu",
                "bundle_uri": bundle_uri,
                "bundle_name": bundle_name,
                "training_uri": training_uri,
            },
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.use_gpu,
                resources_per_worker={"CPU": workers.num_cpus, **({"GPU": 1} if workers.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=run_name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        outcome = trainer.fit().return_value
    if outcome["halted"] is not None:
        raise StageError("finetune", outcome["halted"])
    epochs = [EpochMetrics.model_validate_json(metrics) for metrics in outcome["epochs"]]
    return Finetuned(epochs, outcome["selected_epoch"])


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does; what rank 0 returns reaches the driver."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = str(ray.train.torch.get_device()) if config["device"] == "cuda" else "cpu"
    kind = TowerRun if isinstance(config["job"], TowerJob) else TrainingRun
    run = kind(config["job"], device=device, rank=rank, world=world)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
            run.restore(state)
    halted = None
    try:
        while not run.is_done:
            metrics = run.run_epoch()
            _report(run, metrics, rank, config["training_uri"])
            if rank == 0:
                ray.get(config["told"].tell.remote(metrics.model_dump_json()))
    except HaltedError as error:  # all workers find it; trying again would find it again
        halted = str(error)
    if halted is None and rank == 0:
        halted = full_disk(
            lambda: run.save_bundle(config["bundle_uri"], name=config["bundle_name"]), tempfile.gettempdir()
        )
    epochs = [metrics.model_dump_json() for metrics in run.history]
    return {"halted": halted, "epochs": epochs, "selected_epoch": run.selected_epoch}


def _report(run: TrainingRun | TowerRun, metrics: EpochMetrics, rank: int, training_uri: str) -> None:
    """Tell Ray Train of an epoch, all workers at once; rank 0 hands over the checkpoint.

    Raises:
        HaltedError: A disk is full.
    """
    told = {"epoch": metrics.epoch, **metrics.losses}
    checkpoint: Checkpoint | None = None
    with contextlib.ExitStack() as stack:

        def save() -> None:
            nonlocal checkpoint
            if rank == 0:
                folder = stack.enter_context(temporary_folder())
                with (folder / CHECKPOINT_FILE).open("wb") as file:  # by its name torch would not say why not
                    torch.save(run.state(), file)
                checkpoint = Checkpoint.from_directory(folder)

        halt_together(full_disk(save, tempfile.gettempdir()), run.device)
        halt_together(
            full_disk(lambda: ray.train.report(told, checkpoint=checkpoint), training_uri), run.device
        )


class _Told:
    """An actor that keeps what the workers tell until the driver asks for it."""

    def __init__(self) -> None:
        self._told: list[str] = []

    def tell(self, metrics: str) -> None:
        self._told.append(metrics)

    def since(self, first: int) -> list[str]:
        return self._told[first:]


@contextlib.contextmanager
def _listening(on_epoch: Callable[[EpochMetrics], None]) -> Iterator[Any]:
    """The actor; what it is told is passed on, by a thread, as it comes."""
    told = ray.remote(num_cpus=0)(_Told).remote()
    is_over = threading.Event()
    num_heard = 0

    def hear() -> None:
        nonlocal num_heard
        for metrics in ray.get(told.since.remote(num_heard)):
            num_heard += 1
            on_epoch(EpochMetrics.model_validate_json(metrics))

    def listen() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            hear()

    thread = threading.Thread(target=listen, name="training-epochs", daemon=True)
    thread.start()
    try:
        yield told
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            hear()
        ray.kill(told)


def _quiet() -> None:
    """What Ray Train says to the console is for its own people; its log files stay."""
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
