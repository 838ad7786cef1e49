"""The job that fine-tunes, on a small data set: what comes out, what a kill costs, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from for_ray.config import FinetuneSettings, IndexSettings
from for_ray.errors import ConfigError, StageError
from for_ray.index import table
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder, trained_state
from for_ray.pipeline.finetune import make_job, run_finetune
from for_ray.pipeline.index import run_index
from for_ray.schema import FinetuneRun, Layout
from for_ray.stages.progress import Progress
from for_ray.stages.training_run import TrainingRun, train_here
from for_ray.storage import Entry, list_objects, read_bytes
from tests.planted_labels import draw_dataset, write_labels
from tests.seaweed import environment, seaweed

JOB = Path(__file__).parents[2] / "jobs" / "finetune.py"
NUM_IMAGES = 24
QUIET = Progress(is_quiet=True)


@pytest.fixture(scope="module")
def home(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    draw_dataset(folder / "data", NUM_IMAGES)
    write_labels(folder / "labels", folder / "data" / "images")
    write_labels(folder / "broken", folder / "data" / "images", not_a_number=("0005.png",))
    return folder


@pytest.fixture
def given(home: Path, tmp_path: Path) -> dict[str, object]:
    """The settings that all tests begin with; a learning rate at which float noise does not grow."""
    dataset = f"coco:{home}/data/annotations.json:{home}/data/images"
    return {
        "dataset": dataset, "split": str(home / "data" / "split.json"), "labels": str(home / "labels"),
        "output": str(tmp_path / "out"), "slots": 4, "layers": 1, "feedforward": 32, "lr": 1e-4,
        "lr_drop_epoch": 2, "epochs": 3, "batch_size": 8, "held_out": 0.25, "device": "cpu",
        "val": dataset, "val_labels": str(home / "labels"),
    }  # fmt: skip


def flags(given: dict[str, object]) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [word for pair in pairs for word in pair]


def job_environment(address: str) -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}


def run_job(given: dict[str, object], *more: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), *flags(given), *more]
    return subprocess.run(command, env=job_environment(address), capture_output=True, text=True)


def list_of(uri: str) -> list[Entry]:
    return list(itertools.chain.from_iterable(list_objects(uri)))


def alone(settings: FinetuneSettings) -> TrainingRun:
    """The same fine-tuning in this process, by one worker, without a stop."""
    return train_here(make_job(settings), device="cpu")


def check_same(bundle_uri: str, record: FinetuneRun, expected: TrainingRun) -> None:
    """The bundle and the metrics are those of the other run, but for the order of float sums."""
    state = trained_state(open_bundle(bundle_uri))
    for name, value in expected.slots.trained_state().items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert len(record.epochs) == len(expected.history)
    for mine, its in zip(record.epochs, expected.history, strict=True):
        assert mine.losses == pytest.approx(its.losses, rel=1e-4)
        assert mine.val == pytest.approx(its.val, abs=0.02)
        assert (mine.lr, mine.num_matched, mine.num_dropped) == (its.lr, its.num_matched, its.num_dropped)


def record_of(settings: dict[str, object]) -> FinetuneRun:
    return FinetuneRun.model_validate_json(Path(str(settings["output"]), "finetune.json").read_text())


@pytest.mark.slow
@pytest.mark.s3
def test_two_workers_learn_what_one_learns_and_the_command_tells_it(given, tmp_path):
    """The paper's losses, in a bucket, on a cluster of its own. No dropout, which differs by worker."""
    with seaweed() as server, environment(server):
        output = f"s3://{server.make_bucket()}/for"
        changed = given | {
            "dropout": 0.0,
            "batch_size": 7,
            "name": "mine",
            "output": output,
            "objective": "set",
        }
        done = run_job(changed | {"workers": 2}, "--json", address="local")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])  # a raylet may have warned before
        assert (told["images"], told["labelled"], told["held_out"], told["epochs"]) == (18, 18, 6, 3)
        record = FinetuneRun.model_validate_json(read_bytes(f"{output}/finetune.json"))
        assert told["map50"] == record.epochs[2].val
        assert (told["bundle"], told["fingerprint"]) == (f"{output}/bundle", record.fingerprint)
        assert open_bundle(told["bundle"]).name == "mine"
        check_same(told["bundle"], record, alone(FinetuneSettings(**changed)))
        page = read_bytes(f"{output}/report.html").decode()
        checkpoints = {entry.uri.split("/")[-2] for entry in list_of(f"{output}/training")}
        again = run_job(changed, address="local")
    assert told["fingerprint"] in page
    assert "Validation: mAP@50" in page
    assert len([name for name in checkpoints if name.startswith("checkpoint_")]) == 2
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.strip().endswith("trained before: 3 epochs; nothing to do")


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_epoch(given, ray_address, home, tmp_path):
    """Driver and workers die after some epochs; the next run trains the rest, and comes to the same end.

    The ranking loss, which is the default.
    The encoder that comes out goes into an index.
    """
    changed = given | {"epochs": 15, "lr_drop_epoch": 10}
    command = [sys.executable, str(JOB), *flags(changed)]
    job = subprocess.Popen(
        command, env=job_environment(ray_address), stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    lines = []
    for line in job.stderr:
        lines.append(line)
        if line.startswith("epoch 4 of 15"):
            break
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert lines[-1].startswith("epoch 4 of 15"), lines
    assert record_of(changed).fingerprint is None
    assert not Path(str(given["output"]), "bundle").exists()
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    settings = FinetuneSettings(**changed)
    summary = run_finetune(settings, progress=progress)
    epochs = [int(line.split()[1]) for line in heard if line.startswith("epoch")]
    assert epochs == list(range(epochs[0], 16))
    assert epochs[0] > 1  # an epoch whose checkpoint was on its way may be trained again
    record = record_of(changed)
    assert [metrics.epoch for metrics in record.epochs] == list(range(1, 16))
    check_same(summary.bundle, record, alone(settings))

    index = run_index(
        IndexSettings(
            images=str(home / "data" / "images"), index=str(tmp_path / "index"), encoder=summary.bundle
        ),
        progress=QUIET,
    )
    assert (index.listed, index.indexed) == (NUM_IMAGES, NUM_IMAGES)
    encoder = load_encoder(open_bundle(summary.bundle), "cpu")
    rows = table.open_table(Layout(str(tmp_path / "index")).images_uri(summary.fingerprint)).to_table()
    for uri, vectors in zip(rows["uri"].to_pylist()[:3], rows["vectors"].to_pylist()[:3], strict=True):
        expected = encoder.embed_image(Path(uri).read_bytes())
        np.testing.assert_allclose(np.array(vectors, np.float32), expected, atol=2e-3)


@pytest.mark.slow
def test_features_that_are_not_finite_end_it_in_one_line(given, home):
    """At once: starting the workers again would find the same."""
    settings = FinetuneSettings(**(given | {"labels": str(home / "broken"), "val": None, "val_labels": None}))
    with pytest.raises(StageError) as caught:
        run_finetune(settings, progress=QUIET)
    message = "the vectors of 1 images are not finite; take a lower --lr, more --warmup-steps or --precision"
    assert re.fullmatch(rf"finetune: epoch 1, step \d: {message} float32", str(caught.value))
    assert not Path(str(given["output"]), "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 5}, "--workers 5: the cluster has 4 CPUs; take 4 or fewer"),
        ({"device": "auto", "workers": 3}, "--workers 3: the cluster has 2 GPUs; take 2 or fewer"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(given, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_finetune(FinetuneSettings(**(given | changes)), progress=QUIET)
    assert not Path(str(given["output"])).exists()
