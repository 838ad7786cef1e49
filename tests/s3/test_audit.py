"""The parts of a snapshot in a bucket: read afresh, whatever lies in the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from for_ray.index import table
from for_ray.index.audit import AuditJob, RangeAudit, audit_range, plan_ranges
from for_ray.index.audit_files import find_broken
from for_ray.index.audit_rows import end_of_ids
from for_ray.schema import Layout
from for_ray.storage import delete, local_copy, read_bytes, upload, write_bytes
from tests.planted import Planted, PlantedIndex, make_tiny_bundle


def units(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 16))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def test_an_index_in_a_bucket_is_checked_in_the_bucket(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "clip").mkdir()
    planted = PlantedIndex.make(tmp_path / "index", make_tiny_bundle(tmp_path / "clip"))
    for first in (0, 5):
        planted.add([Planted(f"/{n}.jpg", units(2, n)) for n in range(first, first + 5)])
    snapshot = planted.publish()
    for path in (tmp_path / "index").rglob("*"):
        if path.is_file():
            upload(path, f"{bucket_uri}/index/{path.relative_to(tmp_path / 'index')}")
    layout = Layout(f"{bucket_uri}/index")

    def audited() -> list[str]:
        images = table.require_table(layout.images_uri(snapshot.fingerprint), version=snapshot.images_version)
        problems, broken = find_broken(images)
        job = AuditJob(
            layout.index_uri, snapshot.fingerprint, snapshot.images_version, None, snapshot.codec, broken
        )
        found = RangeAudit()
        for part in plan_ranges(snapshot.segments, end_of_ids(images), images_a_range=100):
            none = np.empty(0, np.int64)
            found.merge(audit_range(job, part, deleted=none, folder=tmp_path))
        return problems + found.problems + found.faults.lines("the table")

    assert audited() == []
    segment = snapshot.segments[1]
    uri = layout.segment_uri(snapshot.fingerprint, segment.file_name)
    local_copy(uri, sha256=segment.sha256)
    content = bytearray(read_bytes(uri))
    content[-9] ^= 1
    write_bytes(uri, bytes(content))
    images = table.require_table(layout.images_uri(snapshot.fingerprint))
    lost = f"{images.uri}/data/{images.get_fragments()[0].metadata.files[0].path}"
    delete(lost)
    problems = audited()
    assert problems[0].startswith(f"{lost} is not there: 5 images of version ")
    assert problems[1].startswith(f"{uri} is damaged or was replaced: its SHA-256 is ")
    assert len(problems) == 2
    assert not list(tmp_path.glob("*.faiss"))
