"""The sweep of an index in a bucket: beside searches of another process, and killed while it deletes."""

from __future__ import annotations

from pathlib import Path

import lance
import pytest

from for_ray import storage
from for_ray.errors import StageError
from for_ray.index import snapshots, table
from for_ray.retrieval import open_index
from for_ray.stages.sweep import finish_removals, is_due, is_removed, sweep
from for_ray.storage import Lease, lance_options, list_objects, s3
from tests.planted import PlantedIndex, make_tiny_bundle
from tests.readers import KEPT, QUERY, expected, live_a_night, live_nights_beside_a_reader

pytestmark = pytest.mark.s3


@pytest.fixture
def index(bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlantedIndex:
    """An index without images, in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return PlantedIndex.make(f"{bucket_uri}/an index", make_tiny_bundle(tmp_path))


def keys(uri: str) -> set[str]:
    return {entry.uri.removeprefix(uri) for page in list_objects(uri) for entry in page}


def test_searches_go_on_while_a_bucket_is_swept(index: PlantedIndex, tmp_path: Path) -> None:
    assert live_nights_beside_a_reader(index, tmp_path / "reader", num_nights=4) >= 9
    assert [each.snapshot_id for each in snapshots.list_published(index.layout)] == [5, 6, 7, 8]
    folder = index.layout.segment_uri(index.bundle.fingerprint, "")
    names = {f"segment-{number}.faiss" for number in range(2, 8)}
    assert {key for key in keys(folder) if key.startswith("segment")} == names
    images = lance.dataset(index.images_uri, storage_options=lance_options(index.images_uri))
    assert len(images.versions()) == KEPT


def test_an_encoder_that_was_half_removed_from_a_bucket(
    index: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_a_night(index, 1)
    layout, old = index.layout, "0" * 16
    for key in keys(layout.encoder_uri(index.bundle.fingerprint)):
        content = storage.read_bytes(layout.encoder_uri(index.bundle.fingerprint) + key)
        storage.write_bytes(layout.encoder_uri(old) + key, content)
    first = snapshots.latest(layout)
    snapshots.publish(layout, first.model_copy(update={"fingerprint": old}))
    snapshots.publish(layout, first)

    def delete_half(uri: str, bucket: str, page: list[storage.Entry]) -> int:
        for entry in page[::2]:
            storage.delete(entry.uri)
        raise StageError("lease", "lost")

    whole = keys(layout.encoder_uri(old))
    with monkeypatch.context() as patched, Lease.acquire(layout.lease_uri, "the test") as lease:
        patched.setattr(s3, "_delete_page", delete_half)
        with pytest.raises(StageError):
            sweep(layout, lease, keep_snapshots=1, keep_days=0)
    assert 0 < len(keys(layout.encoder_uri(old))) < len(whole)
    assert is_removed(layout, old)
    assert snapshots.find_latest(layout, fingerprint=old) is None
    with Lease.acquire(layout.lease_uri, "the next run") as lease:
        finish_removals(layout, lease)
    assert not storage.exists(layout.encoder_uri(old))
    assert not is_removed(layout, old)
    assert not is_due(layout, keep_snapshots=1, keep_days=0)  # no mark is left
    assert table.open_table(layout.images_uri(old)) is None
    assert [hit.uri for hit in open_index(index.uri).search_vector(QUERY, k=100)] == expected(1)
