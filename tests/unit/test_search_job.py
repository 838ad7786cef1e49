"""The command: what it prints, writes and returns, and the one line that wrong input gets."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from for_ray import retrieval, storage
from for_ray.errors import StorageError
from tests.planted import Planted, PlantedIndex

JOB = Path(__file__).resolve().parents[2] / "jobs" / "search.py"
DIM = 16
NAMES = [
    "plain.jpg",
    "a folder/[bold]marked[/bold].jpg",
    "long/" + 20 * "very " + "long.jpg",
    "Größe-雪.jpg",
    "two\nlines.jpg",
]


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the job in this process."""
    spec = importlib.util.spec_from_file_location("search_job", JOB)
    assert spec
    assert spec.loader
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, arguments)])
        code = job.main()
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture
def index(planted_index: PlantedIndex, tmp_path: Path) -> PlantedIndex:
    """Images that lie on the disk, with boxes and random vectors."""
    rng = np.random.default_rng(3)
    images = []
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(path)
        vectors = rng.normal(size=(2, DIM))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        boxes = [(0, 0, 1, 1), (0.2, 0.4, 0.6, 0.8)]
        images.append(Planted(str(path), vectors, boxes, etag=storage.stat(str(path)).etag))
    planted_index.add(images)
    planted_index.publish(nprobe=2)
    return planted_index


def test_table_has_a_line_for_each_hit(run: Callable[..., Finished], index: PlantedIndex) -> None:
    hits = retrieval.open_index(index.uri).search("a red car", k=5)
    finished = run("--index", index.uri, "a red car", "--top", 5)
    assert finished.code == 0
    lines = finished.out.rstrip("\n").split("\n")
    assert lines[0].split() == ["rank", "score", "uri", "box:", "x0", "y0", "x1", "y1"]
    assert len(lines) == 6
    for rank, (line, hit) in enumerate(zip(lines[1:], hits, strict=True), start=1):
        box = " ".join(f"{side:.2f}" for side in hit.box)
        assert " ".join(line.split()) == " ".join(
            f"{rank} {hit.score:.4f} {storage.shown(hit.uri)} {box}".split()
        )
    assert finished.err == ""


def test_json_is_a_list_of_hits(run: Callable[..., Finished], index: PlantedIndex) -> None:
    hits = retrieval.open_index(index.uri).search("a red car", k=3)
    finished = run("--index", index.uri, "a red car", "--top", 3, "--json")
    printed = json.loads(finished.out)
    assert [set(row) for row in printed] == 3 * [
        {"uri", "score", "image_id", "slot", "box", "found", "folded"}
    ]
    assert [row["uri"] for row in printed] == [hit.uri for hit in hits]
    assert [row["score"] for row in printed] == [hit.score for hit in hits]
    assert [row["image_id"] for row in printed] == [hit.image_id for hit in hits]
    boxes = {0: [0.0, 0.0, 1.0, 1.0], 1: [0.2, 0.4, 0.6, 0.8]}
    assert [row["box"] for row in printed] == [boxes[hit.slot] for hit in hits]
    assert run("--index", index.uri, "a red car", "--top", 3, "--json").out == finished.out


def test_pages_follow_each_other(run: Callable[..., Finished], index: PlantedIndex) -> None:
    whole = json.loads(run("--index", index.uri, "a red car OR a dog", "--json").out)
    first = run("--index", index.uri, "a red car OR a dog", "--json", "--top", 3)
    assert first.err.startswith("more: --page ")
    index.publish(nprobe=1)  # the page stays with the snapshot that it began in
    token = first.err.split()[-1]
    second = run("--index", index.uri, "a red car OR a dog", "--json", "--top", 3, "--page", token)
    assert json.loads(first.out) + json.loads(second.out) == whole
    assert second.err == "2 images: this snapshot of the index holds no more\n"


def test_several_names_have_a_column_each(run: Callable[..., Finished], index: PlantedIndex) -> None:
    hits = retrieval.open_index(index.uri).search("a red car AND a dog", k=2)
    finished = run("--index", index.uri, "a red car AND a dog", "--top", 2)
    lines = finished.out.rstrip("\n").split("\n")
    assert " ".join(lines[0].split()) == "rank score uri a red car: x0 y0 x1 y1 a dog: x0 y0 x1 y1"
    for line, hit in zip(lines[1:], hits, strict=True):
        assert len(hit.found) == 2
        for found in hit.found:
            assert f"{found.score:.4f} " + " ".join(f"{side:.2f}" for side in found.box) in line


def test_question_that_does_not_parse_gets_a_caret(run: Callable[..., Finished], index: PlantedIndex) -> None:
    finished = run("--index", index.uri, "a dog AND")
    assert (finished.code, finished.out) == (2, "")
    assert finished.err == (
        "error: the question doesn't parse: expected a name after AND, found the end\n"
        "  a dog AND\n"
        "           ^\n"
    )


