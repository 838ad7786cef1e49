"""An index in a bucket is searched with nothing but its uri; its segments are fetched once and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from for_ray import storage
from for_ray.errors import DataError
from for_ray.retrieval import open_index
from tests.planted import Planted, PlantedIndex, at_cosines, make_tiny_bundle

pytestmark = pytest.mark.s3

QUERY = np.eye(1, 16, 3, dtype=np.float32)[0]


@pytest.fixture
def index_uri(bucket_uri: str, tmp_path: Path) -> str:
    """Two segments, one image deleted in between; made on disk, then copied into the bucket."""
    folder = tmp_path / "index"
    index = PlantedIndex.make(folder, make_tiny_bundle(tmp_path))
    index.add([Planted(f"s3://images/{number}", at_cosines(QUERY, number / 10, -0.5)) for number in range(5)])
    index.add([Planted("s3://images/new", at_cosines(QUERY, 0.25))], deleted=[3])
    index.publish(deleted=[3], nprobe=2)
    uri = f"{bucket_uri}/a folder/index"
    for path in filter(Path.is_file, folder.rglob("*")):
        storage.upload(path, f"{uri}/{path.relative_to(folder)}")
    return uri


def test_index_in_a_bucket(index_uri: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    hits = open_index(index_uri, cache_path=cache).search_vector(QUERY, k=3)
    assert [hit.uri for hit in hits] == ["s3://images/4", "s3://images/new", "s3://images/2"]
    assert [hit.score for hit in hits] == pytest.approx([0.4, 0.25, 0.2], abs=1e-3)
    [first, second] = sorted(cache.rglob("*.faiss"))
    fetched = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    assert open_index(index_uri + "/", cache_path=cache).search_vector(QUERY, k=3) == hits
    assert fetched == (first.stat().st_mtime_ns, second.stat().st_mtime_ns)
    assert len(open_index(index_uri, cache_path=cache).search("a dog", k=50)) == 5


def test_damaged_segment_in_a_bucket(index_uri: str, tmp_path: Path) -> None:
    [segment] = [
        entry.uri for page in storage.list_objects(index_uri) for entry in page if "segment-1" in entry.uri
    ]
    storage.write_bytes(segment, b"\0" + storage.read_bytes(segment)[1:])
    with pytest.raises(DataError, match="SHA-256"):
        open_index(index_uri, cache_path=tmp_path / "cache")


def test_no_index_in_the_bucket(bucket_uri: str) -> None:
    with pytest.raises(DataError, match="no published snapshot"):
        open_index(f"{bucket_uri}/nothing")
