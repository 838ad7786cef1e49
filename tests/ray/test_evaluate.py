"""The evaluation job on 60 pages of the picture book: against a plain loop, an index beside exact search."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from for_ray.config import EvaluateSettings, IndexSettings
from for_ray.datasets.picturebook import write_picturebook
from for_ray.datasets.spec import open_dataset
from for_ray.errors import DataError, StageError
from for_ray.evaluation.ranking import average_precision_at_k, rank_images
from for_ray.evaluation.summary import multilabel_scores, summarise_scores
from for_ray.index import snapshots
from for_ray.index.table import open_table, read_vectors
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.preprocess import decode
from for_ray.pipeline.evaluate import run_evaluate
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout
from for_ray.stages.progress import Progress
from for_ray.stages.results import Evaluation

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"
QUIET = Progress(is_quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def book(home: Path) -> Path:
    """Never changed."""
    write_picturebook(home / "book", images=60, split="val", processes=1)
    return home / "book"


@pytest.fixture(scope="module")
def evaluate(ray_address: str, book: Path) -> Callable[..., Evaluation]:
    """Runs the job in this process."""

    def run(**settings: Any) -> Evaluation:
        given = {"dataset": f"picturebook:{book}", "batch_size": 8, "read_threads": 4, **settings}
        return run_evaluate(EvaluateSettings(**given), progress=QUIET)

    return run


@pytest.fixture(scope="module")
def index(ray_address: str, home: Path, book: Path, encoder_name: str, draw: Callable[..., None]) -> Path:
    """Of the book's images, and of thirty others in a folder among them that no annotation names."""
    draw(book / "images" / "others", range(30))
    settings = {"images": str(book / "images"), "index": str(home / "index"), "encoder": encoder_name}
    run_index(
        IndexSettings(
            **settings, head="dense", batch_size=8, read_threads=4, codec="IVF4,SQ8", target_recall=0
        ),
        progress=QUIET,
    )
    return home / "index"


def plain_scores(encoder: str, head: str, images: Any, **settings: Any) -> np.ndarray:
    """One image after the other: the highest cosine over its kept slots [V, B]."""
    loaded = load_encoder(open_bundle(encoder, head=head, **settings), "cpu")
    text = loaded.embed_text(images.categories)
    config = loaded.bundle.config
    columns = []
    for uri in images.uris.to_pylist():
        decoded = decode(
            Path(uri).read_bytes(),
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            interpolation=config.interpolation,
        )
        encoded = loaded.encode(decoded.pixels[None])
        columns.append((text @ encoded.vectors[0][encoded.keep[0]].numpy().T).max(axis=1))
    return np.stack(columns, axis=1)


def test_encoders_equal_a_plain_loop(evaluate, book):
    found = evaluate(encoder=["picturebook", "picturebook#clip"], task="multilabel")
    images = open_dataset(f"picturebook:{book}")
    relevant = images.relevant()
    assert [method.name for method in found.methods] == ["picturebook#cluster", "picturebook#clip"]
    assert (found.num_images, found.num_left_out, found.num_empty) == (60, 0, (~relevant.any(axis=1)).sum())
    for method, head in zip(found.methods, ("cluster", "clip"), strict=True):
        scores = plain_scores("picturebook", head, images)
        expected = summarise_scores(scores, relevant, images.is_novel)
        np.testing.assert_allclose(method.ap50, expected.ap50, atol=1e-9)
        assert method.map50.model_dump() == pytest.approx(expected.map50.model_dump())
        labels = multilabel_scores(scores, relevant, images.is_novel)
        assert method.multilabel.model_dump() == pytest.approx(labels.model_dump())
    # And AP@50 itself, written out: a category's ranking by hand.
    row = int(relevant.sum(axis=1).argmax())
    ranked = rank_images(plain_scores("picturebook", "clip", images)[row : row + 1], 50)[0]
    by_hand = average_precision_at_k(relevant[row, ranked], int(relevant[row].sum()), 50)
    assert found.methods[1].ap50[row] == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.slow
