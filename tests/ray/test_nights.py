"""Nights of one index: what goes leaves, what was bad is tried again, what was published can come back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from for_ray.command import run_command
from for_ray.config import IndexSettings
from for_ray.errors import DataError, StageError
from for_ray.index import snapshots
from for_ray.pipeline.index import run_index
from for_ray.pipeline.index_write import IndexWriter
from for_ray.pipeline.upkeep import roll_back, run_upkeep
from for_ray.retrieval import open_index
from for_ray.schema import Layout, RunReport
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from for_ray.storage import Lease


class Nights:
    """An index, the folder of its images, and the job on both."""

    def __init__(self, home: Path, encoder: str, draw: Callable[..., None]) -> None:
        self.images, self.index = home / "images", home / "index"
        self.layout = Layout(str(self.index))
        self._encoder, self._draw = encoder, draw

    def run(self, **settings: Any) -> IndexSummary:
        return run_index(self._settings(**settings), progress=Progress(is_quiet=True))

    def _settings(self, **settings: Any) -> IndexSettings:
        given = {
            "images": str(self.images),
            "index": str(self.index),
            "encoder": self._encoder,
            "head": "dense",
            "keep_threshold": 1.0,
            "batch_size": 8,
            "max_bad_fraction": 0.1,
        }
        return IndexSettings(**given | settings)

    def draw(self, numbers: range, *, seed: int = 0) -> None:
        self._draw(self.images, numbers, seed=seed)

    def remove(self, numbers: range) -> None:
        for number in numbers:
            (self.images / f"{number:05d}.jpg").unlink()

    def found(self) -> list[str]:
        """Names of all images that a search finds now."""
        opened = open_index(str(self.index))
        query = np.eye(opened.bundle.dim, dtype=np.float32)[0]
        return sorted(Path(hit.uri).name for hit in opened.search_vector(query, k=1000))

    def listed(self) -> list[str]:
        return sorted(path.name for path in self.images.glob("0*.jpg"))

    def command(self, **settings: Any) -> tuple[int, list[str]]:
        """Exit code and output of `jobs/index.py` with these flags alone."""
        chosen = IndexSettings(index=str(self.index), **settings)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run_command(lambda: run_upkeep(chosen, progress=Progress(is_quiet=True)))
        return code, printed.getvalue().splitlines()

    def reports(self) -> list[RunReport]:
        """Of all runs, by their start."""
        paths = sorted(self.index.glob("reports/*.json"))
        found = [RunReport.model_validate_json(path.read_text()) for path in paths]
        return sorted(found, key=lambda report: report.started_at)


@pytest.fixture(scope="module")
def first(
    ray_address: str,
    encoder_name: str,
    draw: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Nights:
    """An index of 60 images after its first night."""
    nights = Nights(tmp_path_factory.mktemp("nights"), encoder_name, draw)
    nights.draw(range(60))
    nights.run()
    return nights


@pytest.fixture
def nights(first: Nights) -> Iterator[Nights]:
    """The same; what a test does to it is undone."""
    kept = first.index.parent / "kept"
    shutil.copytree(first.images, kept / "images")  # copy2: times stay, and with them etags
    shutil.copytree(first.index, kept / "index")
    yield first
    for folder in (first.images, first.index):
        shutil.rmtree(folder)
        (kept / folder.name).rename(folder)
    kept.rmdir()


def test_gone_images_leave_results_at_once_and_segments_at_the_next_merge(nights: Nights) -> None:
    nights.remove(range(5))
    second = nights.run()
    assert (second.gone, second.indexed, second.segments) == (5, 55, 1)
    assert nights.found() == nights.listed()
    before = snapshots.latest(nights.layout)
    assert (len(before.deleted_image_ids), before.segments[0].num_dead) == (5, 20)
    nights.remove(range(5, 20))  # now a third of the segment is dead
    third = nights.run()
    after = snapshots.latest(nights.layout)
    assert (third.indexed, third.segments, third.vectors) == (40, 1, 160)
    assert (after.deleted_image_ids.tolist(), after.segments[0].num_dead) == ([], 0)
    assert after.segments[0].num_vectors == 160
    assert after.segments[0].file_name != before.segments[0].file_name
    assert nights.found() == nights.listed()
    assert after.codec == before.codec


@pytest.mark.slow
def test_nights_of_growth_leave_few_segments(nights: Nights) -> None:
    for night in range(6):
        nights.draw(range(100 + 4 * night, 104 + 4 * night))
        nights.remove(range(night, night + 1))
        summary = nights.run(keep_snapshots=2, keep_days=0)
        assert nights.found() == nights.listed()
        assert summary.segments <= 4
    kept = list(snapshots.list_snapshots(nights.layout))
    assert [snapshot.snapshot_id for snapshot in kept] == [7, 6]
    segments = nights.index.glob("encoder-*/segments/segment-*")
    named = {segment.file_name for snapshot in kept for segment in snapshot.segments}
    assert {path.name for path in segments} == named
    assert [point.snapshot_id for point in nights.reports()[-1].growth] == [1, 2, 3, 4, 5, 6, 7]


def test_what_was_rolled_back_comes_again_and_nothing_is_encoded_twice(nights: Nights) -> None:
    before = nights.found()
    nights.remove(range(3))
    nights.draw(range(200, 206))
    nights.run()
    table_uri = nights.layout.images_uri(snapshots.latest(nights.layout).fingerprint)
    encoded = lance.dataset(table_uri).to_table(columns=["uri", "encoded_at"], with_row_id=True)
    assert roll_back(nights.layout, 1).snapshot_id == 3
    assert nights.found() == before
    again = nights.run()
    assert (again.new, again.changed, again.gone, again.snapshot) == (0, 0, 0, 4)
    assert nights.found() == nights.listed()
    assert lance.dataset(table_uri).to_table(columns=["uri", "encoded_at"], with_row_id=True) == encoded
    assert nights.command(verify=True) == (0, [])


def test_quarantined_images_are_tried_again_when_asked(nights: Nights) -> None:
    """A file that only looks as it did: its bytes change, its time and size do not."""
    path = nights.images / "00007.jpg"
    good, status = path.read_bytes(), path.stat()
    path.write_bytes(b"<" * len(good))
    assert nights.run().quarantined == 1
    code, lines = nights.command(show_quarantine=True, json=True)
    assert (code, [json.loads(line)["uri"] for line in lines]) == (0, [str(path)])
    bad = path.stat()
    path.write_bytes(good)
    os.utime(path, ns=(bad.st_atime_ns, bad.st_mtime_ns))
    unasked = nights.run()
    assert (unasked.changed, unasked.quarantined) == (0, 1)
    asked = nights.run(retry_quarantined=True)
    assert (asked.changed, asked.quarantined, asked.indexed) == (1, 0, 60)
    assert nights.found() == nights.listed()
    assert nights.command(show_quarantine=True)[1] == ["no image is quarantined"]
    assert status.st_size == path.stat().st_size


@pytest.mark.slow
def test_an_old_encoder_goes_when_its_last_snapshot_expires(nights: Nights) -> None:
    old = snapshots.latest(nights.layout).fingerprint
    second = nights.run(head="clip", keep_snapshots=1, keep_days=1)
    assert (second.new, second.vectors) == (60, 60)
    assert Path(nights.layout.encoder_uri(old)).exists()
    nights.draw(range(300, 301))
    third = nights.run(encoder=None, head=None, keep_threshold=None, keep_snapshots=1, keep_days=0)
    assert (third.new, third.vectors, third.snapshot) == (1, 61, 3)
    assert not Path(nights.layout.encoder_uri(old)).exists()
    assert [each.snapshot_id for each in snapshots.list_published(nights.layout)] == [3]
    assert nights.found() == nights.listed()


def remove_half(uri: str) -> None:
    """Every other file of a folder; then the process ends, as far as the sweep can tell."""
    files = sorted(path for path in Path(uri).rglob("*") if path.is_file())
    for path in files[::2]:
        path.unlink()
    raise StageError("lease", "lost")


def lose_lease(*_: object, **__: object) -> None:
    raise StageError("lease", "lost")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "death", "num_encoded"),
    [("snapshots.expire", lose_lease, 0), ("delete_tree", remove_half, 60)],
    ids=["whole", "half"],
)
def test_an_encoder_whose_removal_was_cut_short_can_be_gone_on_with(
    nights: Nights,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    death: Callable[..., None],
    num_encoded: int,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(f"for_ray.stages.sweep.{place}", death)
        second = nights.run(head="clip", keep_snapshots=1, keep_days=0)
    assert "sweeping failed: lease: lost" in second.message
    dry = nights.run(dry_run=True)
    assert f"{num_encoded} images would be encoded" in dry.message
    third = nights.run(keep_snapshots=9, keep_days=9)
    assert (third.new, third.indexed, third.vectors, third.snapshot) == (num_encoded, 60, 240, 3)
    assert nights.found() == nights.listed()
    assert nights.command(verify=True) == (0, [])
    assert list(nights.index.glob("removals/*")) == []


def test_a_codec_that_lost_its_recall_is_trained_anew_without_an_image(nights: Nights) -> None:
    """Also in a night in which no image changes; and once."""
    published = snapshots.latest(nights.layout)
    assert published.codec.recall_at_50 == published.recall_at_50
    snapshots.publish(nights.layout, published.model_copy(update={"recall_at_50": 0.5}))
    second = nights.run()
    assert second.message.startswith("published snapshot 3; the codec was trained anew: recall@50 was 1.000")
    assert (second.new, second.changed, second.unchanged) == (0, 0, 60)
    retrained = snapshots.latest(nights.layout)
    assert retrained.codec.codec_id == published.codec.codec_id  # the same vectors give the same codec
    assert {each.file_name for each in retrained.segments}.isdisjoint(
        each.file_name for each in published.segments
    )
    assert nights.run().message == "nothing changed; snapshot 3 stays"


def test_every_run_leaves_a_report(nights: Nights) -> None:
    (nights.images / "empty.jpg").write_bytes(b"")
    nights.run()
    nights.run()
    for number in range(20):
        (nights.images / f"bad-{number}.jpg").write_bytes(b"")
    with pytest.raises(StageError):
        nights.run()
    first, second, third, fourth = nights.reports()
    assert [first.outcome, second.outcome, third.outcome] == ["published", "published", "unchanged"]
    assert (second.new, second.unchanged, second.indexed, second.quarantined) == (1, 60, 60, 1)
    assert [(cause.cause, cause.count) for cause in second.causes] == [("the file is empty", 1)]
    assert second.causes[0].examples == (str(nights.images / "empty.jpg"),)
    names = [stage.name for stage in first.stages]
    assert names == ["list", "diff", "start", "encode", "build", "merge", "verify", "sweep"]
    assert first.stages[3].done == 60
    assert first.work.num_actors >= 1
    assert first.work.encode_seconds > 0
    assert fourth.outcome == "failed"
    assert "max_bad_fraction" in fourth.message
    assert [(cause.cause, cause.count) for cause in fourth.causes] == [("the file is empty", 21)]
    assert fourth.snapshot_id == 2  # what searches go on to see
    pages = sorted(nights.index.glob("reports/*.html"))
    assert len(pages) == 4
    assert sum("the file is empty" in page.read_text() for page in pages) == 3


def test_nights_that_publish_nothing_are_swept_too(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    nights.remove(range(3))
    nights.run()
    for number in range(400):
        (nights.index / "reports" / f"20260101T{number:06d}Z-aa.json").write_text("{}")
    assert nights.run(keep_snapshots=1, keep_days=0).message == "nothing changed; snapshot 2 stays"
    assert [each.snapshot_id for each in snapshots.list_published(nights.layout)] == [2]
    assert len(list(nights.index.glob("reports/*.json"))) == 400
    left = next(nights.index.glob("encoder-*/segments")) / "segment-of-a-dead-run.faiss"
    left.write_bytes(b"half")
    found = nights.listed()
    nights.remove(range(3, 6))
    monkeypatch.setattr("for_ray.pipeline.index_write.IndexWriter._verify", lose_lease)
    with pytest.raises(StageError, match="lost"):
        nights.run()
    assert not left.exists()
    assert nights.found() == found


def test_what_a_run_that_failed_has_built_is_not_built_again(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.draw(range(60, 70))
    with monkeypatch.context() as patched:
        patched.setattr("for_ray.pipeline.index_write.IndexWriter._verify", lose_lease)
        with pytest.raises(StageError, match="lost"):
            nights.run()
    built = set(nights.index.glob("encoder-*/segments/segment-*"))
    assert len(built) == 2
    after = nights.run()
    assert (after.new, after.indexed, after.snapshot) == (0, 70, 2)
    assert set(nights.index.glob("encoder-*/segments/segment-*")) == built
    assert nights.found() == nights.listed()
    assert list(nights.index.glob("encoder-*/segments/draft")) == []


def test_verify_says_what_is_wrong_and_ends_with_1(nights: Nights) -> None:
    assert nights.command(verify=True) == (0, [])
    (segment,) = nights.index.glob("encoder-*/segments/segment-*")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    code, lines = nights.command(verify=True)
    assert code == 1
    assert len(lines) == 1
    assert segment.name in lines[0]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Lets something happen after a run has listed its images and before it has the lease."""

    def arrange(happens: Callable[[], object]) -> None:
        acquire = Lease.acquire

        def acquire_late(*given: Any) -> Lease:
            monkeypatch.setattr(Lease, "acquire", acquire)
            happens()
            return acquire(*given)

        monkeypatch.setattr(Lease, "acquire", acquire_late)

    return arrange


