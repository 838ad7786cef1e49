"""The second paper through the jobs: pseudo-captions, MCIP, Re-A, an index, and both kinds of search."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from for_ray.config import FinetuneSettings, IndexSettings, PseudoCaptionSettings
from for_ray.datasets.captions import CaptionStream
from for_ray.datasets.instances import write_instances
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError, StageError
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.towers import build_clip
from for_ray.pipeline.index import run_index
from for_ray.pipeline.pseudo_caption import run_pseudo_caption
from for_ray.pipeline.tower_tuning import make_tower_job, run_tower_tuning
from for_ray.retrieval import Question, open_index
from for_ray.schema import FinetuneRun
from for_ray.stages.caption_table import read_table
from for_ray.stages.progress import Progress
from for_ray.stages.tower_run import tune_here
from tests.ray.test_finetune import job_environment

JOBS = Path(__file__).parents[2] / "jobs"
QUIET = Progress(is_quiet=True)
SIZE = 64
COMMON = {"image_size": SIZE, "device": "cpu", "read_threads": 2}
ONE_SWAP, FEW_SWAPS = 1.1 / 52, 3.1 / 52
"""Of two of the 52 images that are as near: rounding changes their places, and so these shares."""
TUNED = {"epochs": 2, "batch_size": 7, "lr": 1e-4, "encoder": "picturebook", **COMMON}


@pytest.fixture(scope="module")
def home(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five things in four views, with a file of captions, and 52 images to measure on; never changed."""
    folder = tmp_path_factory.mktemp("recipes")
    write_instances(folder / "set", instances=5, views=4, split="train", processes=1)
    write_instances(folder / "val", instances=4, views=13, split="val", processes=1)
    lines = (folder / "set" / "captions.csv").read_text().splitlines()[1:]
    texts = [line.partition(",")[2] for line in lines]
    (folder / "captions.txt").write_text("\n".join([*texts, "", texts[0], "x" * 10_000]))
    return folder


@pytest.fixture(scope="module")
def captions(home: Path) -> str:
    """Pseudo-captions of these, by the untuned encoder."""
    run_pseudo_caption(caption_settings(home), progress=QUIET)
    return f"{home}/pseudo"


def caption_settings(home: Path, **more: object) -> PseudoCaptionSettings:
    given = {
        "dataset": f"labels:{home}/set/labels.csv", "captions": f"{home}/captions.txt", "threshold": 0.1,
        "captions_per_image": 3, "output": f"{home}/pseudo", "batch_size": 8, **COMMON, **more,
    }  # fmt: skip
    return PseudoCaptionSettings(**given)


def flags(given: dict[str, object]) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [word for pair in pairs for word in pair]


def test_pseudo_captions_are_the_nearest_over_the_threshold(home, captions):
    table = read_table(captions)
    encoder = load_encoder(open_bundle("picturebook", head="clip", image_size=SIZE), "cpu")
    texts = [text for some in CaptionStream(f"{home}/captions.txt") for text in some]
    vectors = encoder.embed_captions(texts)
    uris = open_dataset(f"labels:{home}/set/labels.csv").uris.to_pylist()
    used = pq.read_table(f"{captions}/captions.parquet")["text"].to_pylist()
    assert table.uris == uris
    assert table.run.num_used == len(table.vectors) == len(used)
    places = [texts.index(text) for text in used]
    np.testing.assert_allclose(table.vectors.astype(np.float32), vectors[places], atol=1e-3)
    for row, uri in enumerate(uris):
        cosines = (vectors @ encoder.embed_image(Path(uri).read_bytes()).T)[:, 0]
        near = [texts[place] for place in np.argsort(-cosines)[:3] if cosines[place] >= 0.1]
        found = [used[place] for place in table.of_image.row(row)]
        assert set(found) == set(near)
    assert (table.run.num_images, table.run.num_captions) == (20, len(texts))
    assert run_pseudo_caption(caption_settings(home), progress=QUIET) == table.run  # nothing to do
    with pytest.raises(ConfigError, match="holds pseudo-captions of other"):
        run_pseudo_caption(caption_settings(home, threshold=0.2), progress=QUIET)