def test_the_settings_of_an_encoder_count(evaluate, book, encoder_name):
    found = evaluate(encoder=[encoder_name], head="dense", image_size=96, keep_threshold=0.9)
    images = open_dataset(f"picturebook:{book}")
    scores = plain_scores(encoder_name, "dense", images, image_size=96, keep_threshold=0.9)
    expected = summarise_scores(scores, images.relevant(), images.is_novel)
    np.testing.assert_allclose(found.methods[0].ap50, expected.ap50, atol=1e-9)
    about = found.methods[0].about
    assert (about["head"], about["image_size"], about["num_slots"]) == ("dense", 96, 9)


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out_and_counted(evaluate, book, home, encoder_name):
    spoilt = home / "spoilt"
    shutil.copytree(book, spoilt, ignore=shutil.ignore_patterns("others"))
    (spoilt / "images" / "000003.jpg").unlink()
    (spoilt / "images" / "000007.jpg").write_bytes(b"<html>not found</html>")
    given = {"dataset": f"picturebook:{spoilt}", "encoder": [encoder_name], "head": "clip"}
    found = evaluate(**given)
    assert (found.num_images, found.num_left_out) == (58, 2)
    kept = np.delete(np.arange(60), [3, 7])
    images = open_dataset(f"picturebook:{book}")
    relevant = images.relevant()[:, kept]
    scores = plain_scores(encoder_name, "clip", images)[:, kept]
    expected = summarise_scores(scores, relevant, images.is_novel)
    np.testing.assert_allclose(found.methods[0].ap50, expected.ap50, atol=1e-9)
    assert [share.num_images for share in found.shares] == relevant.sum(axis=1).tolist()
    with pytest.raises(
        StageError, match=r"2 of the data set's 60 images cannot be measured.*not there"
    ) as raised:
        evaluate(**given, max_bad_fraction=0.03)
    assert raised.value.stage == "score"
    shutil.rmtree(spoilt / "images")
    with pytest.raises(
        StageError, match=r"60 of the data set's 60 images cannot be measured.*60 × not there .*000"
    ):
        evaluate(**given)


def stored_scores(index_path: Path, images: Any) -> np.ndarray:
    """The highest cosine over what the index stores of the data set's images [V, B], image by image."""
    layout = Layout(str(index_path))
    snapshot = snapshots.latest(layout)
    table = open_table(layout.images_uri(snapshot.fingerprint), version=snapshot.images_version)
    uri_of = {
        row["_rowid"]: row["uri"] for row in table.to_table(columns=["uri"], with_row_id=True).to_pylist()
    }
    text = load_encoder(open_bundle(layout.bundle_uri(snapshot.fingerprint)), "cpu").embed_text(
        images.categories
    )
    columns = {}
    for batch in read_vectors(table, 0, 10**9, batch_rows=16):
        for row, image_id in enumerate(batch.image_ids):
            vectors = batch.vectors[batch.offsets[row] : batch.offsets[row + 1]].astype(np.float64)
            columns[uri_of[image_id]] = (text.astype(np.float64) @ vectors.T).max(axis=1).astype(np.float32)
    return np.stack([columns[uri] for uri in images.uris.to_pylist()], axis=1)


def test_an_index_beside_exact_search(evaluate, book, index):
    found = evaluate(index=str(index))
    images = open_dataset(f"picturebook:{book}")
    assert [method.name for method in found.methods] == ["index", "exact search"]
    assert (found.num_images, found.num_left_out, found.index["images_of_other_data"]) == (60, 0, 30)
    by_index, exact = found.methods
    scores = stored_scores(index, images)
    expected = summarise_scores(scores, images.relevant(), images.is_novel)
    np.testing.assert_allclose(exact.ap50, expected.ap50, atol=1e-9)
    # So few images are all ranked again with their exact vectors: nothing is lost.
    assert found.index["recall_at_50"] == 1
    np.testing.assert_array_equal(by_index.ap50, exact.ap50)


