"""The index job on small folders: what it makes, leaves alone and refuses, and what a kill costs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.config import IndexSettings
from for_ray.errors import DataError, StageError
from for_ray.index import snapshots, table
from for_ray.index.search import SegmentSet, search_images
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout, Snapshot
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from for_ray.storage import Lease, stat

JOB = Path(__file__).parents[2] / "jobs" / "index.py"
JSON_KEYS = [
    *("listed", "new", "changed", "gone", "unchanged", "ignored", "indexed", "quarantined"),
    *("vectors", "segments", "snapshot", "recall_at_50", "seconds", "images_per_second"),
]

Run = Any


@pytest.fixture(scope="module")
def run(ray_address: str, encoder_name: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the job in this process on the folders `images` and `index` of `run.home`."""
    home = tmp_path_factory.mktemp("home")

    def index(**settings: Any) -> IndexSummary:
        given = {
            "images": str(home / "images"),
            "index": str(home / "index"),
            "encoder": encoder_name,
            "head": "dense",  # four cells; the order of clusters may turn with the last bit of a float
            "keep_threshold": 1.0,
            "batch_size": 8,
            "read_threads": 4,
            "max_bad_fraction": 0.1,
            **settings,
        }
        return run_index(IndexSettings(**given), progress=Progress(is_quiet=True))

    index.home = home  # type: ignore[attr-defined]
    return index


@pytest.fixture(scope="module")
def pictures(run: Run, draw: Callable[..., None]) -> Path:
    """60 pictures and three files that are none, never changed."""
    folder = run.home / "pictures"
    draw(folder, range(60))
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    (folder / "short.jpg").write_bytes((folder / "00000.jpg").read_bytes()[:700])
    return folder


@pytest.fixture
def images(run: Run, pictures: Path) -> Path:
    """The pictures, at a place that is the same for all tests; each may change them."""
    shutil.rmtree(run.home / "images", ignore_errors=True)
    shutil.rmtree(run.home / "index", ignore_errors=True)
    return shutil.copytree(pictures, run.home / "images")


@pytest.fixture(scope="module")
def first_run(run: Run, pictures: Path) -> tuple[IndexSummary, Path]:
    """The summary of the first run over the pictures, and a copy of the index that it made."""
    shutil.copytree(pictures, run.home / "images", dirs_exist_ok=True)
    shutil.rmtree(run.home / "index", ignore_errors=True)
    summary = run()
    return summary, shutil.copytree(run.home / "index", run.home / "first-index")


@pytest.fixture
def index(run: Run, first_run: tuple[IndexSummary, Path], images: Path) -> Path:
    """An index of the pictures as the first run left it; each test may change it."""
    return shutil.copytree(first_run[1], run.home / "index")


def latest(index_path: Path) -> Snapshot:
    return snapshots.latest(Layout(str(index_path)))


def rows_of(index_path: Path, *, version: int | None = None) -> dict[str, dict[str, Any]]:
    """The rows of the published encoder's table by the name of the file."""
    snapshot = latest(index_path)
    uri = Layout(str(index_path)).images_uri(snapshot.fingerprint)
    rows = lance.dataset(uri, version=version).to_table(with_row_id=True).to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return {Path(row["uri"]).name: row for row in rows}


def find_all(index_path: Path, query: np.ndarray) -> set[int]:
    """Ids of all images that a search of the published segments finds."""
    snapshot = latest(index_path)
    layout = Layout(str(index_path))
    paths = [Path(layout.segment_uri(snapshot.fingerprint, each.file_name)) for each in snapshot.segments]
    deleted = np.array(snapshot.deleted_image_ids, np.int64)
    found = search_images(SegmentSet(paths, nprobe=10**6), query, 1000, exact=None, exclude_image_ids=deleted)
    return set(found.image_ids.tolist())


