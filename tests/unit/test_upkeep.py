"""What may be done to a planted index besides a run, through the job's own command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from for_ray.errors import ConfigError, DataError
from for_ray.index import snapshots
from for_ray.pipeline.upkeep import roll_back, sweep_idle
from for_ray.retrieval import open_index
from for_ray.storage import Lease
from tests.planted import Planted, PlantedIndex

JOB = Path(__file__).parents[2] / "jobs" / "index.py"


@pytest.fixture(scope="module")
def job() -> Any:
    spec = importlib.util.spec_from_file_location("index_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def grown(planted_index: PlantedIndex) -> PlantedIndex:
    """Two snapshots: 3 images, then 6 more, and the first one gone; one image is quarantined."""
    vectors = np.eye(planted_index.bundle.dim)
    planted_index.add([Planted(f"/a/{row}.jpg", vectors[row : row + 1]) for row in range(3)])
    planted_index.publish()
    bad = Planted("/b/bad\nname.jpg", vectors[:0], error="broken JPEG: image file is truncated")
    more = [Planted(f"/b/{row}.jpg", vectors[row : row + 1]) for row in range(3, 9)]
    planted_index.add([*more, bad], deleted=[0])
    planted_index.publish(deleted=[0])
    return planted_index


def found(index: PlantedIndex) -> list[str]:
    query = np.eye(index.bundle.dim, dtype=np.float32)[0]
    return sorted(hit.uri for hit in open_index(index.uri).search_vector(query, k=50))


def test_a_rollback_is_what_searches_see(grown: PlantedIndex) -> None:
    assert found(grown) == ["/a/1.jpg", "/a/2.jpg", *(f"/b/{row}.jpg" for row in range(3, 9))]
    restored = roll_back(grown.layout, 1)
    assert (restored.snapshot_id, restored.restores) == (3, 1)
    assert found(grown) == ["/a/0.jpg", "/a/1.jpg", "/a/2.jpg"]
    first = snapshots.by_id(grown.layout, 1)
    assert restored.created_at > first.created_at
    again = roll_back(grown.layout, 2)
    assert (again.snapshot_id, again.restores) == (4, 2)
    assert len(found(grown)) == 8
    assert roll_back(grown.layout, 3).restores == 1  # of a rollback: what that one restored


def test_a_rollback_to_what_is_there_is_refused(grown: PlantedIndex) -> None:
    with pytest.raises(ConfigError, match=r"snapshot 2 is what searches of .* see already"):
        roll_back(grown.layout, 2)
    roll_back(grown.layout, 1)
    with pytest.raises(ConfigError, match="snapshot 1 is what"):
        roll_back(grown.layout, 1)
    assert [each.snapshot_id for each in snapshots.list_published(grown.layout)] == [1, 2, 3]


def test_a_rollback_to_what_is_not_whole_is_refused(grown: PlantedIndex) -> None:
    path = grown.segment_path("segment-0.faiss")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"has {len(content) - 1} bytes, expected {len(content)}"):
        roll_back(grown.layout, 1)
    path.unlink()
    with pytest.raises(DataError, match=r"segment-0.faiss is not there"):
        roll_back(grown.layout, 1)
    assert snapshots.latest(grown.layout).snapshot_id == 2


def test_a_rollback_looks_again_when_it_has_the_lease(
    grown: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = Lease.acquire

    def acquire_late(*given: Any) -> Any:
        snapshots.expire(grown.layout, [1])
        return acquire(*given)

    monkeypatch.setattr(Lease, "acquire", acquire_late)
    with pytest.raises(DataError, match="has no snapshot 1; the last ones are 2"):
        roll_back(grown.layout, 1)
    assert [each.snapshot_id for each in snapshots.list_published(grown.layout)] == [2]


def test_a_rollback_waits_for_no_run(grown: PlantedIndex) -> None:
    with (
        Lease.acquire(grown.layout.lease_uri, "jobs/index.py (run 7)"),
        pytest.raises(ConfigError, match=r"is being written by jobs/index.py \(run 7\)"),
    ):
        roll_back(grown.layout, 1)


def test_the_commands(job: Any, grown: PlantedIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--index", grown.uri, "--rollback", "1"]) == 0
    assert "published snapshot 3, which is snapshot 1 again" in capsys.readouterr().err
    assert job.main(["--index", grown.uri, "--list-snapshots", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["snapshot"], line["restores"], line["indexed"]) for line in lines] == [
        (3, 1, 3),
        (2, None, 8),
        (1, None, 3),
    ]
    assert job.main(["--index", grown.uri, "--list-snapshots"]) == 0
    table = capsys.readouterr().out
    assert all(str(number) in table for number in (1, 2, 3))
    assert job.main(["--index", grown.uri, "--show-quarantine", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "uri": "/b/bad\nname.jpg",
        "error": "broken JPEG: image file is truncated",
    }
    assert job.main(["--index", grown.uri, "--show-quarantine"]) == 0
    shown = capsys.readouterr().out
    assert "broken JPEG" in shown
    assert "bad\\nname.jpg" in shown


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rollback", "9"], "has no snapshot 9; the last ones are 1, 2"),
        (["--rollback", "0"], "--rollback"),
        (["--verify", "--list-snapshots"], "go one at a time"),
        (["--keep-snapshots", "0", "--images", "x"], "--keep-snapshots"),
        ([], "--images is missing"),
    ],
)
def test_wrong_commands_get_one_line(
    job: Any, grown: PlantedIndex, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    assert job.main(["--index", grown.uri, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.parametrize("flag", ["--rollback=1", "--verify", "--show-quarantine", "--list-snapshots"])
def test_where_there_is_no_index(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert job.main(["--index", str(tmp_path / "empty"), flag]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "empty" in line
    assert "jobs/index.py" in line
    assert [path.name for path in (tmp_path / "empty").iterdir() if "lease" not in path.name] == []


def test_an_index_without_snapshots_has_none_to_list(
    job: Any, planted_index: PlantedIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["--index", planted_index.uri, "--list-snapshots"]) == 0
    assert capsys.readouterr().out == "no snapshot was published yet\n"
    assert job.main(["--index", planted_index.uri, "--list-snapshots", "--json"]) == 0
    assert capsys.readouterr().out == ""


def reports(index: PlantedIndex, count: int) -> Path:
    """The folder of so many reports."""
    folder = Path(index.layout.report_uri(""))
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"20260101T{number:06d}Z-aa.json").write_text("{}")
    return folder


def idle(index: PlantedIndex, *, has_failed: bool = False, keep_snapshots: int = 7) -> str:
    return sweep_idle(index.layout, keep_snapshots=keep_snapshots, keep_days=0, has_failed=has_failed)


def test_nights_that_publish_nothing_sweep_too(grown: PlantedIndex) -> None:
    folder = reports(grown, 403)
    left = grown.segment_path("segment-of-a-dead-run.faiss")
    left.write_bytes(b"half")
    assert idle(grown) == ""
    assert len(list(folder.iterdir())) == 400
    # Nothing has expired: no lease was taken, nothing else was touched.
    assert left.exists()
    assert not Path(grown.layout.lease_uri).exists()
    assert idle(grown, keep_snapshots=1) == ""
    assert [each.snapshot_id for each in snapshots.list_published(grown.layout)] == [2]
    assert not left.exists()
    assert len(found(grown)) == 8


def test_a_failed_night_leaves_no_files_behind(grown: PlantedIndex) -> None:
    left = grown.segment_path("segment-of-this-run.faiss")
    left.write_bytes(b"half")
    assert idle(grown, has_failed=True) == ""
    assert not left.exists()
    assert [each.snapshot_id for each in snapshots.list_published(grown.layout)] == [1, 2]


def test_while_another_run_writes_only_reports_are_swept(grown: PlantedIndex) -> None:
    folder = reports(grown, 401)
    with Lease.acquire(grown.layout.lease_uri, "another run"):
        assert idle(grown, has_failed=True, keep_snapshots=1) == ""
    assert len(list(folder.iterdir())) == 400
    assert len(snapshots.list_published(grown.layout)) == 2


def test_a_sweep_that_fails_is_told_in_one_line(grown: PlantedIndex) -> None:
    Path(grown.layout.lease_uri).mkdir()
    assert idle(grown) == ""
    said = idle(grown, has_failed=True)
    assert said.startswith("sweeping failed: ")
    assert grown.layout.lease_uri in said


def test_there_may_be_nothing_to_sweep(planted_index: PlantedIndex) -> None:
    assert idle(planted_index) == ""
    assert idle(planted_index, has_failed=True) == ""
