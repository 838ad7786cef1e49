"""The job that labels images, on sixty pages of the picture book: what it makes, leaves alone and refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from safetensors.numpy import load_file

from for_ray.config import LabelSettings
from for_ray.datasets.picturebook import write_picturebook
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError, StageError
from for_ray.index import table
from for_ray.index.labels import read_label_run
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.preprocess import decode
from for_ray.pipeline.label import run_label
from for_ray.schema import LabelLayout
from for_ray.stages.progress import Progress
from for_ray.stages.report import LabelSummary
from for_ray.storage import Lease

JOB = Path(__file__).parents[2] / "jobs" / "pseudo_label.py"
OTHERS = ["accordion", "feather", "tent", "mitten", "saxophone", "tadpole", "violin", "volcano"]

Run = Any


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("label")


@pytest.fixture(scope="module")
def book(home: Path) -> Path:
    """Never changed."""
    write_picturebook(home / "book", images=60, split="train", processes=1)
    return home / "book"


@pytest.fixture(scope="module")
def names(home: Path, book: Path) -> Path:
    """The categories of the picture book and eight other names."""
    path = home / "names.txt"
    path.write_text("\n".join([*open_dataset(f"picturebook:{book}").categories, *OTHERS]))
    return path


@pytest.fixture(scope="module")
def run(ray_address: str, home: Path, book: Path, names: Path) -> Run:
    """Runs the job in this process on the data set and the folder `labels` of `home`."""

    def label(**settings: Any) -> LabelSummary:
        given = {
            "dataset": f"picturebook:{book}",
            "output": str(home / "labels"),
            "vocabulary": str(names),
            "threshold": 0.3,
            "batch_size": 8,
            "read_threads": 4,
            **settings,
        }
        return run_label(LabelSettings(**given), progress=Progress(is_quiet=True))

    return label


@pytest.fixture(scope="module")
def first_run(run: Run, home: Path) -> tuple[LabelSummary, Path]:
    """The summary of a run over all pages, and a copy of what it made."""
    summary = run()
    return summary, shutil.copytree(home / "labels", home / "first")


@pytest.fixture
def labels(first_run: tuple[LabelSummary, Path], home: Path) -> Path:
    """The table as the first run left it; each test may change it."""
    shutil.rmtree(home / "labels", ignore_errors=True)
    return shutil.copytree(first_run[1], home / "labels")


@pytest.fixture
def copied(book: Path, home: Path) -> Path:
    """The data set at another place, the same for all tests; each may change it."""
    shutil.rmtree(home / "copy", ignore_errors=True)
    return shutil.copytree(book, home / "copy")


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    rows = lance.dataset(str(output / "labels.lance")).to_table(with_row_id=True).to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return {Path(row["uri"]).name: row for row in rows}


def assert_same_labels(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["error"], one["labels"]) == (other["error"], other["labels"])
    np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-4)
    np.testing.assert_allclose(one["features"], other["features"], atol=2e-3)


def test_a_data_set_becomes_a_table_of_labels_and_features(first_run, labels, book, names):
    summary, _ = first_run
    rows, record = rows_of(labels), read_label_run(LabelLayout(str(labels)))
    assert set(rows) == {path.name for path in (book / "images").iterdir()}
    assert (summary.images, summary.new, summary.labelled, summary.missing, summary.quarantined) == (
        *(60, 60, 60, 0, 0),
    )
    assert summary.labels == sum(len(row["labels"]) for row in rows.values()) > 60
    assert summary.without_labels == sum(not row["labels"] for row in rows.values())
    vocabulary = names.read_text().split("\n")
    assert (labels / "vocabulary.txt").read_text().split("\n")[:-1] == vocabulary
    assert record.num_names == summary.names == len(vocabulary)
    bundle = open_bundle("picturebook", head="cluster")
    assert (record.fingerprint, record.threshold) == (bundle.fingerprint, 0.3)
    encoder = load_encoder(open_bundle(str(labels / "bundle")), "cpu")
    assert encoder.fingerprint == bundle.fingerprint
    text = load_file(labels / "vocabulary.safetensors")["text"]
    np.testing.assert_allclose(text, encoder.embed_text(vocabulary), atol=1e-4)
    for name in ("000000.jpg", "000037.jpg"):
        row = rows[name]
        raw = (book / "images" / name).read_bytes()
        pixels = decode(raw, image_size=bundle.image_size, resize_mode=bundle.resize_mode).pixels[None]
        features = encoder.features(pixels)
        held = np.array(row["features"], np.float32).reshape(record.num_tokens, record.channels)
        np.testing.assert_allclose(held[record.num_prefix :], features.cells[0].numpy(), atol=5e-3, rtol=2e-3)
        logits = encoder.logit_scale * encoder.encode(pixels).vectors[0].numpy() @ text.T
        softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        best = softmax.max(axis=0)
        assert row["labels"] == [index for index in np.argsort(-best).tolist() if best[index] > 0.3]
        np.testing.assert_allclose(row["probabilities"], best[row["labels"]], atol=1e-3)


def test_the_quality_of_labels_is_that_of_a_plain_loop(first_run, labels, book):
    summary, dataset = first_run[0], open_dataset(f"picturebook:{book}")
    rows = rows_of(labels)
    counts = {"base": [0, 0, 0], "novel": [0, 0, 0]}  # found, shown, right
    for index, uri in enumerate(dataset.uris.to_pylist()):
        shown = set(dataset.labels.row(index).tolist())
        found = {label for label in rows[Path(uri).name]["labels"] if label < len(dataset.categories)}
        for category in range(len(dataset.categories)):
            group = counts["novel" if dataset.is_novel[category] else "base"]
            for place, holds in enumerate((category in found, category in shown, category in found & shown)):
                group[place] += holds
    for group, (found, shown, right) in counts.items():
        assert summary.precision[group] == pytest.approx(right / found)
        assert summary.recall[group] == pytest.approx(right / shown)
        chance = shown / (60 * int((dataset.is_novel == (group == "novel")).sum()))
        assert summary.precision[group] > 2 * chance


def test_the_report_shows_the_images_with_their_labels(first_run, labels):
    page = (labels / "report.html").read_text()
    assert page.count("<img src=") == 24
    assert page.count("data:image/jpeg;base64,/9j/") == 24
    assert "tag good" in page
    assert f"{first_run[0].labels:,}" in page


def test_a_second_run_changes_nothing(run, labels):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in labels.rglob("*") if "lease" not in path.name}

    before = state()
    again = run()
    assert again.message == "nothing changed; nothing to label"
    assert (again.new, again.changed, again.gone, again.unchanged, again.labelled) == (0, 0, 0, 60, 60)
    assert state() == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threshold": 0.2}, "threshold 0.3, not 0.2"),
        ({"num_labels": 3}, "num_labels 50, not 3"),
        ({"features": False}, "has_features True, not False"),
        ({"exclude_novel": True}, "exclude_novel False, not True"),
        ({"head": "dense"}, "fingerprint"),
    ],
)
def test_other_settings_are_refused_on_the_same_table(run, labels, changed, words):
    with pytest.raises(ConfigError) as caught:
        run(**changed)
    message = str(caught.value)
    assert f"{labels} holds labels of other settings: " in message
    assert words in message
    assert message.endswith("give another --output")
    assert "\n" not in message


@pytest.mark.slow
def test_new_changed_gone_and_broken_images(run, copied, home):
    """Half of the images first; then the rest, of which one is broken, while others change and go."""
    output, images = home / "halves", copied / "images"
    given = {"dataset": f"picturebook:{copied}", "output": str(output)}
    later = sorted(images.iterdir())[30:]
    for path in later:
        path.rename(copied / path.name)
    with pytest.raises(DataError, match=r"30 of the 60 images .* are missing, such as .*/000030\.jpg"):
        run(**given)
    assert not output.exists()
    half = run(**given, max_bad_fraction=0.5)
    assert (half.new, half.missing, half.labelled) == (30, 30, 30)
    before = rows_of(output)
    for path in later:
        (copied / path.name).rename(path)
    (images / "000031.jpg").write_bytes(b"<html>not found</html>")
    shutil.copy(images / "000050.jpg", images / "000005.jpg")
    (images / "000006.jpg").unlink()
    whole = run(**given)
    assert (whole.new, whole.changed, whole.gone, whole.unchanged) == (30, 1, 1, 28)
    assert (whole.labelled, whole.quarantined, whole.missing) == (58, 1, 1)
    rows = rows_of(output)
    assert "HTML" in rows["000031.jpg"]["error"]
    assert (rows["000031.jpg"]["labels"], rows["000031.jpg"]["features"]) == ([], None)
    assert_same_labels(rows["000005.jpg"], rows["000050.jpg"])
    kept = set(before) - {"000005.jpg", "000006.jpg"}
    assert {name: rows[name] for name in kept} == {name: before[name] for name in kept}  # not labelled again
    page = (output / "report.html").read_text()
    assert "unreadable" in page
    (images / "000007.jpg").write_bytes(b"")
    with pytest.raises(
        StageError, match=r"3 of 60 images are unreadable .*, more than max_bad_fraction 0.04"
    ):
        run(**given, max_bad_fraction=0.04)
    assert not (output / "report.html").exists()  # the table is not whole
    assert run(**given).quarantined == 2
    assert (output / "report.html").exists()


@pytest.mark.slow
def test_labels_without_features_and_without_novel_names(run, home, book):
    output = home / "plain"
    summary = run(output=str(output), features=False, exclude_novel=True)
    rows = rows_of(output)
    assert all("features" not in row for row in rows.values())
    dataset = open_dataset(f"picturebook:{book}")
    novel = {name for name, is_novel in zip(dataset.categories, dataset.is_novel, strict=True) if is_novel}
    assert set((output / "vocabulary.txt").read_text().split("\n")).isdisjoint(novel)
    assert novel <= set(read_label_run(LabelLayout(str(output))).dropped_names)
    assert summary.dropped_names >= 17
    assert (summary.precision["novel"], summary.recall["novel"]) == (None, None)
    assert summary.precision["base"] > 0.1


def test_a_dry_run_writes_nothing(run, home):
    summary = run(output=str(home / "nowhere"), dry_run=True)
    assert (summary.images, summary.new, summary.labelled) == (60, 60, 0)
    assert summary.message.startswith("dry run: 60 images would be labelled")
    assert not (home / "nowhere").exists()


def write_coco(folder: Path) -> str:
    """A COCO file over the pictures of a folder, the even ones with a dog; what `--dataset` takes."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    box = {"bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    shown = [{"id": i + 1, "image_id": i + 1, "category_id": 1, **box} for i in range(0, len(names), 2)]
    content = {
        "images": [
            {"id": i + 1, "file_name": each, "width": 120, "height": 100} for i, each in enumerate(names)
        ],
        "annotations": shown,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "split.json").write_text(json.dumps({"base": ["dog"], "novel": ["cat"]}))
    return f"coco:{folder}/annotations.json:{folder}/images"


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    run: Run, draw: Callable[..., None], tmp_path: Path, ray_address: str, encoder_name: str, names: Path
) -> None:
    draw(tmp_path / "images", range(1000))
    given = {
        "dataset": write_coco(tmp_path),
        "split": str(tmp_path / "split.json"),
        "encoder": encoder_name,
        "vocabulary": str(names),
        "threshold": "0.02",
        "batch_size": "16",
        "max_actors": "1",
    }
    output = tmp_path / "labels"
    words = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    job = subprocess.Popen(
        [sys.executable, str(JOB), *words, "--output", str(output), "--commit-seconds", "0.05"],
        env={**os.environ, "RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": "disabled"},
        stderr=subprocess.PIPE,
    )
    held, deadline = None, time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline:
        held = table.open_table(str(output / "labels.lance"))
        if held is not None and held.count_rows():
            break
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    _, complaint = job.communicate()
    assert held is not None, complaint.decode()
    committed = rows_of(output)
    assert 0 < len(committed) < 1000
    assert not (output / "report.html").exists()
    settings = {**given, "threshold": 0.02, "batch_size": 16, "max_actors": 1}
    summary = run(**settings, output=str(output))
    assert (summary.images, summary.labelled, summary.unchanged) == (1000, 1000, len(committed))
    rows = rows_of(output)
    for name, row in committed.items():  # neither lost nor labelled again
        assert rows[name] == row
    undisturbed = run(**{**settings, "max_actors": 2, "min_actors": 2}, output=str(tmp_path / "undisturbed"))
    assert undisturbed.labels == summary.labels > 0
    for name, row in rows_of(tmp_path / "undisturbed").items():
        assert_same_labels(row, rows[name])


