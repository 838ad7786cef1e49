"""The recipes that tune towers, up to where Ray begins: what they would train, and what they refuse."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from for_ray.config import FinetuneSettings, PseudoCaptionSettings, read_settings
from for_ray.datasets.instances import write_instances
from for_ray.datasets.labelled import Ragged
from for_ray.datasets.sampling import epoch_batches
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import open_bundle
from for_ray.model.tower_tuning import PairBatch
from for_ray.model.trainer import HaltedError
from for_ray.pipeline import tower_sets
from for_ray.pipeline.tower_tuning import TowerTuning, make_tower_job, run_tower_tuning
from for_ray.stages import shared_towers
from for_ray.stages.caption_table import CaptionLists, CaptionRun, write_captions
from for_ray.stages.progress import Progress
from for_ray.stages.shared_towers import SharedTowers
from for_ray.stages.tower_run import TowerRun, tune_here

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Progress(is_quiet=True)
SIZE = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four things in three views, and pseudo-captions of all but the first view of each; never changed."""
    folder = tmp_path_factory.mktemp("towers")
    write_instances(folder / "set", instances=4, views=3, split="train", processes=1)
    uris = [str(path) for path in sorted((folder / "set" / "images").iterdir())]
    bundle = open_bundle("picturebook", head="clip", image_size=SIZE)
    vectors = np.random.default_rng(0).standard_normal((5, bundle.dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = [[] if row % 3 == 0 else [row % 5, (row + 1) % 5] for row in range(12)]
    offsets = np.cumsum([0, *map(len, lists)])
    values = np.array(list(itertools.chain(*lists)), np.int32)
    cosines = np.tile(np.array([0.4, 0.3], np.float32), len(values) // 2)
    run = CaptionRun(
        identity="a", encoder="e", fingerprint=bundle.fingerprint, threshold=0.27, most=20, num_images=12,
        num_unreadable=0, num_bare=4, num_captions=9, num_used=5,
    )  # fmt: skip
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    rows = {
        "text": [f"caption {row}" for row in range(5)],
        "vector": pa.FixedSizeListArray.from_arrays(flat, bundle.dim),
    }
    lists = CaptionLists(run, uris, Ragged(offsets, values), cosines)
    write_captions(str(folder / "captions"), lists, [pa.table(rows)])
    return folder


@pytest.fixture
def given(home: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "recipe": "gpr", "dataset": f"labels:{home}/set/labels.csv", "output": str(tmp_path / "out"),
        "image_size": SIZE, "epochs": 2, "batch_size": 5, "lr": 1e-4, "device": "cpu", "read_threads": 2,
    }  # fmt: skip


def settings_of(given: dict[str, object], home: Path, recipe: str, **more: object) -> FinetuneSettings:
    """The settings of a recipe, with the data that it needs."""
    needed: dict[str, dict[str, object]] = {
        "gpr": {},
        "mcip": {"captions": str(home / "captions")},
        "realign": {"dataset": f"pairs:{home}/set/captions.csv"},
    }
    return FinetuneSettings(**(given | {"recipe": recipe} | needed[recipe] | more))


def test_each_recipe_has_its_papers_defaults():
    base = {"dataset": "folder:a", "output": "b"}
    for recipe, lr, batch_size in (("gpr", 1e-6, 128), ("mcip", 1e-6, 128), ("realign", 1e-5, 1024)):
        more = {"captions": "c"} if recipe == "mcip" else {}
        found = FinetuneSettings(**base, **more, recipe=recipe)
        assert (found.lr, found.batch_size, found.epochs, found.weight_decay) == (lr, batch_size, 3, 1e-2)
        assert (found.scale, found.margin, found.proxies_lr_factor) == (30, 0.1, 100)
        assert (found.gamma_classes, found.gamma_captions) == (0.5, 0.5)
    found = PseudoCaptionSettings(dataset="folder:a", captions="b.txt", output="c")
    assert (found.captions_per_image, found.threshold) == (20, 0.27)  # and the table's are those of mcip
    assert FinetuneSettings(**base, recipe="gpr", lr=1e-3).lr == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "mcip"], "needs --captions"),
        (["--recipe", "gpr", "--captions", "c"], "needs --captions"),
        (["--recipe", "gpr", "--slots", "5"], "--slots: not a setting of recipe gpr"),
        (["--recipe", "gpr", "--val-labels", "a"], "^--val-labels: not a setting of recipe gpr$"),
        (["--recipe", "gpr", "--val-split", "a"], "--val-split goes with --val"),
        (["--recipe", "realign", "--val", "a", "--val-split", "s"], "recipe realign has captions"),
        (
            ["--losses", "sup", "--grad-checkpointing"],
            "--grad-checkpointing: not a setting of recipe for",
        ),
        (["--losses", "sup", "--margin", "0.2"], "--margin: not a setting of recipe for"),
        (
            ["--recipe", "gpr", "--gamma-captions", "2", "--caption-threshold", "0.3"],
            "^--caption-threshold, --gamma-captions: not a setting of recipe gpr$",
        ),
        (["--recipe", "realign", "--scale", "9", "--margin", "0.2"], "--margin, --scale: not a setting of"),
        (["--recipe", "realign", "--gamma-classes", "1"], "--gamma-classes: not a setting of recipe realign"),
        (["--recipe", "realign", "--proxies-lr-factor", "2"], "--proxies-lr-factor: not a setting of"),
        (
            ["--recipe", "gprs", "--margin", "0.2"],
            r"--recipe \(or FOR_RAY_RECIPE\): input should be 'for', 'gpr'",
        ),
        (["--recipe", "realign", "--tune-blocks", "2"], "locks the image tower"),
        (["--recipe", "realign", "--split", "s"], "recipe realign has captions"),
        (["--recipe", "gpr", "--lr-end", "0.1"], "is above lr"),
        (["--recipe", "gpr", "--workers", "200"], "does not go round 200 workers"),
        (["--recipe", "gpr", "--margin", "4"], "--margin"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(FinetuneSettings, ["--dataset", "folder:a", "--output", "b", *arguments])


def test_actors_of_pseudo_captions_are_checked():
    with pytest.raises(ConfigError, match="below min_actors"):
        read_settings(
            PseudoCaptionSettings,
            ["--dataset", "a", "--captions", "b", "--output", "c", "--min-actors", "2", "--max-actors", "1"],
        )


def test_the_settings_become_the_job(given, home):
    changes = {"tune_blocks": 2, "gamma_captions": 3, "margin": 0.2, "caption_threshold": 0.35}
    job = make_tower_job(settings_of(given, home, "mcip", **changes))
    assert (job.tune.recipe, job.tune.num_blocks, job.tune.with_projection) == ("mcip", 2, True)
    assert (job.tune.gamma_captions, job.tune.margin) == (3, 0.2)
    assert (job.adam.lr, job.adam.lr_end, job.adam.num_steps) == (1e-4, pytest.approx(1e-5), 6)
    assert (len(job.images), job.num_classes) == (12, 4)
    assert np.diff(job.of_image.offsets).tolist() == [0, 1, 1] * 4  # those of cosine 0.3 are under it
    assert not make_tower_job(
        settings_of(given, home, "gpr", output=f"{given['output']}-2")
    ).tune.with_projection


def test_a_tuning_goes_from_images_to_a_bundle_and_on_from_a_checkpoint(given, home):
    """Whatever the recipe."""
    bundles = {}
    for recipe in ("gpr", "mcip", "realign"):
        job = make_tower_job(settings_of(given, home, recipe, output=f"{given['output']}-{recipe}"))
        whole, first, second = tune_here(job), TowerRun(job, device="cpu"), TowerRun(job, device="cpu")
        first.run_epoch()
        second.restore(first.state())
        second.run_epoch()
        assert [each.epoch for each in second.history] == [1, 2]
        assert [each.losses for each in second.history] == [each.losses for each in whole.history]
        for name, value in whole.trainer.trained.items():
            assert torch.equal(value, second.trainer.trained[name])
        bundles[recipe] = whole.save_bundle(f"{given['output']}-{recipe}/bundle")
        names = {"gpr": {"classes"}, "mcip": {"classes", "captions"}, "realign": {"pairs"}}[recipe]
        assert set(whole.history[0].losses) == names
        assert bundles[recipe].config.recipes == recipe
    assert len({bundle.fingerprint for bundle in bundles.values()}) == 3


def test_two_workers_draw_the_captions_that_one_draws(given, home, tmp_path):
    images = sorted((home / "set" / "images").iterdir())
    pairs = [f"{path},number {3 * row + again}" for row, path in enumerate(images) for again in range(3)]
    (tmp_path / "pairs.csv").write_text("\n".join(["uri,caption", *pairs]))
    job = make_tower_job(settings_of(given, home, "realign", dataset=f"pairs:{tmp_path}/pairs.csv"))
    batches = epoch_batches(12, batch_size=5, seed=job.seed, epoch=0)

    def read(rank: int, world: int) -> list[PairBatch]:
        run = TowerRun(job, device="cpu", rank=rank, world=world)
        run._embed_images()  # the first of them wrote the vectors that the others read
        return list(run._pairs(batches, epoch=0))

    for whole, *parts in zip(read(0, 1), read(0, 2), read(1, 2), strict=True):
        assert [part.first for part in parts] == [0, len(parts[0].tokens)]
        for rank, part in enumerate(parts):
            assert torch.equal(part.tokens, whole.tokens[rank::2])
            assert torch.equal(part.images, torch.cat([whole.images[0::2], whole.images[1::2]]))


@pytest.mark.parametrize(("num_rows", "at_once"), [(4, 1 << 16), (5, 1 << 16), (4, 2), (5, 4), (7, 1)])
def test_rows_of_two_workers_are_put_together_in_order(given, home, monkeypatch, num_rows, at_once):
    monkeypatch.setattr(shared_towers, "ROWS_AT_ONCE", at_once)
    rows = torch.arange(2 * num_rows).reshape(num_rows, 2).half()
    sent: list[torch.Tensor] = []

    def all_gather(parts, padded):
        """Both workers' parts come, padded to one shape."""
        first = sum(len(each) for each in sent)
        sent.append(padded)
        for rank, part in enumerate(parts):
            some = rows[rank::2][first : first + len(part)]
            part.zero_()[: len(some)] = some

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    job = make_tower_job(settings_of(given, home, "realign"))
    for rank in range(2):
        towers = SharedTowers(job, device="cpu", rank=rank, world=2)
        sent.clear()
        assert torch.equal(towers.gather(rows[rank::2], num_rows), rows)
        assert sum(len(each) for each in sent) == -(-num_rows // 2)
        assert max(2 * len(each) for each in sent) <= max(2, at_once)


def test_classes_are_learnt(given, home):
    """The images that are trained on come nearer to their classes' proxies."""
    run = tune_here(make_tower_job(settings_of(given, home, "gpr", epochs=6, lr=1e-3)))
    losses = [each.losses["classes"] for each in run.history]
    assert losses[-1] < 0.5 * losses[0]


def test_unreadable_images_are_counted_and_too_many_stop_it(given, home, tmp_path):
    rows = (home / "set" / "labels.csv").read_text().replace("images/", f"{home}/set/images/")
    (tmp_path / "set.csv").write_text(f"{rows}{tmp_path}/none.jpg,{rows.splitlines()[1].rsplit(',')[1]}\n")
    changes = {"dataset": f"labels:{tmp_path}/set.csv", "max_bad_fraction": 0.1}
    job = make_tower_job(settings_of(given, home, "gpr", **changes))
    run = TowerRun(job, device="cpu")
    assert run.run_epoch().num_unreadable == 1
    changes |= {"max_bad_fraction": 0.05, "output": f"{given['output']}-2"}
    run = TowerRun(make_tower_job(settings_of(given, home, "gpr", **changes)), device="cpu")
    with pytest.raises(HaltedError, match="1 of 13 images cannot be read"):
        run.run_epoch()
    pairs = (home / "set" / "captions.csv").read_text().replace("images/", f"{home}/set/images/")
    (tmp_path / "pairs.csv").write_text(f"{pairs}{tmp_path}/none.jpg,nothing\n")
    changes = {"dataset": f"pairs:{tmp_path}/pairs.csv", "max_bad_fraction": 0.1}
    job = make_tower_job(settings_of(given, home, "realign", **changes, output=f"{given['output']}-3"))
    assert tune_here(job).history[-1].num_unreadable == 1


def test_some_images_are_looked_at_before_the_workers_start(given, home, tmp_path):
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    rows = (home / "set" / "labels.csv").read_text().replace("images/", f"{home}/set/images/")
    (tmp_path / "set.csv").write_text(f"{rows}{tmp_path}/none.jpg,a\n")
    TowerTuning(
        settings_of(given, home, "gpr", dataset=f"labels:{tmp_path}/set.csv"), progress
    ).check_images()
    assert (
        f"1 of 13 images of labels set that were looked at cannot be read: {tmp_path}/none.jpg" in heard[-1]
    )
    (tmp_path / "set.csv").write_text("uri,label\n/none/1.jpg,a\n/none/2.jpg,b\n")
    with pytest.raises(DataError, match=r"2 of 2 images of labels set .* cannot be read: /none/1.jpg is not"):
        run_tower_tuning(
            settings_of(given, home, "gpr", dataset=f"labels:{tmp_path}/set.csv"), progress=QUIET
        )
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_counted(given, home, tmp_path):
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    TowerTuning(settings_of(given, home, "mcip"), progress)
    said = "labels labels: 12 images of 4 classes, 0 with one image; 0 images without a class are left out"
    assert said in heard
    told = (
        "pseudo-captions: {} an image, 20 at most, {} images without one over 0.27, {} that are not in {}: "
    )
    told += "the loss on captions leaves these out"
    assert told.format("1.3", 4, 0, home / "captions") in heard
    rows = (home / "set" / "labels.csv").read_text().replace("images/", f"{home}/set/images/")
    (tmp_path / "more.csv").write_text(f"{rows}/1.jpg,a\n/2.jpg,a\n/3.jpg,b\n/4.jpg,b\n")
    TowerTuning(settings_of(given, home, "mcip", dataset=f"labels:{tmp_path}/more.csv"), progress)
    assert told.format("1.0", 4, 4, home / "captions") in heard
    (tmp_path / "set.csv").write_text("uri,label\n/1,a\n/2,a\n/3,b\n/4,c\n")
    (tmp_path / "split.json").write_text('{"base": ["a", "b"], "novel": []}')
    more = {"dataset": f"labels:{tmp_path}/set.csv", "split": f"{tmp_path}/split.json"}
    assert TowerTuning(settings_of(given, home, "gpr", **more), progress).work().num_classes == 2
    said = "labels set: 3 images of 2 classes, 1 with one image; 1 images without a class are left out"
    assert said in heard


def test_what_is_in_force_for_captions_is_the_tables_and_more_is_refused(given, home, tmp_path, monkeypatch):
    shutil.copytree(home / "captions", tmp_path / "captions")
    record = tmp_path / "captions" / "captions.json"
    run = CaptionRun.model_validate_json(record.read_text())
    record.write_text(run.model_copy(update={"threshold": 0.35, "most": 1}).model_dump_json())
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    captions = str(tmp_path / "captions")

    def kept(**more: object) -> tuple[list[int], dict[str, object], str]:
        tuning = TowerTuning(settings_of(given, home, "mcip", captions=captions, **more), progress)
        recorded = tuning._record().settings
        names = ("caption_threshold", "captions_per_image")
        counts = np.diff(tuning.towers.of_image.offsets).tolist()
        [said] = [line for line in heard if line.startswith("pseudo-captions")]
        heard.clear()
        return counts, {name: recorded[name] for name in names}, said

    settle, settled = tower_sets._taken, []
    monkeypatch.setattr(tower_sets, "_taken", lambda *given: settled.append(given) or settle(*given))
    of_table = {"caption_threshold": 0.35, "captions_per_image": 1}
    counts, recorded, told = kept()
    assert len(settled) == 1
    assert (counts, recorded) == ([0, 1, 1] * 4, of_table)
    assert "0.7 an image, 1 at most, 4 images without one over 0.35, 0 that" in told
    assert kept(**of_table) == (counts, recorded, told)
    recorded = kept(caption_threshold=0.4)[1]
    assert recorded == {"caption_threshold": 0.4, "captions_per_image": 1}
    for more, message in (
        ({"caption_threshold": 0.27}, "^--caption-threshold 0.27 is below the --threshold 0.35 that /"),
        ({"captions_per_image": 20}, "^--captions-per-image 20 is above the 1 that /.* was made with: leave"),
    ):
        with pytest.raises(ConfigError, match=message):
            kept(**more)


def test_another_run_is_told_from_the_same(given, home):
    def identity(recipe: str, **more: object) -> str:
        return TowerTuning(settings_of(given, home, recipe, **more), QUIET)._record().identity

    same = identity("gpr")
    assert identity("realign", grad_checkpointing=True) == identity("realign")
    assert identity("gpr", workers=2, output="/elsewhere", name="other") == same
    assert len({same, identity("gpr", lr=1e-3), identity("gpr", margin=0.3), identity("mcip")}) == 4
    assert identity("mcip", caption_threshold=0.35) != identity("mcip")


def test_bad_data_is_refused_before_anything_is_written(given, home, tmp_path):
    def refuse(error: type[Exception], message: str, recipe: str, **more: object) -> None:
        with pytest.raises(error, match=message):
            run_tower_tuning(settings_of(given, home, recipe, **more), progress=QUIET)

    (tmp_path / "one.csv").write_text("uri,label\n/1,a\n/2,a\n")
    refuse(DataError, "--recipe gpr needs two classes at least", "gpr", dataset=f"labels:{tmp_path}/one.csv")
    refuse(DataError, "no image has a pseudo-caption of cosine 0.9 or more", "mcip", caption_threshold=0.9)
    (tmp_path / "other.csv").write_text("uri,label\n/1,a\n/2,b\n")
    other = "captions was made for other images: none of these 2 is in it"
    refuse(DataError, other, "mcip", dataset=f"labels:{tmp_path}/other.csv")
    refuse(DataError, "no pseudo-captions at", "mcip", captions=str(tmp_path))
    other = r"by another encoder \(e\), or at another image size, than picturebook at 32 pixels"
    refuse(ConfigError, other, "mcip", image_size=32)
    refuse(ConfigError, "no captioned images", "realign", dataset="coco:a")
    checkpointing = "^--grad-checkpointing: the image tower has none in open_clip"
    refuse(ConfigError, checkpointing, "gpr", grad_checkpointing=True)
    refuse(DataError, "a batch of one", "realign", batch_size=1)
    refuse(
        DataError, "do not go round 3 workers", "gpr", workers=3, batch_size=4, dataset=_few(home, tmp_path)
    )
    assert not (tmp_path / "out").exists()


def _few(home: Path, folder: Path) -> str:
    """Five images: batches of four make two steps, of two and three."""
    lines = (home / "set" / "labels.csv").read_text().replace("images/", f"{home}/set/images/").splitlines()
    (folder / "few.csv").write_text("\n".join(lines[:6]))
    return f"labels:{folder}/few.csv"