def test_what_an_index_loses_is_seen(evaluate, book, index, home):
    lossy = shutil.copytree(index, home / "lossy")
    layout = Layout(str(lossy))
    snapshot = snapshots.latest(layout)
    table = open_table(layout.images_uri(snapshot.fingerprint))
    rows = table.to_table(columns=["uri"], with_row_id=True).to_pylist()
    lost = {row["uri"]: row["_rowid"] for row in rows if row["uri"].endswith(("1.jpg", "2.jpg", "5.jpg"))}
    hidden = snapshot.model_copy(update={"deleted_image_ids": sorted(lost.values())})
    found = evaluate(index=str(lossy), snapshot=snapshots.publish(layout, hidden).snapshot_id)
    images = open_dataset(f"picturebook:{book}")
    relevant, scores = images.relevant(), stored_scores(lossy, images)
    by_index, exact = found.methods
    np.testing.assert_allclose(
        exact.ap50, summarise_scores(scores, relevant, images.is_novel).ap50, atol=1e-9
    )
    is_lost = np.isin(images.uris.to_pylist(), list(lost))
    assert is_lost.sum() == 18
    hits = ~is_lost[rank_images(scores, 50)]
    assert found.index["recall_at_50"] == pytest.approx(hits.mean())
    ranked = rank_images(np.where(is_lost, -2, scores), 60 - 18)
    for row, shown in enumerate(relevant):
        expected = average_precision_at_k(shown[ranked[row]], int(shown.sum()), 50)
        np.testing.assert_allclose(by_index.ap50[row], expected, atol=1e-9)
    # The latest snapshot of the index itself is as it was.
    assert evaluate(index=str(lossy), snapshot=1).index["recall_at_50"] == 1


@pytest.mark.slow
def test_images_that_the_index_lacks_are_left_out_and_counted(evaluate, book, index, home):
    content = json.loads((book / "annotations.json").read_text())
    content["images"].append({"id": 10_000, "file_name": "unknown.jpg"})
    content["annotations"].append({"id": 10**6, "image_id": 10_000, "category_id": 1})
    annotations = home / "more.json"
    annotations.write_text(json.dumps(content))
    given = {
        "dataset": f"coco:{annotations}:{book}/images",
        "split": str(book / "split.json"),
        "index": str(index),
    }
    found = evaluate(**given)
    assert (found.num_images, found.num_left_out) == (60, 1)
    without = evaluate(index=str(index))
    for method, same in zip(found.methods, without.methods, strict=True):
        np.testing.assert_array_equal(method.ap50, same.ap50)
    with pytest.raises(DataError, match="lacks 1 of the 61 images"):
        evaluate(**given, max_bad_fraction=0)


# The command


