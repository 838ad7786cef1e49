"""A whole fine-tuning in one process: features or images, what stays frozen, and going on after a stop."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from for_ray.datasets import federated
from for_ray.datasets.labelled import Ragged
from for_ray.datasets.spec import open_dataset
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.finetuning import AdamSettings
from for_ray.model.objectives import LossSettings
from for_ray.model.trained_bundle import HeadSettings, untrained_bundle
from for_ray.model.trainer import HaltedError
from for_ray.stages import training_run
from for_ray.stages.training_data import find_images, open_labels, part_images
from for_ray.stages.training_job import FinetuneJob
from for_ray.stages.training_run import TrainingRun, train_here
from tests.planted_labels import BASE, draw_dataset, write_labels

MakeJob = Callable[..., FinetuneJob]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_dataset(folder / "data", 24)
    write_labels(folder / "labels", folder / "data" / "images")
    write_labels(folder / "plain", folder / "data" / "images", with_features=False)
    return folder


@pytest.fixture
def make_job(home: Path, tmp_path: Path) -> MakeJob:
    """A job on the planted data: `labels` names the table, `head` the kind; the rest are the job's fields."""

    def make(labels: str = "labels", head: str = "sum", **fields) -> FinetuneJob:
        data = home / "data"
        dataset = open_dataset(f"coco:{data}/annotations.json:{data}/images", split=str(data / "split.json"))
        table = open_labels(str(home / labels))
        parts = part_images(
            find_images(dataset, table, num_categories=len(BASE)),
            table,
            held_out=0.25,
            labelled_fraction=1.0,
            fold=0,
        )
        settings = HeadSettings(head=head, num_slots=4, num_layers=1, feedforward_width=32)
        bundle = untrained_bundle("picturebook", settings)
        bundle.save(str(tmp_path / f"start-{head}"))
        given = {
            "bundle_uri": str(tmp_path / f"start-{head}"),
            "freeze": "qkvo" if head == "sum" else "none",
            "losses": LossSettings(),
            "adam": AdamSettings(lr=1e-3, lr_drop_epoch=2),
            "dropout": 0.1,
            "epochs": 3,
            "batch_size": 8,
            "seed": 0,
            "precision": "auto",
            "categories": dataset.categories[: len(BASE)],
            "names_text_uri": table.layout.text_uri,
            "train": parts.train,
            "held_out": parts.held_out,
            "held_out_pseudo": parts.held_out_pseudo,
            "val": find_images(dataset, table, num_categories=len(dataset.categories)).images,
            "val_categories": dataset.categories,
            "val_is_novel": dataset.is_novel,
        }
        return FinetuneJob(**(given | fields))

    return make


def weights(run: TrainingRun) -> dict[str, torch.Tensor]:
    return run.slots.trained_state()


@pytest.mark.parametrize("losses", [("sup", "pse"), ("sup",), ("pse",)])
def test_the_ranking_loss_is_learnt(make_job, losses):
    settings = LossSettings(losses, objective="rank")
    run = train_here(make_job(epochs=6, dropout=0.0, freeze="none", losses=settings), device="cpu")
    first, last = (run.history[epoch].losses for epoch in (0, -1))
    assert set(last) == set(losses)
    assert 0 < sum(last.values()) < sum(first.values())


def test_it_learns_and_measures(make_job):
    run = train_here(make_job(epochs=12, dropout=0.0), device="cpu")
    first, last = run.history[0], run.history[-1]
    assert [metrics.epoch for metrics in run.history] == list(range(1, 13))
    assert last.losses["sup"] < first.losses["sup"]
    assert last.losses["pse"] < first.losses["pse"]
    assert [metrics.lr for metrics in run.history[:3]] == [1e-3, 1e-3, pytest.approx(1e-4)]
    assert [point.step for point in last.curve] == [34, 35, 36]
    points = [point.losses["sup"] for point in last.curve]
    assert min(points) < last.losses["sup"] < max(points)  # weighted: test_loss_curve
    assert all(0 <= last.val[group] <= 1 for group in ("base", "novel", "all"))
    assert last.held_out == pytest.approx((last.held_out_base + last.held_out_pseudo) / 2)
    assert run.selected_epoch == 12