def test_filters_regions_and_objects(
    run: Callable[..., Finished], index: PlantedIndex, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    under = run("--index", index.uri, "a dog", "--json", "--under", f"{folder}/long/")
    assert [row["uri"] for row in json.loads(under.out)] == [str(folder / NAMES[2])]
    assert under.err.startswith(
        "1 image: this snapshot of the index holds no more that pass the filter: under"
    )
    glob = run("--index", index.uri, "a dog", "--json", "--glob", "*long*", "--min-score", "-1")
    assert glob.out == under.out
    none = run("--index", index.uri, "a dog", "--filter", "size_bytes > 5")
    assert none.code == 0
    assert none.err == "no image of snapshot 1 passes the filter: where size_bytes > 5\n"
    like = json.loads(run("--index", index.uri, "--like", "1:1", "--json", "--top", 1).out)
    assert [(row["image_id"], row["slot"]) for row in like] == [(1, 1)]
    for region, slot in (("0,0,1,1", 0), ("0.25,0.4,0.6,0.8", 1)):  # the boxes of each image's slots
        of_image = run("--index", index.uri, "--like", "1", "--region", region, "--json")
        assert of_image.out == run("--index", index.uri, "--like", f"1:{slot}", "--json").out != ""
    example = folder / NAMES[0]
    region = run("--index", index.uri, "--image", example, "--region", "0,0,0.5,0.5", "--json", "--top", 2)
    hits = retrieval.open_index(index.uri).ask(
        retrieval.Question(image=example.read_bytes(), region=(0, 0, 0.5, 0.5), k=2)
    )
    assert json.loads(region.out) == [hit.to_json() for hit in hits.hits]


def test_folded_images_stand_under_their_hit(
    run: Callable[..., Finished], planted_index: PlantedIndex
) -> None:
    vector = np.eye(1, DIM)
    planted_index.add([Planted(name, vector) for name in ("/a.jpg", "/b.jpg")] + [Planted("/c.jpg", -vector)])
    planted_index.publish(nprobe=2)
    finished = run("--index", planted_index.uri, "a dog", "--fold")
    assert sorted(line.split()[-1] for line in finished.out.splitlines() if "≈" in line) == ["/b.jpg"]
    folded = json.loads(run("--index", planted_index.uri, "a dog", "--fold", "--json").out)
    assert {row["uri"]: row["folded"] for row in folded} == {"/a.jpg": ["/b.jpg"], "/c.jpg": []}


def test_more_than_there_is(run: Callable[..., Finished], index: PlantedIndex) -> None:
    finished = run("--index", index.uri, "a red car", "--json", "--top", 10_000)
    assert finished.code == 0
    assert len(json.loads(finished.out)) == 5
    assert finished.err == "5 images: this snapshot of the index holds no more\n"


def test_sheet_and_picture_query(run: Callable[..., Finished], index: PlantedIndex, tmp_path: Path) -> None:
    sheet, example = tmp_path / "out" / "sheet.jpg", tmp_path / "images" / NAMES[0]
    finished = run("--index", index.uri, "--image", example, "--top", 2, "--json", "--sheet", sheet)
    assert finished.code == 0
    hits = retrieval.open_index(index.uri).search(image=example.read_bytes(), k=2)
    assert [row["uri"] for row in json.loads(finished.out)] == [hit.uri for hit in hits]
    assert str(sheet) in finished.err
    with Image.open(sheet) as image:
        drawn = np.asarray(image.convert("RGB"), int)
    assert drawn.shape == (410, 852, 3)
    yellow = (np.abs(drawn - (255, 214, 10)).max(axis=-1) < 40)[112:352]
    assert yellow[:, 36:276].any()
    assert yellow[:, 306:546].any()
    assert not yellow[:, 576:].any()


def test_sheet_of_images_that_are_gone(
    run: Callable[..., Finished], index: PlantedIndex, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / "images" / name).unlink()
    finished = run("--index", index.uri, "a red car", "--top", 4, "--sheet", tmp_path / "sheet.jpg")
    assert finished.code == 0
    assert len(finished.out.splitlines()) == 5
    with Image.open(tmp_path / "sheet.jpg") as image:
        drawn = np.asarray(image.convert("RGB"), int)
    assert (np.abs(drawn[112:352, 36:276] - (74, 78, 86)).max(axis=-1) < 10).mean() > 0.9


def test_hits_are_printed_before_the_sheet_fails(
    run: Callable[..., Finished], index: PlantedIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise StorageError("cannot write sheet.jpg: no space left; free some")

    monkeypatch.setattr(storage, "write_bytes", full)
    finished = run("--index", index.uri, "a dog", "--top", 4, "--json", "--sheet", tmp_path / "sheet.jpg")
    assert finished.code == 2
    assert len(json.loads(finished.out)) == 4
    assert finished.err.endswith("\nerror: cannot write sheet.jpg: no space left; free some\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a dog"], ["--index"]),
        (["--index", "{index}"], ["words", "--image"]),
        (["--index", "{index}", "a dog", "--image", "{image}"], ["words", "--image"]),
        (["--index", "{index}", ""], ["empty"]),
        (["--index", "{index}", "  "], ["empty"]),
        (["--index", "{index}", "x" * 10_000], ["10,000 letters", "1,000"]),
        (["--index", "{index}", "a dog", "--like", "1:0"], ["words", "--like"]),
        (["--index", "{index}", "--like", "1:7"], ["slots 0 to 1", "got 7"]),
        (["--index", "{index}", "--like", "a"], ["IMAGE_ID:SLOT"]),
        (["--index", "{index}", "a dog", "--region", "0,0,1,1"], ["--region", "--image", "--like IMAGE_ID"]),
        (["--index", "{index}", "--like", "1:1", "--region", "0,0,1,1"], ["IMAGE_ID alone"]),
        (["--index", "{index}", "--like", "1", "--region", "0,0,1"], ["x0,y0,x1,y1", "'0,0,1'"]),
        (["--index", "{index}", "a dog", "--filter", "size_bytes > 1e12"], ["1e12", "write whole numbers"]),
        (["--index", "{index}", "woof " * 160], ["'woof woof", "77 tokens"]),
        (["--index", "{index}", "--image", "{image}", "--region", "0,0,1"], ["x0,y0,x1,y1", "'0,0,1'"]),
        (["--index", "{index}", "--image", "{image}", "--region", "0,1,1,0"], ["x0,y0,x1,y1", "'0,1,1,0'"]),
        (["--index", "{index}", "a dog", "--filter", "kamera = 2"], ["kamera", "columns: uri, etag"]),
        (["--index", "{index}", "a dog", "--glob", "[a"], ["'[a'", "never closed"]),
        (["--index", "{index}", "a dog", "--min-score", "2"], ["--min-score", "2"]),
        (["--index", "{index}", "a dog", "--page", "abc"], ["no token"]),
        (["--index", "{index}", "a dog", "--top", "0"], ["--top", "0"]),
        (["--index", "{index}", "a dog", "--top", "10000000"], ["--top", "10000000", "10000"]),
        (["--index", "{index}", "a dog", "--top", "many"], ["--top", "many"]),
        (["--index", "{index}", "a dog", "--snapshot", "9"], ["{index}", "snapshot 9"]),
        (["--index", "{index}", "a dog", "--encoder", "picturebok"], ["picturebok"]),
        (["--index", "{index}", "a dog", "--encoder", "open_clip:RN50@random"], ["{index}", "RN50"]),
        (["--index", "{index}", "--image", "{folder}/none.jpg"], ["{folder}/none.jpg"]),
        (["--index", "{index}", "--image", "{folder}/text.jpg"], ["not an image"]),
        (["--index", "{index}", "a dog", "--sheet", "{folder}/sheet.png"], ["sheet.png", ".jpg"]),
        (["--index", "{index}", "a dog", "--sheet", "{folder}/text.jpg/sheet.jpg"], ["{folder}/text.jpg"]),
        (["--index", "{folder}/nowhere", "a dog"], ["{folder}/nowhere", "jobs/index.py"]),
        (["--index", "{folder}", "a dog"], ["{folder}", "jobs/index.py"]),
        (["--index", "{index}", "a dog", "--tops", "3"], ["--tops", "--top"]),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_line(
    run: Callable[..., Finished], index: PlantedIndex, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    places = {"index": index.uri, "folder": tmp_path, "image": tmp_path / "images" / NAMES[0]}
    before = sorted(tmp_path.rglob("*"))
    finished = run(*(argument.format(**places) for argument in arguments))
    assert finished.code == 2
    assert finished.out == ""
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1
    for word in words:
        assert word.format(**places) in finished.err
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_and_missing_segment_get_one_line(run: Callable[..., Finished], index: PlantedIndex) -> None:
    segment = index.segment_path("segment-0.faiss")
    segment.write_bytes(segment.read_bytes()[:-1])
    damaged = run("--index", index.uri, "a dog")
    segment.unlink()
    missing = run("--index", index.uri, "a dog")
    for finished in (damaged, missing):
        assert (finished.code, finished.out, finished.err.count("\n")) == (2, "", 1)
        assert str(segment) in finished.err


@pytest.mark.parametrize("arguments", [["--help"], ["--index", "x", "a dog", "--top", "0"]])
def test_help_and_wrong_settings_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = {[str(JOB), *arguments]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'faiss', 'lance', 'open_clip', 'ray', 'pyarrow', 'boto3'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    if arguments == ["--help"]:
        for flag in (
            "--index",
            "--image",
            "--top",
            "--json",
            "--sheet",
            "--encoder",
            "--snapshot",
            "--filter",
        ):
            assert flag in finished.stdout


def test_unfolded_in_a_pipe(
    run: Callable[..., Finished], index: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run("--index", index.uri, "a red car", "--top", 5).out.count("\n") == 6


def test_console_is_not_the_only_reader(index: PlantedIndex) -> None:
    """As a command of its own, with UTF-8 names, in a pipe."""
    command = [sys.executable, str(JOB), "--index", index.uri, "a red car", "--top", "5"]
    finished = subprocess.run(command, capture_output=True, check=True)
    assert all(storage.shown(name) in finished.stdout.decode("utf-8") for name in NAMES)
