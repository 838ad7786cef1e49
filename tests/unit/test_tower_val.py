"""What the epochs of the recipes that tune towers are measured on, up to where Ray begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from for_ray.config import FinetuneSettings
from for_ray.datasets.captions import open_captioned
from for_ray.datasets.classes import classes_of
from for_ray.datasets.instances import write_instances
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.evaluation.similarity import VectorSets, image_to_image, text_to_image, zero_shot_accuracy
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.trainer import HaltedError
from for_ray.pipeline.tower_tuning import TowerTuning, make_tower_job, run_tower_tuning
from for_ray.stages.progress import Progress
from for_ray.stages.shared_towers import Embedded, SharedTowers
from for_ray.stages.tower_run import TowerRun

QUIET = Progress(is_quiet=True)
SIZE = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three things in two views to tune on, three others to measure on; never changed."""
    folder = tmp_path_factory.mktemp("towers")
    for name, split in (("set", "train"), ("val", "val")):
        write_instances(folder / name, instances=3, views=2, split=split, processes=1)
    return folder


@pytest.fixture
def given(home: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "recipe": "gpr", "dataset": f"labels:{home}/set/labels.csv", "val": f"labels:{home}/val/labels.csv",
        "output": str(tmp_path / "out"), "image_size": SIZE, "epochs": 2, "batch_size": 3, "lr": 1e-3,
        "device": "cpu", "read_threads": 2,
    }  # fmt: skip


@pytest.fixture
def of_pairs(given: dict[str, object], home: Path) -> dict[str, object]:
    pairs = {
        name: f"pairs:{home}/{folder}/captions.csv" for name, folder in (("dataset", "set"), ("val", "val"))
    }
    return given | {"recipe": "realign"} | pairs


def lines_of(home: Path) -> list[str]:
    """Of the table of validation images, with uris that hold anywhere; the header first."""
    return (home / "val" / "labels.csv").read_text().replace("images/", f"{home}/val/images/").splitlines()


def vectors_of(encoder: Encoder, uris: list[str]) -> np.ndarray:
    return np.concatenate([encoder.embed_image(Path(uri).read_bytes()) for uri in uris]).astype(np.float16)


def evaluated(bundle: Bundle, spec: str) -> dict[str, float]:
    """As `jobs/evaluate.py --task` measures class images."""
    dataset = open_dataset(spec)
    encoder = load_encoder(bundle, "cpu")
    vectors, classes = vectors_of(encoder, dataset.uris.to_pylist()), classes_of(dataset, why="the test")
    found = image_to_image(VectorSets(np.arange(len(vectors) + 1), vectors), classes)
    scores = encoder.embed_text(dataset.categories) @ vectors.T.astype(np.float32)
    return {
        "image-to-image mAP": found.mean_average_precision,
        "image-to-image R@1": found.recall_at_1,
        "zero-shot accuracy": zero_shot_accuracy(scores, classes),
    }


def test_images_and_names_are_measured_before_the_first_epoch_and_after_each(given):
    settings = FinetuneSettings(**given)
    job = make_tower_job(settings)
    run, second = TowerRun(job, device="cpu"), TowerRun(job, device="cpu")
    run.run_epoch()
    second.restore(run.state())
    second.run_epoch()
    start, end = open_bundle(job.bundle_uri), second.save_bundle(f"{given['output']}/bundle")
    first, last = second.history
    assert first == run.history[0]
    assert first.measures_before == pytest.approx(evaluated(start, str(given["val"])))
    assert last.measures == pytest.approx(evaluated(end, str(given["val"])))
    assert last.measures_before is None
    assert first.measures_before != first.measures
    assert first.seconds_measuring > 0
    bare = TowerRun(make_tower_job(settings.model_copy(update={"val": None})), device="cpu")
    assert bare.run_epoch().losses == first.losses  # measuring changes nothing
    assert bare.history[0].measures is None