def test_what_another_run_did_meanwhile_is_not_done_again(
    nights: Nights, meanwhile: Callable[[Callable[[], object]], None]
) -> None:
    nights.remove(range(5))
    meanwhile(nights.run)
    assert nights.run().message == "nothing changed; snapshot 2 stays"
    assert [report.outcome for report in nights.reports()] == ["published", "unchanged", "published"]


def test_an_encoder_published_meanwhile_is_not_taken_back(
    nights: Nights, meanwhile: Callable[[Callable[[], object]], None]
) -> None:
    nights.draw(range(60, 62))
    meanwhile(lambda: nights.run(head="clip"))
    with pytest.raises(DataError, match=r"published with another encoder .* while this run listed"):
        nights.run(encoder=None)
    assert snapshots.latest(nights.layout).snapshot_id == 2


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("by nought"), "ZeroDivisionError: by nought"),
    ],
)
def test_a_run_that_was_interrupted_leaves_a_report(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, ending: BaseException, told: str
) -> None:
    def end(*_: object, **__: object) -> None:
        raise ending

    monkeypatch.setattr(IndexWriter, "_verify", end)
    nights.remove(range(5))
    with pytest.raises(type(ending)):
        nights.run()
    last = nights.reports()[-1]
    assert (last.outcome, last.gone, last.snapshot_id) == ("failed", 5, 1)
    assert last.message == told
    monkeypatch.undo()
    assert nights.run().indexed == 55


