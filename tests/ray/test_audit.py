"""Verify: an index that the job made is sound; damage of every kind is told, all of it in one go."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from for_ray.config import IndexSettings
from for_ray.index import snapshots, table
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout, Snapshot
from for_ray.stages.audit import audit_index
from for_ray.stages.cluster import Cluster
from for_ray.stages.progress import Progress


@pytest.fixture(scope="module")
def made(
    ray_address: str, encoder_name: str, draw: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index after two runs: the second has one image less; two are quarantined."""
    home = tmp_path_factory.mktemp("audit")
    draw(home / "images", range(24))
    (home / "images" / "empty.png").write_bytes(b"")
    (home / "images" / "page.jpg").write_bytes(b"<html>not found</html>")
    settings = IndexSettings(
        images=str(home / "images"),
        index=str(home / "index"),
        encoder=encoder_name,
        head="dense",
        keep_threshold=1.0,
        batch_size=8,
        max_bad_fraction=0.2,
    )
    run_index(settings, progress=Progress(is_quiet=True))
    (home / "images" / "00003.jpg").unlink()
    run_index(settings, progress=Progress(is_quiet=True))
    return home / "index"


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Path:
    """The index, for one test to damage."""
    return shutil.copytree(made, tmp_path / "index")


def audit(index: Path, folder: Path, *, snapshot: Snapshot | None = None) -> tuple[list[str], list[str]]:
    """What is wrong, and what is worth knowing."""
    layout, notes, done = Layout(str(index)), list[str](), list[int]()
    with ExitStack() as stack:
        problems = audit_index(
            layout,
            snapshot or snapshots.latest(layout),
            cluster=Cluster(stack),
            queries=None,
            cache_path=folder / "cache",
            on_progress=done.append,
            on_note=notes.append,
        )
    assert all("\n" not in problem for problem in problems)
    return problems, notes


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def table_of(index: Path) -> Any:
    return table.open_table(Layout(str(index)).images_uri(snapshots.latest(Layout(str(index))).fingerprint))


def test_an_index_that_the_job_made_is_sound(index, tmp_path):
    snapshot = snapshots.latest(Layout(str(index)))
    assert (snapshot.snapshot_id, snapshot.indexed, snapshot.quarantined) == (2, 23, 2)
    assert snapshot.recall_at_50 is not None
    assert audit(index, tmp_path) == ([], [])
    first = snapshots.by_id(Layout(str(index)), 1)
    assert audit(index, tmp_path, snapshot=first)[0] == []  # what has gone since then is no fault


def test_all_damage_is_told_at_once(index, tmp_path):
    layout = Layout(str(index))
    snapshot = snapshots.latest(layout)
    segments = [Path(layout.segment_uri(snapshot.fingerprint, each.file_name)) for each in snapshot.segments]
    flip(segments[0], -9)
    bundle = Path(layout.bundle_uri(snapshot.fingerprint))
    flip(bundle / "weights.safetensors", -1)
    codec = Path(layout.segment_uri(snapshot.fingerprint, snapshot.codec.file_name))
    codec.write_bytes(codec.read_bytes()[:-1])
    images = table_of(index)
    row = images.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_pylist()
    table.delete_images(images, np.array(row[4:5]))
    lost = Path(images.uri) / "data" / images.get_fragments()[-1].metadata.files[0].path
    lost.unlink()
    problems, notes = audit(index, tmp_path)
    told = "\n".join(problems)
    assert f"{bundle}/weights.safetensors is damaged or was replaced: its SHA-256 is " in told
    assert f"copy the encoder to {bundle} again: searches need it" in told
    assert (
        f"{codec} has {snapshot.codec.num_bytes - 1:,} bytes, expected {snapshot.codec.num_bytes:,}; " in told
    )
    assert f"{segments[0]} is damaged or was replaced: its SHA-256 is " in told
    assert f"{lost} is not there: " in told
    assert "images.lance cannot be read; restore the file, or index the images anew" in told
    assert (
        f"images of version {snapshot.images_version} of {images.uri} that its latest version lacks: 1 "
        f"(image {row[4]}); rows were deleted by hand, or a run is under way or has died" in told
    )
    assert len(problems) == 5
    assert len(notes) == 1
    assert f"the snapshot at {snapshot.images_version}: " in notes[0]


def test_a_row_twice_and_a_lost_version_are_told(index, tmp_path):
    layout = Layout(str(index))
    snapshot = snapshots.latest(layout)
    images = table_of(index)
    rows = images.to_table().slice(3, 2)
    table.append(images, table.write_fragments(rows, images.uri))
    problems, _ = audit(index, tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(
        "images that are more than once, as they are, in the table's latest version"
    )
    assert f": 2 ({rows['uri'][0]}" in problems[0] or f": 2 ({rows['uri'][1]}" in problems[0]
    assert problems[0].endswith("run jobs/index.py again: it deletes the older rows")
    lost = snapshot.model_copy(update={"images_version": 999})
    problems, _ = audit(index, tmp_path, snapshot=lost)
    assert "images.lance cannot be read or written as a Lance table: " in problems[0]
    assert "999" in problems[0]
    assert len(problems) == 2  # the rows are still there twice


def test_recall_is_not_measured_on_half_a_table(index, tmp_path):
    images = table_of(index)
    (Path(images.uri) / "data" / images.get_fragments()[0].metadata.files[0].path).unlink()
    problems, notes = audit(index, tmp_path)
    assert [problem.split(":")[0].rsplit(".", 1)[-1] for problem in problems] == ["lance is not there"]
    assert notes == ["recall was not measured: not all rows of the table can be read"]


def test_recall_below_what_the_snapshot_says_is_told(index, tmp_path):
    snapshot = snapshots.latest(Layout(str(index)))
    better = snapshot.model_copy(update={"recall_at_50": 1.5})
    problems, _ = audit(index, tmp_path, snapshot=better)
    assert len(problems) == 1
    assert problems[0].startswith("recall at 50 is ")
    assert f"snapshot {snapshot.snapshot_id} says 1.500; " in problems[0]


def test_recall_of_a_sample_may_differ_by_more(index, tmp_path, monkeypatch):
    """What is measured is 1: everything is compared here."""
    snapshot = snapshots.latest(Layout(str(index)))
    for said, num_whole, num_sampled in [(1.01, 0, 0), (1.04, 1, 0), (1.06, 1, 1)]:
        better = snapshot.model_copy(update={"recall_at_50": said})
        assert len(audit(index, tmp_path / "whole", snapshot=better)[0]) == num_whole
        with monkeypatch.context() as patched:
            patched.setattr("for_ray.stages.audit.SAMPLED_VECTORS", 1)
            assert len(audit(index, tmp_path / "sample", snapshot=better)[0]) == num_sampled


def test_an_encoder_and_a_list_of_snapshots_that_are_gone_are_told(index, tmp_path):
    layout = Layout(str(index))
    snapshot = snapshots.latest(layout)
    (Path(layout.bundle_uri(snapshot.fingerprint)) / "encoder.toml").unlink()
    published = lance.dataset(layout.snapshots_uri).get_fragments()[0]
    (Path(layout.snapshots_uri) / "data" / published.metadata.files[0].path).unlink()
    problems, _ = audit(index, tmp_path, snapshot=snapshot)
    assert len(problems) == 2
    assert "snapshots.lance cannot be read or written as a Lance table: " in problems[0]
    assert f"no encoder at {layout.bundle_uri(snapshot.fingerprint)}" in problems[1]