@pytest.fixture(scope="module")
def job() -> Any:
    """`jobs/evaluate.py` as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_prints_json_and_writes_the_categories(
    job, book, index, encoder_name, tmp_path, capsys, ray_address
):
    dataset = ["--dataset", f"picturebook:{book}", "--batch-size", "8", "--json"]
    path = tmp_path / "new folder" / "categories.csv"
    one = ["--encoder", encoder_name, "--head", "clip", "--csv", str(path)]
    assert job.main([*dataset, *one]) == 0
    single = json.loads(capsys.readouterr().out)
    assert list(single["map50"]) == ["base", "novel", "all"]
    assert (single["images"], single["head"], single["categories"]) == (60, "clip", 65)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == ["category", "group", "images", "ap50"]
    aps = {row["category"]: float(row["ap50"]) for row in rows if row["ap50"]}
    assert len(rows) == 65
    assert np.mean(list(aps.values())) == pytest.approx(single["map50"]["all"], abs=1e-5)
    novel = [float(row["ap50"]) for row in rows if row["group"] == "novel" and row["ap50"]]
    assert np.mean(novel) == pytest.approx(single["map50"]["novel"], abs=1e-5)

    several = ["--encoder", f"{encoder_name}#clip", "--encoder", f"{encoder_name}#dense", "--csv", str(path)]
    assert job.main([*dataset, *several]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [each["head"] for each in both["encoders"]] == ["clip", "dense"]
    assert both["encoders"][0]["map50"] == pytest.approx(single["map50"])
    names = [f"ap50 {encoder_name}#{head}" for head in ("clip", "dense")]
    assert list(csv.DictReader(path.read_text().splitlines()).fieldnames)[3:] == names

    assert job.main([*dataset, "--index", str(index)]) == 0
    of_index = json.loads(capsys.readouterr().out)
    assert list(of_index["map50"]) == list(of_index["exact"]["map50"]) == ["base", "novel", "all"]
    assert of_index["images_of_other_data"] == 30


@pytest.mark.slow
def test_the_command_prints_tables(job, book, encoder_name, capsys, ray_address):
    given = ["--dataset", f"picturebook:{book}", "--encoder", encoder_name, "--head", "clip"]
    assert job.main([*given, "--task", "multilabel"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert sum(line.strip().startswith("wheelchair ") for line in lines) == 1
    [head] = [line for line in lines if "mAP@50" in line]
    assert head.split() == [
        *("mAP@50", "base", "novel", "all"),
        *("GZSL", "F1@3", "mAP", "ZSL", "F1@3", "mAP"),
    ]
    [method] = [line for line in lines if line.strip().startswith(f"{encoder_name}#clip")]
    assert len(method.split()) == 8


@pytest.mark.slow
def test_a_split_without_novel_categories_has_no_novel_mean(
    job, book, encoder_name, tmp_path, capsys, ray_address
):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"base": ["cat", "dog"], "novel": []}))
    given = ["--dataset", f"picturebook:{book}", "--split", str(split), "--encoder", encoder_name]
    assert job.main([*given, "--head", "clip", "--task", "multilabel", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["map50"]["novel"] is None
    assert found["multilabel"]["zsl_map"] is None
    assert found["map50"]["base"] == found["map50"]["all"] > 0


WRONG: list[tuple[list[str], list[str]]] = [
    (["--dataset", "picturebook:/nowhere"], ["no picture book in /nowhere"]),
    (["--dataset", "photos:/nowhere"], ["no such data set: 'photos:/nowhere'", "coco:"]),
    (["--encoder", "picturbook"], ["unknown encoder 'picturbook'"]),
    (["--encoder", "picturebook#sum"], ["no trained sum head"]),
    (["--encoder", "picturebook", "--encoder", "picturebook#cluster"], ["is measured once"]),
    (["--encoder", "picturebook", "--index", "x"], ["either --encoder", "--index"]),
    (["--encoder", "picturebook", "--csv", "gs://bucket/a.csv"], ["gs://bucket"]),
    (["--encoder", "picturebook", "--split", "/nowhere.json"], ["the split cannot be read", "/nowhere.json"]),
    (["--index", "/nowhere"], ["/nowhere has no published snapshot"]),
    (["--index", "INDEX", "--snapshot", "77"], ["77"]),
    (
        ["--index", "INDEX", "--dataset", "coco:OTHERS"],
        ["holds no image of coco others", "/other/000000.jpg"],
    ),
    (["--index", "INDEX", "--task", "multilabel"], ["multilabel needs --encoder"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_bad_input_gets_one_line(job, book, index, home, capsys, arguments, words):
    annotations = home / "others.json"
    shutil.copy(book / "annotations.json", annotations)
    given = [*arguments] if "--dataset" in arguments else ["--dataset", f"picturebook:{book}", *arguments]
    if "--index" not in given and "--encoder" not in given:
        given += ["--encoder", "picturebook"]
    given = [each.replace("INDEX", str(index)).replace("OTHERS", f"{annotations}:/other") for each in given]
    if "coco:" in " ".join(given):
        given += ["--split", str(book / "split.json")]
    assert job.main(given) == 2
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert complaints == captured.err.splitlines()[-1:]
    for word in words:
        assert word in complaints[0]
    assert captured.out == ""