@pytest.mark.slow
def test_no_caption_over_the_threshold_is_told_and_nothing_written(home, tmp_path):
    settings = caption_settings(home, threshold=0.99, output=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"none of the \d+ captions has a cosine of 0.99 or more"):
        run_pseudo_caption(settings, progress=QUIET)
    assert not (tmp_path / "out" / "captions.json").exists()
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    again = run_pseudo_caption(settings.model_copy(update={"threshold": 0.1}), progress=progress)
    assert any(line.startswith("captions: vectors as they were kept at") for line in heard)
    assert not any(time.name == "captions" for time in progress.times)
    assert again.recall == 1
    assert again.describe().endswith("their index finds 100.0% of the nearest")
    assert not list((tmp_path / "out" / "vectors").glob("texts-*"))


@pytest.mark.slow
def test_unreadable_images_are_told_before_captions_are_embedded(home, tmp_path):
    (tmp_path / "set.csv").write_text("uri,label\n/none/1.jpg,a\n/none/2.jpg,b\n")
    more = {"dataset": f"labels:{tmp_path}/set.csv", "output": str(tmp_path / "out")}
    with pytest.raises(StageError, match="2 of the data set's 2 images cannot be measured"):
        run_pseudo_caption(caption_settings(home, **more), progress=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mcip_by_two_workers_then_realign_then_an_index_for_pictures_and_words(
    home, captions, ray_address, tmp_path
):
    given = TUNED | {"recipe": "mcip", "dataset": f"labels:{home}/set/labels.csv", "captions": captions}
    given |= {"caption_threshold": 0.1, "output": str(tmp_path / "mcip"), "workers": 2}
    given |= {"val": f"labels:{home}/val/labels.csv"}
    command = [sys.executable, str(JOBS / "finetune.py"), *flags(given), "--json"]
    done = subprocess.run(command, env=job_environment(ray_address), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    record = FinetuneRun.model_validate_json((tmp_path / "mcip" / "finetune.json").read_text())
    alone = tune_here(make_tower_job(FinetuneSettings(**(given | {"output": str(tmp_path / "alone")}))))
    for mine, its in zip(record.epochs, alone.history, strict=True):
        assert mine.losses == pytest.approx(its.losses, rel=1e-3)
        assert mine.measures == pytest.approx(its.measures, abs=FEW_SWAPS)
    before = record.epochs[0].measures_before
    assert before == pytest.approx(alone.history[0].measures_before, abs=ONE_SWAP)
    assert (told["measures"], told["measures_before"]) == (record.epochs[1].measures, before)
    assert "val image-to-image mAP" in done.stderr
    start = build_clip(open_bundle(f"{tmp_path}/mcip/start")).state_dict()
    weights = build_clip(open_bundle(told["bundle"])).state_dict()
    trained = {name.removeprefix("clip.") for name in alone.trainer.trained}
    for name, value in alone.clip.state_dict().items():
        if name.endswith("attnpool.k_proj.bias"):
            continue  # the softmax over keys does not depend on it: Adam moves it by rounding alone
        far, moved = ((weights[name].double() - its.double()).norm() for its in (value, start[name]))
        assert (moved > 0) == (name in trained), name
        assert far <= 0.1 * moved, name
    assert "pseudo-captions (MCArcMargin)" in (tmp_path / "mcip" / "report.html").read_text()
    again = run_tower_tuning(FinetuneSettings(**given), progress=QUIET)
    assert again.message == "trained before: 2 epochs; nothing to do"

    given = TUNED | {"recipe": "realign", "dataset": f"pairs:{home}/set/captions.csv"}
    given |= {"encoder": told["bundle"], "output": str(tmp_path / "both")}
    given |= {"val": f"pairs:{home}/val/captions.csv"}
    aligned = run_tower_tuning(FinetuneSettings(**given), progress=QUIET)
    assert set(aligned.measures) == {f"text-to-image R@{k}" for k in (1, 5, 10)}
    bundle = open_bundle(aligned.bundle)
    assert (bundle.config.recipes, bundle.config.head) == ("mcip,realign", "mcip")
    towers = [build_clip(open_bundle(uri)).state_dict() for uri in (told["bundle"], aligned.bundle)]
    same = {name for name in towers[0] if torch.equal(towers[0][name], towers[1][name])}
    assert {name for name in towers[0] if name.startswith("visual.")} <= same
    assert "text_projection" not in same

    images = f"{home}/set/images"
    settings = IndexSettings(images=images, index=str(tmp_path / "index"), encoder=aligned.bundle)
    assert run_index(settings, progress=QUIET).indexed == 20
    index = open_index(str(tmp_path / "index"))
    picture = Path(images, "00002-01.jpg")
    hits = index.ask(Question(image=picture.read_bytes(), k=4)).hits
    assert hits[0].uri == str(picture)
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    encoder = load_encoder(bundle, "cpu")
    vectors = np.concatenate(
        [encoder.embed_image(path.read_bytes()) for path in sorted(Path(images).iterdir())]
    )
    scores = (encoder.embed_text(["a red thing"]) @ vectors.T)[0]
    found = index.ask(Question(text="a red thing", k=20)).hits
    assert [hit.score for hit in found] == pytest.approx(np.sort(scores)[::-1].tolist(), abs=2e-3)


@pytest.mark.slow
def test_too_many_unreadable_images_end_it_in_one_line(home, ray_address, tmp_path):
    rows = (home / "set" / "labels.csv").read_text().replace("images/", f"{home}/set/images/")
    (tmp_path / "set.csv").write_text(f"{rows}/none/1.jpg,a\n/none/2.jpg,b\n")
    given = TUNED | {
        "recipe": "gpr",
        "dataset": f"labels:{tmp_path}/set.csv",
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(StageError, match="finetune: 2 of 22 images cannot be read; at most 5% may"):
        run_tower_tuning(FinetuneSettings(**given), progress=QUIET)
    assert not (tmp_path / "out" / "bundle").exists()


@pytest.mark.slow
def test_a_killed_tuning_goes_on_and_keeps_what_was_measured(home, ray_address, tmp_path):
    """What it began with is measured once, and the rest comes out as without a stop."""
    given = TUNED | {"recipe": "gpr", "dataset": f"labels:{home}/set/labels.csv", "epochs": 15}
    given |= {"val": f"labels:{home}/val/labels.csv", "output": str(tmp_path / "out")}
    command = [sys.executable, str(JOBS / "finetune.py"), *flags(given)]
    job = subprocess.Popen(command, env=job_environment(ray_address), stderr=subprocess.PIPE, text=True)
    lines = []
    for line in job.stderr:
        lines.append(line)
        if line.startswith("epoch 2 of 15"):
            break
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert lines[-1].startswith("epoch 2 of 15"), lines
    assert ", val image-to-image mAP 0." in lines[-1]
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]
    summary = run_tower_tuning(FinetuneSettings(**given), progress=progress)
    epochs = [int(line.split()[1]) for line in heard if line.startswith("epoch")]
    assert epochs == list(range(16 - len(epochs), 16))  # none, if it came to its end before it was killed
    assert 1 not in epochs
    record = FinetuneRun.model_validate_json((tmp_path / "out" / "finetune.json").read_text())
    alone = tune_here(make_tower_job(FinetuneSettings(**(given | {"output": str(tmp_path / "alone")}))))
    assert len(record.epochs) == 15
    for mine, its in zip(record.epochs, alone.history, strict=True):
        assert mine.measures == pytest.approx(its.measures, abs=FEW_SWAPS)
        assert (mine.measures_before is None) == (mine.epoch > 1)
    assert summary.measures_before == pytest.approx(alone.history[0].measures_before, abs=ONE_SWAP)
    changed = given | {"val": f"labels:{home}/set/labels.csv"}
    with pytest.raises(ConfigError, match=r"other settings \(other images, labels, --val or encoder\)"):
        run_tower_tuning(FinetuneSettings(**changed), progress=QUIET)
