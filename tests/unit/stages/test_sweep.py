"""The sweep on a planted index: what no kept snapshot needs goes, and nothing else does."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pytest

from for_ray import storage
from for_ray.errors import StageError
from for_ray.index import snapshots, table
from for_ray.index.drafts import Draft, DraftRecord, find_draft, write_draft
from for_ray.index.table import require_table
from for_ray.retrieval import open_index
from for_ray.stages.sweep import finish_removals, is_due, is_removed, sweep
from for_ray.storage import Lease
from tests.planted import Planted, PlantedIndex


@pytest.fixture
def grown(planted_index: PlantedIndex) -> PlantedIndex:
    """Three snapshots, a segment more in each; image 1 is gone in the second and the third."""
    index = planted_index
    for number in range(3):
        vectors = np.random.default_rng(number).normal(size=(20, index.bundle.dim))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        images = [Planted(f"/{number}/{row}.jpg", vectors[row : row + 1]) for row in range(20)]
        index.add(images, deleted=[1] if number == 1 else [])
        index.publish(deleted=[1] if number else [])
    return index


def run_sweep(index: PlantedIndex, *, keep_snapshots: int = 1, keep_days: float = 0) -> tuple[int, int]:
    with Lease.acquire(index.layout.lease_uri, "the test") as lease:
        return tuple(sweep(index.layout, lease, keep_snapshots=keep_snapshots, keep_days=keep_days))


def never_lost() -> None:
    pass


def ids(index: PlantedIndex) -> list[int]:
    return [each.snapshot_id for each in snapshots.list_published(index.layout)]


def versions(index: PlantedIndex) -> set[int]:
    return {each["version"] for each in lance.dataset(index.images_uri).versions()}


def answer(index: PlantedIndex, snapshot_id: int) -> list[tuple[str, float]]:
    opened = open_index(index.uri, snapshot_id=snapshot_id)
    query = np.eye(index.bundle.dim, dtype=np.float32)[0]
    return [(hit.uri, hit.score) for hit in opened.search_vector(query, k=100)]


def test_nothing_that_a_kept_snapshot_needs_goes(grown: PlantedIndex) -> None:
    before = {number: answer(grown, number) for number in (2, 3)}
    assert run_sweep(grown, keep_snapshots=2) == (1, 0)  # its one segment is the others' first
    assert ids(grown) == [2, 3]
    assert {number: answer(grown, number) for number in (2, 3)} == before
    kept = {each.images_version for each in snapshots.list_snapshots(grown.layout)}
    assert versions(grown) == kept


def test_days_keep_what_the_count_would_not(grown: PlantedIndex) -> None:
    assert run_sweep(grown, keep_days=36_500)[0] == 0
    assert ids(grown) == [1, 2, 3]


def test_a_search_that_is_open_goes_on_while_its_snapshot_stays(grown: PlantedIndex) -> None:
    opened = open_index(grown.uri, snapshot_id=2)
    query = np.eye(grown.bundle.dim, dtype=np.float32)[0]
    before = opened.search_vector(query, k=40)
    run_sweep(grown, keep_snapshots=2)
    assert opened.search_vector(query, k=40) == before
    assert len(before) == 39


def test_segments_that_nobody_names_any_more_go(grown: PlantedIndex) -> None:
    last = snapshots.latest(grown.layout)
    merged = last.model_copy(update={"segments": last.segments[1:]})
    snapshots.publish(grown.layout, merged)
    foreign = grown.segment_path("segment-of-a-dead-run.faiss")
    foreign.write_bytes(b"half")
    assert run_sweep(grown) == (3, 2)
    names = {path.name for path in foreign.parent.iterdir()}
    assert names == {"segment-1.faiss", "segment-2.faiss", last.codec.file_name}


def test_what_a_draft_names_stays_until_the_next_snapshot(grown: PlantedIndex) -> None:
    last, fingerprint = snapshots.latest(grown.layout), grown.bundle.fingerprint
    snapshots.publish(grown.layout, last)
    built = last.segments[0].model_copy(update={"segment_id": "9", "file_name": "segment-9.faiss"})
    for name in ("segment-9.faiss", "segment-of-a-dead-run.faiss"):
        shutil.copy(grown.segment_path(last.segments[0].file_name), grown.segment_path(name))
    record = DraftRecord(
        base_id=4,
        images_version=1,
        codec=last.codec,
        segments=[*last.segments, built],
        first_new=9,
        is_new=True,
        retrained=None,
    )
    write_draft(grown.layout, fingerprint, Draft(record, np.empty(0, np.int64)))
    named = {"draft", last.codec.file_name, *(each.file_name for each in last.segments)}
    assert run_sweep(grown) == (3, 1)
    assert {path.name for path in grown.segment_path("").iterdir()} == named | {"segment-9.faiss"}
    assert {1, last.images_version} <= versions(grown)
    assert find_draft(grown.layout, fingerprint, base_id=4) is not None
    snapshots.publish(grown.layout, last)
    assert run_sweep(grown) == (1, 2)
    assert {path.name for path in grown.segment_path("").iterdir()} == named - {"draft"}
    assert versions(grown) == {last.images_version}


def test_an_encoder_goes_with_its_last_snapshot(grown: PlantedIndex, tmp_path: Path) -> None:
    other = "0" * 16
    folder = Path(grown.layout.encoder_uri(other))
    shutil.copytree(Path(grown.layout.encoder_uri(grown.bundle.fingerprint)), folder)
    last = snapshots.latest(grown.layout)
    snapshots.publish(grown.layout, last.model_copy(update={"fingerprint": other}))
    unpublished = Path(grown.layout.encoder_uri("1" * 16))
    shutil.copytree(folder, unpublished)
    run_sweep(grown, keep_snapshots=2)
    assert ids(grown) == [3, 4]
    assert Path(grown.layout.encoder_uri(grown.bundle.fingerprint)).exists()
    run_sweep(grown)
    assert ids(grown) == [4]
    assert not Path(grown.layout.encoder_uri(grown.bundle.fingerprint)).exists()
    assert require_table(grown.layout.images_uri(other), version=last.images_version).count_rows() == 59
    assert unpublished.exists()  # a run may have died while it built it


class Killed(BaseException):
    """The process ends here."""


def sweep_until(number: int, index: PlantedIndex) -> bool:
    """Sweep, and die when so many deletions are made; whether it came to that."""
    count = itertools.count()

    def counted(act: Callable[..., object]) -> Callable[..., object]:
        def attempt(what: object, *given: object, **named: object) -> object:
            if not str(what).endswith(".part") and next(count) >= number:  # but for what writing leaves
                raise Killed
            return act(what, *given, **named)

        return attempt

    with Lease.acquire(index.layout.lease_uri, "the test") as lease, pytest.MonkeyPatch.context() as patched:
        for name in ("unlink", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr(snapshots, "delete_rows", counted(snapshots.delete_rows))
        try:
            sweep(index.layout, lease, keep_snapshots=1, keep_days=0)
        except Killed:
            return True
    return False


@pytest.fixture
def replaced(grown: PlantedIndex) -> str:
    """The fingerprint of an encoder whose three snapshots expire, since another one was published."""
    old = "0" * 16
    shutil.copytree(
        Path(grown.layout.encoder_uri(grown.bundle.fingerprint)), Path(grown.layout.encoder_uri(old))
    )
    published = [snapshots.by_id(grown.layout, number) for number in (1, 2, 3)]
    for snapshot in published:
        snapshots.publish(grown.layout, snapshot.model_copy(update={"fingerprint": old}))
    last = snapshots.publish(grown.layout, published[-1])
    assert last.snapshot_id == 7
    return old


def test_an_encoder_that_was_half_removed_is_never_gone_on_from(
    grown: PlantedIndex, replaced: str, tmp_path: Path
) -> None:
    """Killed before each of its deletions, and done again as a run of that encoder does it."""
    folder, kept = Path(grown.uri), tmp_path / "kept"
    whole = files_of(Path(grown.layout.encoder_uri(replaced)))
    shutil.copytree(folder, kept)
    states = set()
    for number in itertools.count():
        has_died = sweep_until(number, grown)
        base = snapshots.find_latest(grown.layout, fingerprint=replaced)
        left = files_of(Path(grown.layout.encoder_uri(replaced)))
        is_unfit = is_removed(grown.layout, replaced)
        assert left == whole if base else is_unfit or not left
        states.add((base is not None, bool(left), is_unfit))
        with Lease.acquire(grown.layout.lease_uri, "the next run") as lease:
            finish_removals(grown.layout, lease)
        again = files_of(Path(grown.layout.encoder_uri(replaced)))
        assert again == (whole if base else set())
        assert not is_removed(grown.layout, replaced)
        assert not storage.exists(grown.layout.removal_uri(""))
        assert run_sweep(grown) == (6 if base else 0, 0)
        assert ids(grown) == [7]
        assert not Path(grown.layout.encoder_uri(replaced)).exists()
        assert len(answer(grown, 7)) == 59
        shutil.rmtree(folder)
        if not has_died:
            break
        shutil.copytree(kept, folder)
    assert number > len(whole)
    assert states == {(True, True, False), (False, True, True), (False, False, True), (False, False, False)}


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_what_runs_hand_to_their_workers_goes(grown: PlantedIndex) -> None:
    left = Path(grown.layout.work_uri("dead")) / "gap-000000.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"rows")
    run_sweep(grown, keep_snapshots=9)
    assert not left.exists()


def test_compaction_keeps_ids_and_what_old_versions_hold(grown: PlantedIndex) -> None:
    images = table.open_table(grown.images_uri)
    before = {row["uri"]: row for row in images.to_table(with_row_id=True).to_pylist()}
    assert table.compact(images, rows=1, check=never_lost) is not None
    # One file in twenty of the rows is gone: no reason yet. A tenth is.
    assert table.open_table(grown.images_uri).version == images.version
    table.delete_images(images, np.arange(2, 10))
    gone = {f"/0/{row}.jpg" for row in range(2, 10)}
    compacted = table.compact(images, rows=1, check=never_lost)
    after = {row["uri"]: row for row in compacted.to_table(with_row_id=True).to_pylist()}
    assert after == {uri: row for uri, row in before.items() if uri not in gone}
    assert sum(fragment.num_deletions for fragment in compacted.get_fragments()) == 0
    run_sweep(grown, keep_snapshots=3)
    first = snapshots.by_id(grown.layout, 1)
    assert table.open_table(grown.images_uri, version=first.images_version).count_rows() == 20


def test_many_small_files_become_few(planted_index: PlantedIndex) -> None:
    vector = np.eye(planted_index.bundle.dim)[:1]
    for number in range(table.FEW_FRAGMENTS + 1):
        rows = [Planted(f"/{number}/{row}.jpg", vector) for row in range(3)]
        planted_index.append(rows)
        images = table.open_table(planted_index.images_uri)
        if number + 1 <= table.FEW_FRAGMENTS:
            assert table.compact(images, rows=50, check=never_lost) is images
    before = images.to_table(with_row_id=True).to_pylist()
    compacted = table.compact(images, rows=50, check=never_lost)
    assert len(compacted.get_fragments()) <= 3
    assert compacted.to_table(with_row_id=True).to_pylist() == before


def test_a_compaction_ends_where_the_lease_is_lost(planted_index: PlantedIndex) -> None:
    """Before each of its files and before its commit: the table is as it was, the next does it all."""
    vector = np.eye(planted_index.bundle.dim)[:1]
    for number in range(table.FEW_FRAGMENTS + 1):
        planted_index.append([Planted(f"/{number}/{row}.jpg", vector) for row in range(3)])
    images = table.open_table(planted_index.images_uri)
    before = images.to_table(with_row_id=True)
    num_checks = 0

    def lost_at(limit: int) -> Callable[[], None]:
        def check() -> None:
            nonlocal num_checks
            num_checks += 1
            if num_checks == limit:
                raise StageError("lease", "lost")

        return check

    for limit in (1, 2, 3, 4):
        num_checks = 0
        with pytest.raises(StageError, match="lost"):
            table.compact(images, rows=30, check=lost_at(limit))
        assert table.open_table(planted_index.images_uri).version == images.version
    num_checks = 0
    compacted = table.compact(images, rows=30, check=lost_at(99))
    assert num_checks == 4  # three files of about 30 rows, and the commit
    assert len(compacted.get_fragments()) == 3
    assert compacted.to_table(with_row_id=True) == before


def test_what_is_no_mark_of_an_encoder_removes_none(grown: PlantedIndex) -> None:
    folder, other = Path(grown.layout.removal_uri("")), Path(grown.layout.encoder_uri(".note"))
    for path in (folder / ".note", folder / "deep" / "00", other / "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    run_sweep(grown)
    assert (other / "file").exists()
    assert not is_due(grown.layout, keep_snapshots=1, keep_days=0)


def test_a_sweep_is_due_when_something_has_expired_or_is_half_removed(grown: PlantedIndex) -> None:
    assert not is_due(grown.layout, keep_snapshots=3, keep_days=0)
    assert not is_due(grown.layout, keep_snapshots=2, keep_days=36_500)
    assert is_due(grown.layout, keep_snapshots=2, keep_days=0)
    storage.write_bytes(grown.layout.removal_uri("0" * 16), b"")
    assert is_due(grown.layout, keep_snapshots=3, keep_days=0)