def test_a_folder_becomes_an_index(first_run, index, pictures):
    summary, _ = first_run
    counts = summary.model_dump()
    assert {name: counts[name] for name in JSON_KEYS[:11]} == {
        "listed": 63,
        "new": 63,
        "changed": 0,
        "gone": 0,
        "unchanged": 0,
        "ignored": 0,
        "indexed": 60,
        "quarantined": 3,
        "vectors": 240,
        "segments": 1,
        "snapshot": 1,
    }
    assert summary.recall_at_50 >= 0.95
    assert summary.images_per_second > 0
    rows = rows_of(index)
    assert set(rows) == {path.name for path in pictures.iterdir()}
    assert rows["empty.png"]["error"] == "the file is empty"
    assert "HTML" in rows["page.jpg"]["error"]
    assert rows["short.jpg"]["error"].startswith("broken JPEG")
    good = [row for row in rows.values() if row["error"] is None]
    assert len(good) == 60
    assert all((row["width"], row["height"]) == (120, 100) for row in good)
    vectors = np.array([row["vectors"] for row in good], np.float32)
    assert vectors.shape == (60, 4, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=2e-3)
    boxes = np.array([row["boxes"] for row in good])
    assert (boxes[..., :2] < boxes[..., 2:]).all()
    snapshot = latest(index)
    assert (snapshot.listed, snapshot.indexed, snapshot.quarantined, snapshot.num_vectors) == (63, 60, 3, 240)
    assert find_all(index, vectors[0, 0]) == {row["_rowid"] for row in good}
    assert not list(index.glob("work/*"))


def test_vectors_are_those_of_the_bare_encoder(index, pictures, encoder_name):
    from for_ray.model.bundle import open_bundle
    from for_ray.model.encoder import load_encoder
    from for_ray.model.preprocess import decode

    bundle = open_bundle(encoder_name, head="dense", keep_threshold=1.0)
    encoder = load_encoder(bundle, "cpu")
    rows = rows_of(index)
    for name in ("00000.jpg", "00031.jpg", "00059.jpg"):
        raw = (pictures / name).read_bytes()
        pixels = decode(raw, image_size=bundle.image_size, resize_mode=bundle.resize_mode).pixels
        expected = encoder.encode(pixels[None]).vectors[0].numpy()
        np.testing.assert_allclose(np.array(rows[name]["vectors"], np.float32), expected, atol=2e-3)


def files_of(index_path: Path) -> list[Path]:
    """All files but the lease and the reports."""
    return sorted(
        path for path in index_path.rglob("*") if not {"lease", "reports"} & {*path.parts, path.stem}
    )


def test_a_second_run_changes_nothing(run, index):
    before, num_reports = files_of(index), len(list(index.glob("reports/*")))
    again = run()
    assert again.message == "nothing changed; snapshot 1 stays"
    assert (again.new, again.changed, again.gone, again.unchanged, again.snapshot) == (0, 0, 0, 63, 1)
    assert (again.indexed, again.quarantined, again.vectors) == (60, 3, 240)
    assert files_of(index) == before
    assert len(list(index.glob("reports/*"))) > num_reports


def test_new_changed_and_gone_images_are_closed(run, index, images, draw):
    first = rows_of(index)
    draw(images, range(3, 5), seed=1)
    draw(images, range(100, 110))
    (images / "00009.jpg").unlink()
    (images / "page.jpg").unlink()
    second = run()
    assert (second.new, second.changed, second.gone, second.unchanged) == (10, 2, 2, 59)
    assert (second.indexed, second.quarantined, second.snapshot, second.segments) == (69, 2, 2, 2)
    assert second.vectors == 69 * 4
    rows = rows_of(index)
    kept = set(first) - {"00003.jpg", "00004.jpg", "00009.jpg", "page.jpg"}
    assert {name: rows[name] for name in kept} == {name: first[name] for name in kept}  # not encoded again
    gone = {first[name]["_rowid"] for name in ("00003.jpg", "00004.jpg", "00009.jpg")}
    assert set(latest(index).deleted_image_ids) == gone
    assert rows["00003.jpg"]["_rowid"] not in {row["_rowid"] for row in first.values()}
    found = find_all(index, np.eye(32, dtype=np.float32)[0])
    assert found == {row["_rowid"] for row in rows.values() if row["error"] is None}
    old = snapshots.by_id(Layout(str(index)), 1)
    assert rows_of(index, version=old.images_version) == first  # what an open search still sees