@pytest.fixture(scope="module")
def job() -> Any:
    """`jobs/pseudo_label.py` as a module."""
    spec = importlib.util.spec_from_file_location("label_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_prints_one_line_of_json(job, labels, book, names, capsys):
    words = ["--dataset", f"picturebook:{book}", "--output", str(labels), "--vocabulary", str(names)]
    assert job.main([*words, "--threshold", "0.3", "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["unchanged"], summary["labelled"], summary["names"]) == (60, 60, 73)
    assert list(summary) == [name for name in LabelSummary.model_fields if name != "message"]
    assert "precision novel" in captured.err
    assert "nothing changed; nothing to label" in captured.err


def _empty_vocabulary(folder: Path) -> dict[str, str]:
    (folder / "none.txt").write_text("\n\n")
    return {"vocabulary": str(folder / "none.txt")}


def _nameless(folder: Path) -> dict[str, str]:
    (folder / "names.txt").write_text("dog\n...\n")
    return {"vocabulary": str(folder / "names.txt")}


WRONG: list[tuple[Callable[[Path], dict[str, str]], list[str]]] = [
    (lambda _: {"dataset": "coco:only-one.json"}, ["coco:ANNOTATIONS.json:IMAGES"]),
    (lambda folder: {"dataset": f"picturebook:{folder}/nowhere"}, ["nowhere"]),
    (lambda _: {"encoder": "picturbook"}, ["picturbook"]),
    (lambda _: {"head": "sum"}, ["no trained sum head"]),
    (lambda folder: {"vocabulary": f"{folder}/absent.txt"}, ["cannot read the names", "absent.txt"]),
    (_empty_vocabulary, ["none.txt", "names nothing"]),
    (_nameless, ["the vocabulary holds '...'", "take it out"]),
    (lambda _: {"threshold": "1.5"}, ["--threshold", "1.5"]),
    (lambda _: {"output": "gs://bucket/labels"}, ["gs://bucket/labels"]),
    (lambda _: {"vocabulry": "x"}, ["--vocabulry", "--vocabulary"]),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_bad_input_gets_one_line_and_nothing_is_written(job, book, names, tmp_path, capsys, wrong, words):
    output = tmp_path / "labels"
    given = {
        "dataset": f"picturebook:{book}",
        "vocabulary": str(names),
        "output": str(output),
        **wrong(tmp_path),
    }
    code = job.main([part for name, value in given.items() for part in (f"--{name}", value)])
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert complaints == captured.err.splitlines()[-1:]
    for word in words:
        assert word in complaints[0]
    assert captured.out == ""
    assert not output.exists()


def test_a_table_without_its_record_is_not_touched(run, labels):
    (labels / "labels.json").unlink()
    with pytest.raises(DataError, match=r"holds labels\.lance without labels\.json"):
        run()


def test_a_second_run_at_the_same_time_is_refused(run, tmp_path):
    with (
        Lease.acquire(LabelLayout(str(tmp_path / "labels")).lease_uri, "somebody"),
        pytest.raises(ConfigError, match="is being written by somebody"),
    ):
        run(output=str(tmp_path / "labels"))
    assert not (tmp_path / "labels" / "labels.json").exists()