def test_measures_are_those_of_the_bundle_that_comes_out(make_job, tmp_path):
    """mAP@50 by the saved encoder's own `encode`, written out, equals the last epoch's."""
    job = make_job()
    run = train_here(job, device="cpu")
    run.save_bundle(str(tmp_path / "bundle"), name="mine")
    encoder = load_encoder(open_bundle(str(tmp_path / "bundle")), "cpu")
    text = torch.from_numpy(encoder.embed_text(job.val_categories))
    scores = run.score(job.val, text)
    reader = run._reader(dataclasses.replace(job.val))
    batch = reader.read(np.arange(len(job.val)))
    with torch.no_grad():
        slots = encoder.head(run._features(job.val, batch), encoder.pooling).vectors
    from for_ray.model.boxes import apart_slots

    keep = apart_slots(slots, encoder.bundle.config.keep_threshold)
    for image in range(len(job.val)):
        expected = (slots[image][keep[image]] @ text.T).amax(dim=0)
        np.testing.assert_allclose(scores[:, image], expected, atol=1e-5)
    precisions = []
    for category in range(len(job.val_categories)):
        shown = [category in job.val.labels.row(image) for image in range(len(job.val))]
        ranked = [shown[image] for image in np.argsort(-scores[category], kind="stable")[:50]]
        hits = [sum(ranked[: rank + 1]) / (rank + 1) for rank, is_hit in enumerate(ranked) if is_hit]
        precisions.append(sum(hits) / min(50, sum(shown)))
    assert run.history[-1].val["all"] == pytest.approx(np.mean(precisions))
    assert run.history[-1].val["novel"] == pytest.approx(np.mean(np.array(precisions)[job.val_is_novel]))


@pytest.mark.parametrize(
    ("head", "freeze", "changed"),
    [
        ("sum", "qkvo", set()),
        ("sum", "vo", {"q_proj", "k_proj"}),
        ("sum", "none", {"q_proj", "k_proj", "v_proj", "c_proj"}),
        ("clip", "none", {"q_proj", "k_proj", "v_proj", "c_proj"}),
        ("dense", "none", {"v_proj", "c_proj"}),
    ],
)
def test_frozen_weights_are_bit_equal_after_training(make_job, tmp_path, head, freeze, changed):
    job = make_job(head=head, freeze=freeze, epochs=1, val=None, held_out=None)
    before = load_encoder(open_bundle(job.bundle_uri, allow_untrained=True), "cpu").state_dict()
    train_here(job, device="cpu").save_bundle(str(tmp_path / "bundle"))
    after = load_encoder(open_bundle(str(tmp_path / "bundle")), "cpu").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in moved if name.startswith("pooling.")} == changed
    of_head = {name for name in before if name.startswith("head.")}
    assert {name for name in moved if name.startswith("head.")} == of_head
    # The tower's own names for the pooling layer; nothing else of it has moved.
    rest = {name for name in moved if not name.startswith(("head.", "pooling."))}
    assert all(".attnpool." in name for name in rest)


@pytest.mark.parametrize(("objective", "freeze"), [("set", "qkvo"), ("rank", "none")])
def test_stopping_after_each_epoch_and_going_on_changes_nothing(
    make_job, tmp_path, monkeypatch, objective, freeze
):
    """Dropout, the optimizer's moments and the names that are drawn included, bit for bit."""
    monkeypatch.setattr(training_run, "NAMES_A_STEP", 3)
    losses = LossSettings(objective=objective)
    job = make_job(select="best", losses=losses, freeze=freeze)
    whole = train_here(job, device="cpu")
    for _ in range(job.epochs):
        run = TrainingRun(job, device="cpu")
        if (tmp_path / "state.pt").exists():
            run.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        run.run_epoch()
        torch.save(run.state(), tmp_path / "state.pt")
    assert run.is_done
    assert run.selected_epoch == whole.selected_epoch
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name
    without_clock = {"seconds", "seconds_measuring"}
    assert [each.model_dump(exclude=without_clock) for each in run.history] == [
        each.model_dump(exclude=without_clock) for each in whole.history
    ]
    mine = [run.save_bundle(str(tmp_path / name)).fingerprint for name in ("one", "two")]
    assert mine[0] == mine[1] == whole.save_bundle(str(tmp_path / "whole")).fingerprint


def test_the_best_epoch_is_kept_by_its_measure_on_held_out_images(make_job, tmp_path):
    job = make_job(select="best", epochs=4, adam=AdamSettings(lr=3e-3))
    run = train_here(job, device="cpu")
    measures = [metrics.held_out for metrics in run.history]
    assert run.selected_epoch == int(np.argmax(measures)) + 1
    run.select_best()
    shorter = train_here(dataclasses.replace(job, epochs=run.selected_epoch, select="last"), device="cpu")
    expected = shorter.save_bundle(str(tmp_path / "shorter")).fingerprint
    assert run.save_bundle(str(tmp_path / "best")).fingerprint == expected
    for name, value in weights(shorter).items():
        assert torch.equal(value, weights(run)[name])
    text = run.embed(job.categories)
    np.testing.assert_array_equal(run.score(job.val, text), shorter.score(job.val, text))


