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
from for_ray.errors import ConfigError, DataError, StorageError
from for_ray.evaluation.similarity import VectorSets, image_to_image, text_to_image, zero_shot_accuracy
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.trainer import HaltedError
from for_ray.pipeline.tower_tuning import TowerTuning, make_tower_job, run_tower_tuning
from for_ray.schema import EpochMetrics
from for_ray.stages.progress import Progress
from for_ray.stages.shared_towers import Embedded, SharedTowers
from for_ray.stages.tower_run import TowerRun, tune_here
from for_ray.stages.training_images import BatchReader, ReadBatch

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Progress(is_quiet=True)
SIZE = 32


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
    bare = tune_here(make_tower_job(settings.model_copy(update={"val": None})))
    assert [each.losses for each in bare.history] == [each.losses for each in second.history]
    assert bare.history[0].measures is None
    for name, value in bare.trainer.trained.items():  # measuring changes nothing
        assert torch.equal(value, second.trainer.trained[name])


def test_captions_are_measured_and_the_locked_tower_looks_once(of_pairs, monkeypatch):
    looked: list[int] = []
    embed_images = SharedTowers.embed_images

    def looking(self: SharedTowers, images, **how) -> Embedded:
        looked.append(len(images))
        return embed_images(self, images, **how)

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


def make_simple(towers: SharedTowers) -> SharedTowers:
    """Each tower is one matrix, always the same, and refuses an empty batch, as a ViT does."""

    def encode(batch: torch.Tensor) -> torch.Tensor:
        assert len(batch)
        flat = batch.float().flatten(1)
        random = torch.Generator().manual_seed(0)
        return flat @ torch.randn(flat.shape[1], towers.bundle.dim, generator=random)

    towers.clip.encode_image = towers.clip.encode_text = encode
    return towers


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_what_one_does(given, monkeypatch, world):
    """Three images and three texts; the last of four workers has none of them, of the same kind."""
    job = make_tower_job(FinetuneSettings(**given))
    images, names = job.val.images.select(np.arange(3)), ["a red car", "a dog", "an umbrella"]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(SharedTowers, "gather", lambda _self, mine, _num_rows: sent.append(mine) or mine)

    def send(rank: int, world: int) -> list[torch.Tensor]:
        sent.clear()
        towers = make_simple(SharedTowers(job, device="cpu", rank=rank, world=world))
        towers.embed_images(images), towers.embed_names(names), towers.embed_captions(names)
        return list(sent)

    whole = send(0, 1)
    assert [each.dtype for each in whole] == [torch.float16, torch.bool, torch.float16, torch.float16]
    assert whole[1].tolist() == [True] * 3
    for vectors in (whole[0], *whole[2:]):
        assert vectors.float().norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-3)
    for rank in range(world):
        for mine, all_of_it in zip(send(rank, world), whole, strict=True):
            torch.testing.assert_close(mine, all_of_it[rank::world], atol=1e-3, rtol=0)


def test_no_rows_are_read_as_none(given):
    job = make_tower_job(FinetuneSettings(**given))
    read = SharedTowers(job, device="cpu").reader(job.val.images).read(np.array([], np.int64))
    assert (read.pixels.shape, read.is_readable.dtype) == ((0, 3, SIZE, SIZE), torch.bool)


def test_where_the_store_refuses_the_rest_counts_as_unreadable(given, monkeypatch):
    """If it goes on; what was read before is kept."""
    job, read = make_tower_job(FinetuneSettings(**given)), BatchReader.read
    towers, images = make_simple(SharedTowers(job, device="cpu")), job.val.images

    def refuse_later(self: BatchReader, rows: np.ndarray) -> ReadBatch:
        if 3 in rows:
            raise StorageError("the store is away")
        return read(self, rows)

    monkeypatch.setattr(BatchReader, "read", refuse_later)
    found = towers.embed_images(images, goes_on=True)
    assert found.is_readable.tolist() == [True] * 3 + [False] * 3
    assert found.vectors.norm(dim=1).tolist() == pytest.approx([1] * 3 + [0] * 3, abs=1e-3)
    with pytest.raises(StorageError, match="the store is away"):
        towers.embed_images(images)


def test_an_epoch_that_cannot_be_measured_is_kept_and_says_why(given, monkeypatch):
    """Only what there was before the first epoch must be measured."""
    job = make_tower_job(FinetuneSettings(**(given | {"epochs": 3})))
    run = TowerRun(job, device="cpu")
    rng, told = np.random.default_rng(0), []
    vectors = torch.from_numpy(rng.standard_normal((6, run.bundle.dim))).half()
    is_away = [False, True, False, True]

    def embed_images(_self: SharedTowers, images, *, goes_on: bool) -> Embedded:
        told.append(goes_on)
        away = is_away[len(told) - 1]
        return Embedded(vectors, torch.tensor([True] + [not away] * 5))

    def train(epoch: int) -> EpochMetrics:
        return EpochMetrics(
            epoch=epoch + 1, lr=0.1, losses={}, num_matched={}, num_dropped={}, curve=(), num_unreadable=0,
            seconds=1,
        )  # fmt: skip

    monkeypatch.setattr(SharedTowers, "embed_images", embed_images)
    monkeypatch.setattr(run, "_train", train)
    while not run.is_done:
        run.run_epoch()
    assert told == [False, True, True, True]
    first, second, third = run.history
    problem = (
        "--val: 5 of 6 images of labels labels cannot be read, or have no finite vector; at most 5% may "
        "(--max-bad-fraction)"
    )
    for epoch in (first, third):
        assert (epoch.measures, epoch.num_val_unreadable, epoch.val_problem) == (None, 5, problem)
    assert (second.num_val_unreadable, second.val_problem) == (0, None)
    assert second.measures == first.measures_before
    again = TowerRun(job, device="cpu")
    is_away.append(True)
    with pytest.raises(HaltedError, match="5 of 6 images of labels labels cannot be read"):
        again.run_epoch()
    assert again.history == []


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
    refuse(
        "no class of labels val has two images that can be read to find each other; 3 of 6 images of labels "
        "val cannot be read, or have no finite vector"
    )


def test_another_validation_set_is_another_run(given, of_pairs, home, tmp_path, monkeypatch):
    def identity(base: dict[str, object], **more: object) -> str:
        return TowerTuning(FinetuneSettings(**(base | more)), QUIET)._record().identity

    same, lines = identity(given), lines_of(home)
    (tmp_path / "same.csv").write_text("\n".join(lines))
    (tmp_path / "more.csv").write_text("\n".join([*lines, "/else.jpg,other"]))
    (tmp_path / "other.csv").write_text("\n".join(lines).replace(lines[1].rsplit(",")[1], "renamed"))
    assert identity(given, val=f"labels:{tmp_path}/same.csv") == same
    others = [identity(given, val=f"labels:{tmp_path}/{name}.csv") for name in ("more", "other")]
    assert len({same, identity(given, val=None), *others}) == 4
    pairs, bare = identity(of_pairs), identity(given, val=None)
    assert pairs != identity(of_pairs, val=of_pairs["dataset"])
    monkeypatch.setattr(Bundle, "text_fingerprint", "of other prompts")  # these decide which name is near
    assert identity(given) != same
    assert (identity(of_pairs), identity(given, val=None)) == (pairs, bare)


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
    told += "; measured before the first epoch, and after each"
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