def test_only_deletions_need_no_new_segment(run, index, images, first_run):
    (images / "00001.jpg").unlink()
    second = run()
    assert (second.gone, second.indexed, second.vectors, second.segments) == (1, 59, 236, 1)
    assert second.recall_at_50 == first_run[0].recall_at_50


def test_another_encoder_builds_beside_and_takes_over(run, index, first_run):
    fingerprint = latest(index).fingerprint
    second = run(head="clip")
    assert (second.new, second.vectors, second.snapshot) == (63, 60, 2)
    assert latest(index).fingerprint != fingerprint
    own = run(encoder=None, head=None, keep_threshold=None)  # the published encoder, unasked
    assert own.message == "nothing changed; snapshot 2 stays"
    back = run()
    assert (back.new, back.unchanged, back.snapshot) == (0, 63, 3)
    assert latest(index).fingerprint == fingerprint
    assert (back.vectors, back.segments, back.recall_at_50) == (240, 1, first_run[0].recall_at_50)


def test_another_codec_is_built_from_the_table(run, index):
    segments = latest(index).segments
    second = run(codec="IVF,SQ8")
    assert (second.new, second.vectors, second.segments, second.snapshot) == (0, 240, 1, 2)
    assert latest(index).codec.factory.endswith("SQ8")
    assert latest(index).segments != segments
    assert run(codec="IVF,SQ8").message == "nothing changed; snapshot 2 stays"


def test_too_many_bad_images_stop_before_publishing(run, images):
    index = run.home / "index"
    with pytest.raises(StageError) as caught:
        run(max_bad_fraction=0.01)
    message = str(caught.value)
    assert message.startswith("encode: 3 of 63 images are unreadable (4.8%), more than max_bad_fraction 0.01")
    for cause in ("the file is empty", "broken JPEG", "not an image", "empty.png"):
        assert cause in message
    assert "\n" not in message
    assert list(snapshots.list_snapshots(Layout(str(index)))) == []
    later = run()
    assert (later.new, later.unchanged, later.indexed, later.snapshot) == (0, 63, 60, 1)


def test_what_a_dead_run_left_behind_is_swept(run, index, images):
    snapshot = latest(index)
    segments = index / f"encoder-{snapshot.fingerprint}" / "segments"
    (segments / "segment-dead.faiss").write_bytes(b"half")
    (index / "work" / "dead").mkdir(parents=True)
    (index / "work" / "dead" / "gap-000000.parquet").write_bytes(b"rows")
    (images / "00001.jpg").unlink()
    run()
    names = {snapshot.codec.file_name, *(each.file_name for each in snapshot.segments)}
    assert {path.name for path in segments.iterdir()} == names
    assert not list(index.glob("work/*"))


def test_images_that_go_or_change_meanwhile_wait_for_the_next_run(run, images):
    index, names = run.home / "index", [f"{number:05d}.jpg" for number in range(20)]
    manifest = run.home / "manifest.parquet"
    etags = [stat(str(images / name)).etag for name in names]
    columns = {"uri": [str(images / name) for name in names], "etag": [*etags], "caption": names}
    columns["etag"][3] = etags[4]  # replaced since
    (images / names[5]).unlink()
    pq.write_table(pa.table(columns), manifest)
    first = run(images=str(manifest))
    assert (first.listed, first.new, first.indexed, first.quarantined) == (20, 20, 18, 0)
    rows = rows_of(index)
    assert set(rows) == set(names) - {names[3], names[5]}
    assert all(row["caption"] == name for name, row in rows.items())
    columns["etag"] = etags
    columns["licence"] = ["cc"] * 20
    pq.write_table(pa.table(columns).filter(pa.array([name != names[5] for name in names])), manifest)
    second = run(images=str(manifest))
    assert (second.new, second.unchanged, second.indexed) == (1, 18, 19)
    assert (
        "; 18 unchanged images have no value in licence, new in the manifest: metadata is taken"
        in second.message
    )
    rows = rows_of(index)
    assert (rows[names[3]]["licence"], rows[names[0]]["licence"]) == ("cc", None)


