"""The evaluation job's tasks of one class an image, and of captions: against a plain loop, and bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from for_ray.config import EvaluateSettings
from for_ray.datasets.captions import open_captioned
from for_ray.datasets.classes import classes_of
from for_ray.datasets.instances import write_instances
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError, StageError
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.pipeline.evaluate_tasks import run_task
from for_ray.stages.progress import Progress

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"
SMALL = {"batch_size": 8, "read_threads": 4}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six things in four views; never changed."""
    folder = tmp_path_factory.mktemp("tasks") / "book"
    write_instances(folder, instances=6, views=4, split="val", processes=1)
    return folder


@pytest.fixture(scope="module")
def vectors(book: Path) -> np.ndarray:
    """One image after the other."""
    encoder = load_encoder(open_bundle("picturebook", head="clip"), "cpu")
    uris = open_dataset(f"labels:{book}/labels.csv").uris.to_pylist()
    return np.concatenate([encoder.embed_image(Path(uri).read_bytes()) for uri in uris])


def measure(dataset: str, task: str, **more: Any) -> dict[str, Any]:
    given = {"dataset": dataset, "task": task, "encoder": "picturebook#clip", **SMALL, **more}
    return run_task(EvaluateSettings(**given), progress=Progress(is_quiet=True)).to_json()


@pytest.mark.slow
def test_images_find_their_class(ray_address, book, vectors):
    classes = classes_of(open_dataset(f"labels:{book}/labels.csv"), why="a test")
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    found = measure(f"labels:{book}/labels.csv", "image-to-image")
    assert found["R@1"] == pytest.approx((classes[scores.argmax(1)] == classes).mean())
    assert (found["images"], found["classes"], found["images_left_out"], found["head"]) == (24, 6, 0, "clip")
    assert 0.2 < found["mAP"] < 1
    nearest = measure(f"labels:{book}/labels.csv", "knn", neighbours=1)
    assert nearest["accuracy"] == pytest.approx(found["R@1"])
    gallery = measure(f"labels:{book}/labels.csv", "knn", neighbours=1, gallery=f"labels:{book}/labels.csv")
    assert gallery["accuracy"] == 1  # every image finds itself


@pytest.mark.slow
def test_names_and_captions_find_images(ray_address, book, vectors):
    encoder = load_encoder(open_bundle("picturebook", head="clip"), "cpu")
    images = open_dataset(f"labels:{book}/labels.csv")
    right = (encoder.embed_text(images.categories) @ vectors.T).argmax(0)
    expected = (right == classes_of(images, why="a test")).mean()
    assert measure(f"labels:{book}/labels.csv", "zero-shot")["accuracy"] == pytest.approx(expected)
    pairs = open_captioned(f"pairs:{book}/captions.csv")
    place = {uri: row for row, uri in enumerate(images.uris.to_pylist())}
    rows = [place[uri] for uri in pairs.uris.to_pylist()]
    order = np.argsort(-(encoder.embed_captions(pairs.captions.texts) @ vectors[rows].T), axis=1)
    for k in (1, 5, 10):
        hits = [
            any(caption in pairs.of_image.row(image) for image in ranked[:k])
            for caption, ranked in enumerate(order)
        ]
        found = measure(f"pairs:{book}/captions.csv", "text-to-image")
        assert found[f"R@{k}"] == pytest.approx(np.mean(hits))
    assert found["captions"] == len(pairs.captions.texts)


@pytest.mark.slow
def test_the_job_compares_encoders_and_leaves_unreadable_images_out(ray_address, book, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("evaluate_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    rows = (book / "labels.csv").read_text().replace("images/", f"{book}/images/")
    (tmp_path / "set.csv").write_text(f"{rows}/not/there.jpg,a thing\n")
    arguments = ["--dataset", f"labels:{tmp_path}/set.csv", "--task", "image-to-image", "--batch-size", "8"]
    arguments += ["--encoder", "picturebook#clip", "--encoder", "picturebook#cluster", "--num-slots", "4"]
    assert job.main([*arguments, "--json", "--csv", f"{tmp_path}/out.csv"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["images"], found["images_left_out"]) == (24, 1)
    assert [each["head"] for each in found["encoders"]] == ["clip", "cluster"]
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "encoder,mAP,R@1"
    assert lines[1].startswith("picturebook#clip,0.")
    assert job.main(arguments[:-2]) == 0
    assert "image-to-image" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(ray_address, book, tmp_path):
    (tmp_path / "alone.csv").write_text("uri,label\n/1.jpg,a\n/2.jpg,b\n")
    with pytest.raises(DataError, match="no class of labels alone has two images"):
        measure(f"labels:{tmp_path}/alone.csv", "image-to-image")
    with pytest.raises(DataError, match="--task knn: no class of labels alone has two images"):
        measure(f"labels:{tmp_path}/alone.csv", "knn")
    with pytest.raises(StageError, match="2 of the data set's 2 images cannot be measured"):
        measure(f"labels:{tmp_path}/alone.csv", "zero-shot")
    with pytest.raises(DataError, match="there is nothing to measure"):
        measure(f"labels:{tmp_path}/alone.csv", "zero-shot", max_bad_fraction=1)
    with pytest.raises(ConfigError, match="no captioned images"):
        measure(f"labels:{tmp_path}/alone.csv", "text-to-image")
