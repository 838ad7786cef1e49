"""The job that fine-tunes, up to where Ray begins: what it would train, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.config import FinetuneSettings
from for_ray.datasets.sampling import pick_share
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import open_bundle
from for_ray.pipeline.finetune import HeadTuning, _choose_freeze, make_job, run_finetune
from for_ray.stages.progress import Progress
from for_ray.stages.training_run import train_here
from tests.planted_labels import BASE, draw_dataset, write_labels

QUIET = Progress(is_quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    draw_dataset(folder / "data", 24)
    write_labels(folder / "labels", folder / "data" / "images")
    return folder


@pytest.fixture
def given(home: Path, tmp_path: Path) -> dict[str, object]:
    """The settings that all tests begin with."""
    return {
        "dataset": f"coco:{home}/data/annotations.json:{home}/data/images",
        "split": str(home / "data" / "split.json"), "labels": str(home / "labels"),
        "output": str(tmp_path / "out"), "slots": 4, "layers": 1, "feedforward": 32, "lr": 1e-4, "epochs": 2,
        "batch_size": 8, "held_out": 0.25, "device": "cpu",
    }  # fmt: skip


def test_the_settings_become_the_job(given, home):
    changes = {
        "losses": "pse", "gamma_pse": 3, "null_weight": 0, "freeze": "vo", "mean_token": True, "seed": 5,
        "lr_drop_epoch": None, "warmup_steps": 7, "weight_decay": 0.1, "dropout": 0.3, "select": "best",
        "val": given["dataset"], "labelled_fraction": 0.5,
    }  # fmt: skip
    job = make_job(FinetuneSettings(**(given | changes)))
    assert (job.losses.losses, job.losses.gamma("pse"), job.losses.null_weight) == (("pse",), 3, 0)
    assert (job.adam.lr, job.adam.lr_drop_epoch, job.adam.warmup_steps, job.adam.weight_decay) == (
        1e-4,
        None,
        7,
        0.1,
    )
    assert (job.freeze, job.dropout, job.seed, job.select, job.epochs) == ("vo", 0.3, 5, "best", 2)
    assert set(job.categories) == set(BASE)
    assert (len(job.train), len(job.held_out), len(job.val)) == (18, 6, 24)
    assert job.train.is_labelled.sum() + job.held_out.is_labelled.sum() == 12
    assert (job.train.has_features, job.val.has_features) == (True, False)
    assert job.val_is_novel.sum() == 2
    config = open_bundle(job.bundle_uri, allow_untrained=True).config
    assert (config.head, config.num_slots, config.decoder_layers, config.decoder_width) == ("sum", 4, 1, 32)
    assert (config.mean_token, config.head_seed) == (True, 5)


def test_labels_alone_need_no_table_and_clip_is_tuned_whole(given):
    """FT-CLIP and FT-Dense-CLIP, from images."""
    for head in ("clip", "dense"):
        changes = {"labels": None, "encoder": "picturebook", "losses": "sup", "head": head}
        job = make_job(FinetuneSettings(**(given | changes | {"output": f"{given['output']}-{head}"})))
        assert job.freeze == "none"
        run = train_here(job, device="cpu")
        assert 0 <= run.history[-1].held_out_base <= 1
        assert run.history[-1].held_out_pseudo is None
        bundle = run.save_bundle(f"{given['output']}-{head}/bundle")
        assert (bundle.config.head, bundle.config.tuned_pooling) == (head, True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": "/nowhere"}, DataError, "no pseudo-labels at /nowhere: run jobs/pseudo_label.py"),
        ({"encoder": "open_clip:RN50@random"}, ConfigError, "has random weights"),
        (
            {"image_size": 128},
            ConfigError,
            "are of another encoder or image size (picturebook) than picturebook",
        ),
        (
            {"workers": 64, "batch_size": 64},
            DataError,
            "18 images make batches of 18, which do not go round 64 workers",
        ),
        (
            {"workers": 5, "batch_size": 5},
            DataError,
            "18 images make batches of 4, which do not go round 5 workers",
        ),
        ({"batch_size": 1}, DataError, "there is a batch of one: take a larger --batch-size, or --objective"),
        ({"dataset": "flickr:x"}, ConfigError, "no such data set: 'flickr:x'"),
        ({"split": "/nowhere.json"}, ConfigError, "/nowhere.json"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(given, changes, error, message):
    with pytest.raises(error) as caught:
        run_finetune(FinetuneSettings(**(given | changes)), progress=QUIET)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(str(given["output"])).exists()


@pytest.mark.parametrize(
    ("given", "is_resnet", "freeze"),
    [
        ({}, True, "none"),
        ({}, False, "qkvo"),
        ({"objective": "set"}, True, "qkvo"),
        ({"freeze": "vo"}, True, "vo"),
        ({"head": "clip", "objective": "set"}, True, "none"),
        ({"head": "clip"}, False, "take head sum"),
        ({"freeze": "none"}, False, "take freeze qkvo"),
    ],
)
def test_what_is_frozen_goes_with_head_objective_and_tower(given, is_resnet, freeze):
    settings = FinetuneSettings(dataset="picturebook:d", output="o", losses="sup", **given)
    if freeze.startswith("take"):
        with pytest.raises(ConfigError, match=freeze):
            _choose_freeze(settings, is_resnet=is_resnet)
    else:
        assert _choose_freeze(settings, is_resnet=is_resnet) == freeze


def test_labels_that_teach_nothing_are_refused(given):
    """The only labelled image of this fold is the one that shows no category."""
    names = [f"{number:04d}.png" for number in range(24)]
    fold = next(fold for fold in range(1000) if pick_share(names, 0.001, key=f"labelled {fold}")[-1])
    changes = {"labelled_fraction": 0.001, "fold": fold, "held_out": 0.0}
    with pytest.raises(
        DataError, match=r"none of the 1 labelled images shows a base category: take --losses"
    ):
        run_finetune(FinetuneSettings(**(given | changes)), progress=QUIET)


def test_another_run_in_the_same_place_is_refused(given, tmp_path):
    record = HeadTuning(FinetuneSettings(**given), QUIET)._record()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune.json").write_text(record.model_dump_json())
    with pytest.raises(
        ConfigError, match=r"holds a fine-tuning with other settings \(lr 0.0001 → 0.01\): give"
    ):
        run_finetune(FinetuneSettings(**(given | {"lr": 0.01})), progress=QUIET)
    with pytest.raises(ConfigError, match=r"labelled_fraction 1\.0 → 0\.5"):
        run_finetune(FinetuneSettings(**(given | {"labelled_fraction": 0.5})), progress=QUIET)
    with pytest.raises(ConfigError, match=r"other settings \(val None → "):
        run_finetune(FinetuneSettings(**(given | {"val": given["dataset"]})), progress=QUIET)
    other = record.model_copy(update={"identity": "f" * 64})
    for val, differs in ((None, "images, labels or"), ("coco:b", "images, labels, --val or")):
        other = other.model_copy(update={"settings": other.settings | {"val": val}})
        (tmp_path / "out" / "finetune.json").write_text(other.model_dump_json())
        more = {"val": given["dataset"]} if val else {}
        with pytest.raises(ConfigError, match=rf"other settings \(other {differs} encoder\): give"):
            run_finetune(FinetuneSettings(**(given | more)), progress=QUIET)
    (tmp_path / "out" / "finetune.json").write_text("[]")
    with pytest.raises(DataError, match=r"finetune.json is no record of a fine-tuning"):
        run_finetune(FinetuneSettings(**given), progress=QUIET)


def test_what_does_not_change_the_result_is_the_same_run(given):
    def identity(**changes: object) -> str:
        return HeadTuning(FinetuneSettings(**(given | changes)), QUIET)._record().identity

    assert identity() == identity(workers=2, output="elsewhere", name="x", read_threads=1, device="auto")
    assert len({identity(), identity(seed=1), identity(slots=5), identity(held_out=0.1)}) == 4


def test_a_finished_run_says_so(given, tmp_path):
    """Nothing is trained, nothing is written."""
    settings = FinetuneSettings(**given)
    run = train_here(make_job(settings), device="cpu")
    fingerprint = run.save_bundle(str(tmp_path / "out" / "bundle")).fingerprint
    record = HeadTuning(settings, QUIET)._record()
    done = {"epochs": tuple(run.history), "selected_epoch": 2, "fingerprint": fingerprint}
    (tmp_path / "out" / "finetune.json").write_text(record.model_copy(update=done).model_dump_json())
    summary = run_finetune(settings, progress=QUIET)
    assert summary.message == "trained before: 2 epochs; nothing to do"
    assert (summary.epochs, summary.fingerprint, summary.map50) == (2, fingerprint, None)
    assert summary.held_out_map50 == run.history[1].held_out
    assert not (tmp_path / "out" / "report.html").exists()