def test_a_manifest_that_is_wrong_as_a_whole_does_not_empty_the_index(run, index, images):
    before = latest(index)
    manifest = run.home / "wrong.parquet"
    names = [f"{number:05d}.jpg" for number in range(20)]
    uris = [str(images / "mistyped" / name) for name in names]
    pq.write_table(pa.table({"uri": uris, "etag": names}), manifest)
    with pytest.raises(DataError, match=r"63 of the 63 images that the index holds are gone \(100.0%\)"):
        run(images=str(manifest))
    with pytest.raises(StageError, match=r"20 of 20 images are unreadable.*20 × not there, or not as listed"):
        run(images=str(manifest), max_gone_fraction=1)
    assert latest(index) == before
    after = run()
    assert (after.new, after.changed, after.unchanged) == (0, 0, 63)  # nothing was lost by it


def test_a_mistyped_prefix_does_not_empty_the_index(run, index, images, draw):
    """Neither the encoder's own index, nor the one that another encoder would take over."""
    other, before = run.home / "other", files_of(index)
    draw(other, range(5))
    message = rf"63 of the 63 images.*gone \(100.0%\), more than max_gone_fraction 0.5: {other} lists 5, 5 of"
    with pytest.raises(DataError, match=message):
        run(images=str(other))
    assert "; a run would be refused: 63 of the 63" in run(images=str(other), dry_run=True).message
    with pytest.raises(DataError, match=r"58 of the 63 images that the index holds are gone \(92.1%\)"):
        run(images=str(other), head="clip")
    for number in range(40):
        (images / f"{number:05d}.jpg").unlink()
    with pytest.raises(DataError, match=r"40 of the 63 .* \(63.5%\).*lists 23, 0 of them new; nothing was"):
        run()
    assert files_of(index) == before
    meant = run(max_gone_fraction=0.65, max_bad_fraction=0.2)
    assert (meant.gone, meant.unchanged, meant.snapshot) == (40, 23, 2)


def test_a_codec_that_was_asked_for_stays(run, index, images):
    run(codec="IVF,SQ8")
    (images / "00001.jpg").unlink()
    assert run().segments == 1
    assert latest(index).codec.factory.endswith("SQ8")
    run(codec="auto")
    assert latest(index).codec.factory.endswith("Flat")
    assert run(codec="auto").message.startswith("nothing changed; snapshot 4 stays")


def test_a_folder_of_tars(run, pictures):
    folder, index = run.home / "tars", run.home / "tar-index"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in sorted(pictures.glob("0000*.jpg"))[number * 5 : number * 5 + 5]:
                tar.add(name, arcname=name.name)
                tar.addfile(tarfile.TarInfo(f"{name.stem}.json"))
    summary = run(images=str(folder), index=str(index))
    assert (summary.new, summary.indexed, summary.vectors) == (10, 10, 40)
    uris = {row["uri"] for row in rows_of(index).values()}
    assert uris == {f"{folder}/{number // 5}.tar#{number:05d}.jpg" for number in range(10)}
    assert run(images=str(folder), index=str(index)).message.startswith("nothing changed")


