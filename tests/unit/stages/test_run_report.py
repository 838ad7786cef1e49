"""Reports of runs: what is written is read back, growth goes on where snapshots end, old ones are swept."""

from __future__ import annotations

import datetime
from itertools import count
from pathlib import Path

import pytest

from for_ray.errors import StorageError
from for_ray.schema import GrowthPoint, Layout, RunReport, Segment, Snapshot
from for_ray.stages import run_report
from for_ray.stages.run_report import earlier_growth, growth_points, sweep_reports, write_report

STARTED_AT = datetime.datetime(2026, 11, 25, 3, 0, 12, 987654, tzinfo=datetime.UTC)


@pytest.fixture
def layout(tmp_path):
    return Layout(str(tmp_path / "index"))


@pytest.fixture
def folder(layout):
    return Path(layout.report_uri(""))


def make_report(**changes) -> RunReport:
    report = RunReport(
        run_id="a1b2c3d4",
        started_at=STARTED_AT,
        seconds=1.0,
        outcome="failed",
        message="no",
        images_uri="/images",
        index_uri="/index",
        encoder="picturebook",
        fingerprint="ab",
    )
    return report.model_copy(update=changes)


def make_snapshot(number: int) -> Snapshot:
    segment = Segment(
        segment_id="s",
        codec_id="c",
        file_name="segment-s.faiss",
        sha256="",
        num_bytes=10 * number,
        num_vectors=4,
        first_image_id=0,
        end_image_id=9,
    )
    return Snapshot(
        snapshot_id=number,
        created_at=STARTED_AT + datetime.timedelta(days=number),
        fingerprint="ab",
        images_version=number,
        codec=None,
        segments=[segment, segment],
        deleted_image_ids=[],
        nprobe=1,
        listed=101 * number,
        indexed=100 * number,
        quarantined=number,
        num_vectors=400 * number,
        recall_at_50=None,
    )


def make_point(number: int) -> GrowthPoint:
    return GrowthPoint(
        snapshot_id=number,
        created_at=STARTED_AT + datetime.timedelta(days=number),
        indexed=100 * number,
        quarantined=number,
        num_vectors=400 * number,
        num_segments=2,
        num_bytes=20 * number,
    )


def ids(points) -> list[int]:
    return [point.snapshot_id for point in points]


def test_growth_is_of_the_newest_snapshots_the_oldest_first_and_no_more_are_read():
    endless = (make_snapshot(number) for number in count(100, -1))
    points = growth_points(endless, limit=3)
    assert points == (make_point(98), make_point(99), make_point(100))
    assert next(endless).snapshot_id == 97
    assert growth_points([]) == ()


def test_growth_goes_on_from_what_an_earlier_report_knew():
    kept = [make_snapshot(number) for number in (9, 8)]
    earlier = [make_point(number) for number in (5, 3, 8, 9, 12)]
    assert ids(growth_points(kept, earlier=earlier)) == [3, 5, 8, 9]
    assert ids(growth_points(kept, earlier=earlier, limit=3)) == [5, 8, 9]
    assert ids(growth_points([], earlier=earlier[:2])) == [3, 5]


def test_a_report_is_a_page_and_a_json_that_is_read_back(layout, folder):
    east = datetime.timezone(datetime.timedelta(hours=5))
    report = make_report(started_at=STARTED_AT.astimezone(east), growth=(make_point(1),))
    uri = write_report(layout, report)
    assert uri == f"{layout.index_uri}/reports/20261125T030012Z-a1b2c3d4.html"
    assert sorted(path.name for path in folder.iterdir()) == [
        "20261125T030012Z-a1b2c3d4.html",
        "20261125T030012Z-a1b2c3d4.json",
    ]
    assert RunReport.model_validate_json((folder / "20261125T030012Z-a1b2c3d4.json").read_bytes()) == report
    assert "The run failed" in Path(uri).read_text(encoding="utf-8")
    assert earlier_growth(layout) == (make_point(1),)


def test_names_that_are_no_utf8_do_not_keep_a_report_from_being_written(layout, folder):
    uri = write_report(layout, make_report(images_uri="/images/\udcff", encoder="\udcff <ключ>"))
    page = Path(uri).read_text(encoding="utf-8")
    assert r"/images/\udcff" in page
    assert "images/\\udcff" in Path(uri).with_suffix(".json").read_text(encoding="ascii")


def test_the_json_comes_last_and_not_without_the_page(layout, folder, monkeypatch):
    def write_bytes(uri: str, content: bytes) -> None:
        if uri.endswith(".html"):
            raise StorageError("the disk is full")
        Path(uri).write_bytes(content)

    monkeypatch.setattr(run_report, "write_bytes", write_bytes)
    folder.mkdir(parents=True)
    with pytest.raises(StorageError, match="the disk is full"):
        write_report(layout, make_report())
    assert list(folder.iterdir()) == []


def test_the_latest_report_tells_of_earlier_growth_unless_it_cannot_be_read(layout, folder):
    assert earlier_growth(layout) == ()
    for day in (2, 1):
        started_at = STARTED_AT + datetime.timedelta(days=day)
        write_report(layout, make_report(started_at=started_at, growth=(make_point(day),)))
    assert earlier_growth(layout) == (make_point(2),)
    (folder / "20270101T000000Z-ff.json").write_text('{"run_id": "ff", "of": "another version"}')
    assert earlier_growth(layout) == ()
    (folder / "20270101T000000Z-ff.json").write_bytes(b"\xff")
    assert earlier_growth(layout) == ()


def test_the_oldest_reports_are_swept_and_what_is_not_ours_stays(layout, folder):
    assert sweep_reports(layout, keep=2) == 0
    folder.mkdir(parents=True)
    names = ["20261125T030012Z-bb", "20251231T235959Z-ff", "20261126T030012Z-aa", "20261124T030012Z-cc"]
    for name in names:
        (folder / f"{name}.json").write_text("{}")
        (folder / f"{name}.html").write_text("")
    (folder / "20251231T235959Z-ff.html").unlink()  # of a run that died here
    foreign = ["notes.html", "20200101T000000Z-aa.txt", "20200101T000000Z-aa.json.bak", "2020-aa.json"]
    for name in foreign:
        (folder / name).write_text("mine")
    (folder / "old").mkdir()
    (folder / "old" / "20200101T000000Z-aa.json").write_text("mine")
    assert sweep_reports(layout, keep=4) == 0
    assert sweep_reports(layout, keep=2) == 2
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    kept = {f"{name}.{suffix}" for name in (names[0], names[2]) for suffix in ("json", "html")}
    assert left == kept | set(foreign) | {"old/20200101T000000Z-aa.json"}
    assert sweep_reports(layout, keep=2) == 0