@pytest.mark.slow
def test_captions_are_measured_and_the_locked_tower_looks_once(of_pairs, monkeypatch):
    looked: list[int] = []
    embed_images = SharedTowers.embed_images

    def looking(self: SharedTowers, images) -> Embedded:
        looked.append(len(images))
        return embed_images(self, images)

    monkeypatch.setattr(SharedTowers, "embed_images", looking)
    run = TowerRun(make_tower_job(FinetuneSettings(**of_pairs)), device="cpu")
    run.run_epoch(), run.run_epoch()
    assert looked == [6, 6]  # those of the training, and those of the validation
    encoder = load_encoder(run.save_bundle(f"{of_pairs['output']}/bundle"), "cpu")
    pairs = open_captioned(str(of_pairs["val"]))
    texts = encoder.embed_captions(pairs.captions.texts)
    scores = texts @ vectors_of(encoder, pairs.uris.to_pylist()).T.astype(np.float32)
    owners = np.repeat(np.arange(len(pairs)), np.diff(pairs.of_image.offsets))
    found = text_to_image(scores, pairs.of_image.values, owners, (1, 5, 10))
    assert list(run.history[1].measures.values()) == pytest.approx(found)
    assert list(run.history[1].measures) == ["text-to-image R@1", "text-to-image R@5", "text-to-image R@10"]
    assert set(run.history[0].measures_before) == set(run.history[1].measures)


def test_two_workers_share_what_one_does(given, of_pairs, monkeypatch):
    """Each has every other row; `test_tower_pipeline` has how these are put together."""
    job = make_tower_job(FinetuneSettings(**given))
    whole = SharedTowers(job, device="cpu")
    monkeypatch.setattr(SharedTowers, "gather", lambda _self, mine, _num_rows: mine.cpu())
    names = ["a red car", "a dog", "an umbrella"]
    for rank in range(2):
        part = SharedTowers(job, device="cpu", rank=rank, world=2)
        mine, its = part.embed_images(job.val.images), whole.embed_images(job.val.images)
        torch.testing.assert_close(mine.vectors, its.vectors[rank::2], atol=1e-3, rtol=0)
        assert mine.is_readable.tolist() == [True] * 3
        for embed in ("embed_names", "embed_captions"):
            found, expected = (getattr(each, embed)(names) for each in (part, whole))
            np.testing.assert_allclose(found, expected[rank::2], atol=1e-5)


@pytest.mark.slow
def test_unreadable_images_are_left_out_and_too_many_stop_it_before_the_first_step(
    given, home, tmp_path, monkeypatch
):
    (tmp_path / "val.csv").write_text("\n".join([*lines_of(home), f"{tmp_path}/none.jpg,other"]))
    changed = given | {"val": f"labels:{tmp_path}/val.csv", "max_bad_fraction": 0.2}
    metrics = TowerRun(make_tower_job(FinetuneSettings(**changed)), device="cpu").run_epoch()
    assert (metrics.num_val_unreadable, metrics.num_unreadable) == (1, 0)
    without = TowerRun(make_tower_job(FinetuneSettings(**given)), device="cpu").run_epoch()
    names = ("image-to-image mAP", "image-to-image R@1")
    assert [metrics.measures[name] for name in names] == [without.measures[name] for name in names]

    def refuse(message: str) -> None:
        run = TowerRun(make_tower_job(FinetuneSettings(**changed)), device="cpu")
        monkeypatch.setattr(run.trainer, "step", None)
        with pytest.raises(HaltedError, match=message):
            run.run_epoch()

    changed["max_bad_fraction"] = 0.1
    refuse("^--val: 1 of 7 images of labels val cannot be read, or have no finite vector; at most 10% may")
    header, *lines = lines_of(home)
    lines[1::2] = [f"{tmp_path}/none-{line.rsplit('/')[-1]}" for line in lines[1::2]]
    (tmp_path / "val.csv").write_text("\n".join([header, *lines]))
    changed["max_bad_fraction"] = 0.5
    refuse("no class of labels val has two images that can be read to find each other; 3 of 6 cannot be read")