def test_images_teach_what_their_features_teach(make_job):
    """But for the float16 that features are kept in."""
    jobs = [make_job(labels, dropout=0.0, val=None, epochs=1) for labels in ("labels", "plain")]
    runs = [TrainingRun(job, device="cpu") for job in jobs]
    rows = np.array([3, 0, 7])
    batches = [run._reader(run.job.train, with_pseudo=True).read(rows) for run in runs]
    assert torch.equal(batches[0].pseudo, batches[1].pseudo)
    found = [run._features(run.job.train, batch) for run, batch in zip(runs, batches, strict=True)]
    for name in ("cells", "prefix"):
        mine, its = (getattr(features, name) for features in found)
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    losses = [run.run_epoch().losses for run in runs]
    for name in ("sup", "pse"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=0.1)


def test_an_image_that_cannot_be_read_is_counted_and_too_many_stop_it(make_job, tmp_path):
    job = make_job("plain", val=None, held_out=None, epochs=1)
    shutil.copytree(Path(job.train.uris[0].as_py()).parent, tmp_path / "images")
    names = [Path(uri).name for uri in job.train.uris.to_pylist()]
    (tmp_path / "images" / names[0]).write_bytes(b"no image")
    (tmp_path / "images" / names[1]).unlink()
    import pyarrow as pa

    moved = pa.array([str(tmp_path / "images" / name) for name in names])
    train = dataclasses.replace(job.train, uris=moved, etags=None)
    run = train_here(dataclasses.replace(job, train=train, max_bad_fraction=0.2), device="cpu")
    assert run.history[0].num_unreadable == 2
    with pytest.raises(HaltedError, match=r"2 of 18 images cannot be read; at most 5% may"):
        train_here(dataclasses.replace(job, train=train), device="cpu")


def test_images_without_labels_serve_the_pseudo_labels_alone(make_job):
    """With no labelled image at all, L_sup is 0 and teaches nothing; the result is that of L_pse alone."""
    job = make_job(val=None, held_out=None, epochs=2, dropout=0.0, adam=AdamSettings(lr=1e-3))
    nothing = Ragged.of([[]] * len(job.train))
    train = dataclasses.replace(job.train, labels=nothing, is_labelled=np.zeros(len(job.train), bool))
    both = train_here(dataclasses.replace(job, train=train), device="cpu")
    alone = train_here(dataclasses.replace(job, losses=LossSettings(("pse",))), device="cpu")
    assert both.history[-1].losses["sup"] == 0.0
    for name, value in weights(alone).items():
        torch.testing.assert_close(value, weights(both)[name], rtol=1e-4, atol=1e-6)


def test_annotated_negatives_bound_the_softmax(make_job, monkeypatch):
    """LVIS: where none is drawn, an image without annotated negatives has its labels as candidates."""
    monkeypatch.setattr(federated, "LEAST_NEGATIVES", 0)
    losses = LossSettings(("sup",), null_weight=0.0)
    job = make_job(val=None, held_out=None, epochs=1, dropout=0.0, losses=losses)
    one = Ragged.of([[0]] * len(job.train))
    found = []
    for negatives in ([], range(len(BASE))):
        absent = Ragged.of([list(negatives)] * len(job.train))
        train = dataclasses.replace(job.train, labels=one, negatives=absent)
        run = train_here(dataclasses.replace(job, train=train), device="cpu")
        found.append(run.history[0].losses["sup"])
    plain = dataclasses.replace(job, train=dataclasses.replace(job.train, labels=one))
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] == pytest.approx(train_here(plain, device="cpu").history[0].losses["sup"], rel=1e-6)
    assert found[1] > 0.1


def test_for_the_ranking_loss_only_annotated_categories_are_absent(make_job):
    """An image in which nobody looked for a category takes no part in that category's order."""
    losses = LossSettings(("sup",), objective="rank")
    job = make_job(val=None, held_out=None, epochs=1, dropout=0.0, freeze="none", losses=losses)
    found = {}
    for name, negatives in {"nobody looked": [], "all absent": range(len(BASE))}.items():
        absent = Ragged.of([list(negatives)] * len(job.train))
        train = dataclasses.replace(job.train, negatives=absent)
        run = TrainingRun(dataclasses.replace(job, train=train), device="cpu")
        batch = run._reader(train).read(np.arange(8))
        labels = run._labels(batch, np.arange(8), epoch=0, index=0)["sup"]
        found[name] = labels.candidates
    shown = np.zeros((8, len(BASE)), bool)
    for row in range(8):
        shown[row, job.train.labels.row(row)] = True
    assert found["nobody looked"].numpy().tolist() == shown.tolist()
    assert found["all absent"].all()