@pytest.mark.slow
def test_an_image_replaced_twice_waits_for_the_next_night(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = IndexWriter._prepare

    def replace_again(*given: Any) -> Any:
        nights.draw(range(1), seed=2)
        return prepare(*given)

    monkeypatch.setattr(IndexWriter, "_prepare", replace_again)
    nights.draw(range(2), seed=1)
    assert nights.run().indexed == 59
    assert nights.found() == nights.listed()[1:]  # what 00000.jpg showed is nowhere any more
    monkeypatch.undo()
    assert nights.run().new == 1
    assert nights.found() == nights.listed()


def test_a_target_that_is_raised_is_measured_again_and_once(nights: Nights) -> None:
    before = snapshots.latest(nights.layout)
    codec = before.codec.model_copy(update={"recall_at_50": 0.96})
    known = {"codec": codec, "recall_at_50": 0.96, "nprobe": 1, "target_recall": 0.95}
    low = before.model_copy(update=known)
    snapshots.publish(nights.layout, low)
    assert nights.run().message == "nothing changed; snapshot 2 stays"
    assert nights.run(target_recall=0.99).message == "published snapshot 3"
    after = snapshots.latest(nights.layout)
    assert (after.recall_at_50, after.target_recall, after.segments) == (1.0, 0.99, before.segments)
    assert after.nprobe > low.nprobe
    assert nights.run(target_recall=0.99).message == "nothing changed; snapshot 3 stays"