def test_another_validation_set_is_another_run(given, of_pairs, home, tmp_path):
    def identity(base: dict[str, object], **more: object) -> str:
        return TowerTuning(FinetuneSettings(**(base | more)), QUIET)._record().identity

    same, lines = identity(given), lines_of(home)
    (tmp_path / "same.csv").write_text("\n".join(lines))
    (tmp_path / "more.csv").write_text("\n".join([*lines, "/else.jpg,other"]))
    (tmp_path / "other.csv").write_text("\n".join(lines).replace(lines[1].rsplit(",")[1], "renamed"))
    assert identity(given, val=f"labels:{tmp_path}/same.csv") == same
    others = [identity(given, val=f"labels:{tmp_path}/{name}.csv") for name in ("more", "other")]
    assert len({same, identity(given, val=None), *others}) == 4
    assert identity(of_pairs) != identity(of_pairs, val=of_pairs["dataset"])


def test_what_is_there_is_told(given, of_pairs, home, tmp_path):
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    (tmp_path / "val.csv").write_text("\n".join([*lines_of(home), "/1.jpg,alone", "/2.jpg,left out"]))
    names = sorted({line.rsplit(",")[1] for line in lines_of(home)[1:]})
    (tmp_path / "split.json").write_text(str({"base": ["alone", *names], "novel": []}).replace("'", '"'))
    more = {"val": f"labels:{tmp_path}/val.csv", "val_split": f"{tmp_path}/split.json"}
    TowerTuning(FinetuneSettings(**(given | more)), progress)
    told = "--val labels val: 7 images of 4 classes, 1 with one image; 1 images without a class are left out"
    assert told in heard
    TowerTuning(FinetuneSettings(**of_pairs), progress)
    assert any(line.startswith("--val pairs captions: 6 images, ") for line in heard)


@pytest.mark.parametrize(
    ("recipe", "val", "error", "message"),
    [
        ("gpr", "labels:one.csv", DataError, "^--val needs two classes at least: labels one has 1; "),
        ("gpr", "labels:alone.csv", DataError, "^--val: no class of labels alone has two images to find "),
        ("gpr", "labels:named.csv", DataError, r"a class of labels named is called '\.', which no prompt"),
        ("gpr", "labels:several.csv", DataError, "^--val needs one class an image: 1 of the 3 images of "),
        ("gpr", "labels:gone.csv", DataError, "4 of 4 images of --val labels gone that were looked at "),
        ("gpr", "labels:none.csv", DataError, "none.csv"),
        ("gpr", "folder:empty", DataError, "has no images in folders of classes"),
        ("gpr", "pairs:a.csv", ConfigError, "^--val pairs:… has captions, and recipe gpr is measured by "),
        ("gpr", "what:a", ConfigError, "no such data set: 'what:a'"),
        ("realign", "labels:one.csv", ConfigError, "^--val labels:… has classes, and recipe realign is "),
        ("realign", "what:a", ConfigError, "^no captioned images: 'what:a'"),
        ("realign", "pairs:bare.csv", DataError, "pairs bare has no image with a caption"),
        ("realign", "pairs:single.csv", DataError, "^--val: pairs single has one image, which any caption "),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    given, of_pairs, tmp_path, monkeypatch, recipe, val, error, message
):
    tables = {
        "one": ["uri,label", "/1,a", "/2,a"],
        "alone": ["uri,label", "/1,a", "/2,b"],
        "named": ["uri,label", "/1,.", "/2,.", "/3,b"],
        "several": ["uri,label", "/1,a", "/1,b", "/2,a", "/3,b"],
        "gone": ["uri,label", "/1,a", "/2,a", "/3,b", "/4,b"],
        "bare": ["uri,caption", "/1,", "/2,"],
        "single": ["uri,caption", "/1,one", "/1,two"],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    base = of_pairs if recipe == "realign" else given
    with pytest.raises(error, match=message) as caught:
        run_tower_tuning(FinetuneSettings(**(base | {"val": val})), progress=QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused(given, tmp_path):
    (tmp_path / "split.json").write_text('{"base": [], "novel": []}')
    with pytest.raises(ConfigError, match=r"^the split .*split.json names no category$"):
        run_tower_tuning(
            FinetuneSettings(**(given | {"val_split": f"{tmp_path}/split.json"})), progress=QUIET
        )