def test_versions_that_no_snapshot_names_are_swept(run, index, images):
    for number in range(3):
        (images / f"{number:05d}.jpg").unlink()
        run()
    published = list(snapshots.list_snapshots(Layout(str(index))))
    uri = Layout(str(index)).images_uri(published[0].fingerprint)
    assert {version["version"] for version in lance.dataset(uri).versions()} == {
        snapshot.images_version for snapshot in published
    }
    for snapshot in published:
        assert table.open_table(uri, version=snapshot.images_version).count_rows() == snapshot.listed


def test_a_dry_run_writes_nothing(run, images):
    summary = run(dry_run=True)
    assert (summary.listed, summary.new, summary.indexed, summary.snapshot) == (63, 63, 0, None)
    assert summary.plans["now"].plan.num_vectors == 63 * 4
    assert summary.plans["10⁹ vectors"].num_images == 250_000_000
    assert not (run.home / "index").exists()


@pytest.mark.slow
def test_many_actors_give_what_one_gives(run, index, tmp_path):
    run(min_actors=2, max_actors=2, batch_size=3, index=str(tmp_path / "two"))
    one, two = rows_of(index), rows_of(tmp_path / "two")
    assert set(one) == set(two)
    for name, row in one.items():
        np.testing.assert_allclose(
            np.array(row["vectors"], np.float32), np.array(two[name]["vectors"], np.float32), atol=2e-3
        )
        assert (row["error"], row["boxes"]) == (two[name]["error"], two[name]["boxes"])


