"""A tuning as one worker sees it: what cannot be read or written, what goes on, what is computed twice."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from for_ray.config import FinetuneSettings
from for_ray.datasets.instances import write_instances
from for_ray.errors import StorageError
from for_ray.model.trainer import HaltedError, halt_together
from for_ray.pipeline.tower_tuning import make_tower_job
from for_ray.stages import tower_run
from for_ray.stages.shared_towers import Embedded, SharedTowers
from for_ray.stages.tower_run import TowerRun, tune_here
from for_ray.storage.refusals import disk_refusals, full_disk

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Four things in three views."""
    write_instances(tmp_path / "set", instances=4, views=3, split="train", processes=1)
    return tmp_path / "set"


def settings_of(home: Path, recipe: str, **more: object) -> FinetuneSettings:
    spec = f"pairs:{home}/captions.csv" if recipe == "realign" else f"labels:{home}/labels.csv"
    given = {
        "recipe": recipe, "dataset": spec, "output": str(home.parent / "out"), "image_size": SIZE,
        "epochs": 1, "batch_size": 5, "lr": 1e-4, "device": "cpu", "read_threads": 2,
    }  # fmt: skip
    return FinetuneSettings(**(given | more))


def test_too_many_unreadable_images_stop_it_at_once(home, tmp_path, monkeypatch):
    """An epoch of days is not trained to its end to be thrown away."""
    lines = (home / "labels.csv").read_text().replace("images/", f"{home}/images/").splitlines()
    lines += [f"{tmp_path}/none-{row}.jpg,{lines[1].rsplit(',')[1]}" for row in range(12)]
    (tmp_path / "set.csv").write_text("\n".join(lines))
    more = {"dataset": f"labels:{tmp_path}/set.csv", "batch_size": 3, "max_bad_fraction": 0.05}
    run = TowerRun(make_tower_job(settings_of(home, "gpr", **more)), device="cpu")
    weights, step = [], run.trainer.step

    def take_step(batch, *, step: int, take=step):
        means = take(batch, step=step)
        weights.append(means["classes"].weight)
        return means

    monkeypatch.setattr(run.trainer, "step", take_step)
    with pytest.raises(HaltedError, match=r"^[2-4] of 24 images cannot be read; at most 5% may"):
        run.run_epoch()
    num_unreadable = np.cumsum(3 - np.array(weights))
    assert [num > 0.05 * 24 for num in num_unreadable] == [False] * (len(weights) - 1) + [True]
    assert len(weights) < 8


def test_realign_goes_on_once_its_images_are_there(home, tmp_path, monkeypatch):
    """Whether too many were away, or few: what was embedded before is not embedded again."""
    asked: list[int] = []
    embed_images = SharedTowers.embed_images

    def asking(self: SharedTowers, images) -> Embedded:
        asked.append(len(images))
        return embed_images(self, images)

    monkeypatch.setattr(SharedTowers, "embed_images", asking)
    settings = settings_of(home, "realign", max_bad_fraction=0.1)
    images = sorted((home / "images").iterdir())
    for path in images[4:6]:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(HaltedError, match="2 of 12 images cannot be read"):
        tune_here(make_tower_job(settings))
    images[4].with_suffix(".away").rename(images[4])
    assert tune_here(make_tower_job(settings)).history[0].num_unreadable == 1
    images[5].with_suffix(".away").rename(images[5])
    runs = []
    for is_far in (False, True):  # the second reads them as from a store: through a file that is gone by then
        monkeypatch.setattr(tower_run, "is_s3", lambda _uri, is_far=is_far: is_far)
        runs.append(tune_here(make_tower_job(settings)))
    assert [run.history[0].num_unreadable for run in runs] == [0, 0]
    assert asked == [12, 2, 1]
    whole = tune_here(make_tower_job(settings.model_copy(update={"output": f"{tmp_path}/whole"})))
    assert asked == [12, 2, 1, 12]
    for run in runs:
        torch.testing.assert_close(run._vectors, whole._vectors, atol=1e-3, rtol=0)
    assert torch.equal(runs[0]._vectors, runs[1]._vectors)


def test_activations_are_checkpointed_where_asked(home):
    runs = []
    for is_asked in (False, True):
        job = make_tower_job(settings_of(home, "realign", grad_checkpointing=is_asked))
        runs.append(tune_here(job))
        assert runs[-1].clip.transformer.grad_checkpointing == is_asked
    for name, value in runs[0].trainer.trained.items():
        torch.testing.assert_close(runs[1].trainer.trained[name], value)


def test_vectors_that_find_a_full_disk_halt_it_in_one_line(home, monkeypatch):
    job = make_tower_job(settings_of(home, "realign"))

    def refuse(_path: Path, uri: str) -> None:
        with disk_refusals("write", uri):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(tower_run, "upload", refuse)
        message = (
            f"^cannot write {job.vectors_uri}: no space is left on the disk; free space or choose another"
        )
        with pytest.raises(HaltedError, match=message):
            TowerRun(job, device="cpu").run_epoch()
    assert not Path(job.vectors_uri).exists()
    assert TowerRun(job, device="cpu").run_epoch().num_unreadable == 0
    assert Path(job.vectors_uri).exists()


def _save_with_torch() -> None:
    with Path("/dev/full").open("wb") as file:
        torch.save({"weights": torch.ones(100_000)}, file)


def _save_by_name() -> None:
    try:
        Path("/dev/full").write_bytes(b"weights")
    except OSError as error:
        raise RuntimeError("a checkpoint failed") from error


def _save_vectors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [_save_with_torch, _save_by_name, _save_vectors])
def test_a_full_disk_is_told_from_what_libraries_make_of_it(write):
    assert full_disk(write, "/out") == (
        "cannot write /out: no space is left on the disk; free space or choose another folder"
    )


def test_what_is_no_full_disk_goes_through():
    assert full_disk(lambda: None, "/out") is None

    def refuse(error: Exception) -> None:
        raise error

    for error in (OSError(errno.EIO, "broken"), StorageError("the store is away"), RuntimeError("else")):
        with pytest.raises(type(error), match=str(error.args[-1])):
            full_disk(lambda: refuse(error), "/out")  # noqa: B023


def test_one_worker_that_cannot_go_on_halts_all(monkeypatch):
    device = torch.device("cpu")
    halt_together(None, device)
    with pytest.raises(HaltedError, match=r"^the disk$"):
        halt_together("the disk", device)
    monkeypatch.setattr("for_ray.model.trainer.num_workers", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda num_halted: num_halted.add_(1))
    with pytest.raises(HaltedError, match="another worker cannot go on"):
        halt_together(None, device)
