"""Segments in a bucket are merged by a worker that has nothing but their uris, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from for_ray import storage
from for_ray.errors import DataError
from for_ray.index import snapshots
from for_ray.index.search import open_segments
from for_ray.schema import Layout, Segment, image_ids_of
from for_ray.stages.merge import _merge
from for_ray.stages.ranges import RangeJob
from tests.planted import Planted, PlantedIndex, at_cosines, make_tiny_bundle

pytestmark = pytest.mark.s3

QUERY = np.eye(1, 16, 3, dtype=np.float32)[0]


@pytest.fixture
def job(bucket_uri: str, tmp_path: Path) -> RangeJob:
    """An index of two segments, image 3 deleted in between; made on disk, then copied into the bucket."""
    folder = tmp_path / "index"
    index = PlantedIndex.make(folder, make_tiny_bundle(tmp_path))
    index.add([Planted(f"s3://images/{number}", at_cosines(QUERY, number / 10, -0.5)) for number in range(5)])
    index.add([Planted("s3://images/new", at_cosines(QUERY, 0.25))], deleted=[3])
    index.publish(deleted=[3], nprobe=2)
    uri = f"{bucket_uri}/a folder/index"
    for path in filter(Path.is_file, folder.rglob("*")):
        storage.upload(path, f"{uri}/{path.relative_to(folder)}")
    return RangeJob(uri, snapshots.latest(Layout(uri)).fingerprint, 4, "run")


@pytest.fixture
def parts(job: RangeJob) -> list[Segment]:
    first, second = snapshots.latest(job.layout).segments
    return [first.model_copy(update={"num_dead": 2}), second]


def test_segments_in_a_bucket(job, parts, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    merged = Segment.model_validate(_merge(job, parts, np.array([3])))
    assert list(home.iterdir()) == []
    assert merged.file_name == "segment-run-000000000000-000000000006.faiss"
    assert (merged.num_vectors, merged.num_dead) == (9, 0)
    layout = job.layout
    found = [
        open_segments(layout, job.fingerprint, segments, nprobe=2, cache_path=tmp_path / "cache").search(
            QUERY[None], 20, exclude_image_ids=np.array([3])
        )
        for segments in (parts, [merged])
    ]
    np.testing.assert_array_equal(found[0].vector_ids, found[1].vector_ids)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)
    assert set(image_ids_of(found[1].vector_ids[0]).tolist()) == {0, 1, 2, 4, 5}
    assert storage.stat(layout.segment_uri(job.fingerprint, merged.file_name)).size_bytes == merged.num_bytes


def test_a_damaged_part_is_not_merged(job, parts):
    uri = job.layout.segment_uri(job.fingerprint, parts[1].file_name)
    storage.write_bytes(uri, b"\0" + storage.read_bytes(uri)[1:])
    with pytest.raises(DataError, match="SHA-256"):
        _merge(job, parts, np.array([3]))
    assert not storage.exists(
        job.layout.segment_uri(job.fingerprint, "segment-run-000000000000-000000000006.faiss")
    )