def job_environment(address: str) -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def arguments(images: Path, index: Path, encoder: str, *more: str) -> list[str]:
    given = ["--images", str(images), "--index", str(index), "--encoder", encoder]
    return [*given, "--head", "dense", "--keep-threshold", "1", "--max-bad-fraction", "0.1", *more]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(run, images, draw, tmp_path, ray_address, encoder_name):
    draw(images, range(1000, 2600))
    index = run.home / "index"
    more = ["--commit-seconds", "0.05", "--batch-size", "16", "--max-actors", "1"]
    job = subprocess.Popen(
        [sys.executable, str(JOB), *arguments(images, index, encoder_name, *more)],
        env=job_environment(ray_address),
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    held = None
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline:
        uris = list(index.glob("encoder-*/images.lance"))
        held = table.open_table(str(uris[0])) if uris else None
        if held is not None and held.count_rows():
            break
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    _, complaint = job.communicate()
    assert held is not None, complaint.decode()
    committed = {row["uri"]: row for row in table.open_table(held.uri).to_table(with_row_id=True).to_pylist()}
    assert committed
    summary = run(batch_size=16)
    assert (summary.listed, summary.indexed, summary.quarantined) == (1663, 1660, 3)
    assert summary.unchanged == len(committed)
    rows = rows_of(index)
    for uri, row in committed.items():  # neither lost nor encoded again
        assert rows[Path(uri).name] == row
    undisturbed = run(batch_size=16, index=str(tmp_path / "undisturbed"))
    assert undisturbed.vectors == summary.vectors
    for name, row in rows_of(tmp_path / "undisturbed").items():
        assert row["error"] == rows[name]["error"]
        np.testing.assert_allclose(
            np.array(row["vectors"], np.float32), np.array(rows[name]["vectors"], np.float32), atol=2e-3
        )


def test_the_command_prints_one_line_of_json(run, images, tmp_path, ray_address, encoder_name):
    """Also from another folder. A raylet may warn of its many workers, on every driver's output."""
    command = [sys.executable, str(JOB), *arguments(images, run.home / "index", encoder_name, "--json")]
    done = subprocess.run(
        command, env=job_environment(ray_address), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    summary = json.loads(line)
    assert list(summary) == JSON_KEYS
    assert (summary["indexed"], summary["quarantined"], summary["snapshot"]) == (60, 3, 1)
    words = [line.split()[0] for line in done.stderr.splitlines() if "(raylet)" not in line]
    stages = ["list", "diff", "start", "encode", "build", "merge", "verify", "sweep"]
    others = {"published", "report:", *(name.split("_")[0] for name in JSON_KEYS)}
    assert [word for word in words if word in stages] == [word for word in words if word not in others]
    assert list(dict.fromkeys(word for word in words if word in stages)) == stages
    assert "published snapshot 1" in done.stderr


@pytest.fixture(scope="module")
def job() -> Any:
    """`jobs/index.py` as a module."""
    spec = importlib.util.spec_from_file_location("index_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_columns(folder: Path, _: str) -> dict[str, str]:
    pq.write_table(pa.table({"url": ["a"]}), folder / "m.parquet")
    return {"images": str(folder / "m.parquet")}


def _no_parquet(folder: Path, _: str) -> dict[str, str]:
    (folder / "m.parquet").write_bytes(b"not parquet")
    return {"images": str(folder / "m.parquet")}


def _empty(folder: Path, _: str) -> dict[str, str]:
    (folder / "empty").mkdir()
    return {"images": str(folder / "empty")}


def _other_model(folder: Path, encoder: str) -> dict[str, str]:
    """A model of another width than the weights."""
    model_path, weights_path = encoder.removeprefix("open_clip:").split("@")
    model = json.loads(Path(model_path).read_text())
    (folder / "model.json").write_text(json.dumps({**model, "embed_dim": 64}))
    return {"encoder": f"open_clip:{folder}/model.json@{weights_path}"}


def _manifest(columns: dict[str, list[str]]) -> Callable[[Path, str], dict[str, str]]:
    def write(folder: Path, _: str) -> dict[str, str]:
        pq.write_table(pa.table(columns), folder / "m.parquet")
        return {"images": str(folder / "m.parquet")}

    return write


WRONG: list[tuple[Callable[[Path, str], dict[str, str]], list[str]]] = [
    (lambda folder, _: {"images": str(folder / "nowhere")}, ["nowhere"]),
    (_empty, ["there are no images in", "empty"]),
    (_no_columns, ["m.parquet", "uri", "etag", "url"]),
    (_no_parquet, ["m.parquet"]),
    (_manifest({"uri": ["/a.jpg", "/a.jpg"], "etag": ["1", "2"]}), ["/a.jpg", "listed 2 times"]),
    (_manifest({"uri": ["/a.jpg"], "etag": ["1"], "a.b": ["x"]}), ["m.parquet", "'a.b'"]),
    (_other_model, ["weights", "64", "32"]),
    (lambda *_: {"encoder": "open_clip:RN51@openai"}, ["RN51", "RN50"]),
    (lambda folder, _: {"encoder": str(folder / "bundle")}, ["bundle"]),
    (lambda *_: {"encoder": "picturbook"}, ["picturbook"]),
    (lambda *_: {"codec": "IVF,Nonsense"}, ["codec", "Nonsense"]),
    (lambda *_: {"imagse": "x"}, ["--imagse", "--images"]),
    (lambda *_: {"index": "gs://bucket/index"}, ["gs://bucket/index"]),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_bad_input_gets_one_line_and_nothing_is_written(
    job, pictures, tmp_path, encoder_name, capsys, wrong, words
):
    index = tmp_path / "index"
    given = {"images": str(pictures), "index": str(index), "encoder": encoder_name}
    given |= wrong(tmp_path, encoder_name)
    code = job.main([part for name, value in given.items() for part in (f"--{name}", value)])
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert complaints == captured.err.splitlines()[-1:]
    for word in words:
        assert word in complaints[0]
    assert captured.out == ""
    assert not index.exists()


def test_a_second_run_at_the_same_time_is_refused(job, pictures, tmp_path, encoder_name, capsys):
    index = tmp_path / "index"
    with Lease.acquire(Layout(str(index)).lease_uri, "somebody"):
        code = job.main(arguments(pictures, index, encoder_name))
    assert code == 2
    assert "is being written by somebody" in capsys.readouterr().err.splitlines()[-1]
    assert not list(index.glob("encoder-*"))
