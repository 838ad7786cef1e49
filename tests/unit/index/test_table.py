"""The table of images: ids that stay, vectors by id, and what a diff and a snapshot ask of it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.index import table
from for_ray.schema import Cause, images_schema

DIM = 4


def rows(names: str, *, counts: list[int], errors: dict[str, str] | None = None) -> pa.Table:
    """A row a letter, with so many vectors each; slot j is full of its letter's number + j / 8."""
    errors = errors or {}
    vectors = [
        [[ord(name) - 97 + slot / 8] * DIM for slot in range(count)]
        for name, count in zip(names, counts, strict=True)
    ]
    columns: dict[str, Any] = {
        "uri": list(names),
        "etag": [f"etag-{name}" for name in names],
        "size_bytes": [1] * len(names),
        "width": [None if name in errors else 10 for name in names],
        "height": [None if name in errors else 10 for name in names],
        "error": [errors.get(name) for name in names],
        "vectors": vectors,
        "boxes": [[[0, 0, 255, 255]] * count for count in counts],
        "encoded_at": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)] * len(names),
    }
    return pa.table(columns, schema=images_schema(DIM))


@pytest.fixture
def images(tmp_path: Path) -> Any:
    """Images a to f with ids 0 to 5, in two commits; c is quarantined."""
    uri = str(tmp_path / "images.lance")
    made = table.create_table(uri, images_schema(DIM))
    for part in (
        rows("abc", counts=[2, 1, 0], errors={"c": "broken JPEG: x (1)"}),
        rows("def", counts=[3, 1, 2]),
    ):
        made = table.append(made, table.write_fragments(part, uri))
    return made


def test_there_may_be_no_table(tmp_path):
    assert table.open_table(str(tmp_path / "none.lance")) is None
    assert table.version_of(None) == 0
    with pytest.raises(DataError, match="is not there; run"):
        table.require_table(str(tmp_path / "none.lance"))


def test_a_broken_table_is_told_in_one_line(images):
    for manifest in Path(images.uri, "_versions").glob("*.manifest"):
        manifest.write_bytes(b"nonsense")
    with pytest.raises(StorageError) as caught:
        table.open_table(images.uri)
    assert "images.lance" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vectors_come_by_image_id_in_the_order_asked_for(images):
    image_ids, offsets, vectors = table.take_vectors(images, [5, 2, 0, 77])
    assert image_ids.tolist() == [5, 2, 0]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert vectors.dtype == np.float16
    assert vectors[:, 0].tolist() == [5, 5.125, 0, 0.125]


def test_vector_ids_are_those_of_the_schema(images):
    assert table.take_vectors(images, [3, 1]).vector_ids.tolist() == [768, 769, 770, 256]


def test_nothing_asked_nothing_given(images):
    taken = table.take_vectors(images, [])
    assert (taken.image_ids.shape, taken.offsets.tolist(), taken.vectors.shape) == ((0,), [0], (0, DIM))


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
def test_a_range_is_read_whole_whatever_the_batch(images, batch_rows):
    batches = list(table.read_vectors(images, 1, 5, batch_rows=batch_rows))
    assert np.concatenate([batch.image_ids for batch in batches]).tolist() == [1, 2, 3, 4]
    assert np.concatenate([batch.vectors[:, 0] for batch in batches]).tolist() == [1, 3, 3.125, 3.25, 4]
    assert np.concatenate([batch.vector_ids for batch in batches]).tolist() == [256, 768, 769, 770, 1024]


def test_ids_survive_deletes_and_are_not_given_twice(images):
    table.delete_images(images, np.array([1, 5]))
    later = table.append(images, table.write_fragments(rows("g", counts=[1]), images.uri))
    assert table.take_vectors(later, [0, 1, 3, 5, 6]).image_ids.tolist() == [0, 3, 6]


def held(images, first, end=None):
    found = table.count_held(images, first, end)
    return found.num_images, found.num_vectors, found.end


def test_held_counts_images_vectors_and_the_end(images):
    assert held(images, 0) == (6, 9, 6)
    assert held(images, 3) == (3, 6, 6)
    assert held(images, 6) == (0, 0, 6)
    assert held(images, 2, 5)[:2] == tuple(np.subtract(held(images, 2), held(images, 5))[:2])
    assert held(images, 2, 5)[2] == 5
    table.delete_images(images, np.array([3]))
    assert held(images, 0) == (5, 6, 6)


def test_many_ids_are_deleted_in_many_statements(images, monkeypatch):
    monkeypatch.setattr(table, "IDS_IN_A_DELETE", 2)
    table.delete_images(images, np.array([0, 1, 2, 4, 99]))
    left = images.to_table(columns=[], with_row_id=True)
    assert left["_rowid"].to_pylist() == [3, 5]
    assert held(images, 0) == (2, 5, 6)


def test_an_old_version_stays_readable(images):
    before = table.version_of(images)
    table.delete_images(images, np.array([0]))
    assert table.version_of(images) == before + 1
    assert table.open_table(images.uri, version=before).count_rows() == 6


def test_state_is_what_a_diff_needs(images):
    state = pa.Table.from_batches(table.scan_state(images)).to_pydict()
    assert state["uri"] == list("abcdef")
    assert state["etag"][1] == "etag-b"
    assert state["error"][:3] == [None, None, "broken JPEG: x (1)"]
    assert state["_rowid"] == [0, 1, 2, 3, 4, 5]


def test_state_since_a_version_is_that_of_what_was_appended(images):
    assert list(table.scan_state(images, since=images)) == []
    table.delete_images(images, np.array([0]))
    part = rows("ab", counts=[0, 0])
    later = table.append(table.open_table(images.uri), table.write_fragments(part, images.uri))
    state = pa.Table.from_batches(table.scan_state(later, since=images)).to_pydict()
    assert (state["uri"], state["_rowid"]) == (["a", "b"], [6, 7])


def test_causes_are_counted_without_their_numbers(images):
    errors = {"g": "broken JPEG: y (2)", "h": "too many pixels: 9×9", "i": "the file is empty"}
    part = rows("ghi", counts=[0, 0, 0], errors=errors)
    later = table.append(images, table.write_fragments(part, images.uri))
    assert table.count_images(later) == (5, 4)
    broken = Cause(cause="broken JPEG", count=2, examples=("c", "g"))
    too_many = Cause(cause="too many pixels", count=1, examples=("h",))
    empty = Cause(cause="the file is empty", count=1, examples=("i",))
    assert table.worst_causes(later) == [broken, empty, too_many]
    assert table.worst_causes(later, limit=1, num_examples=1) == [
        broken.model_copy(update={"examples": ("c",)})
    ]


def test_causes_do_not_name_the_image(images):
    uris = ["s3://b/g", "s3://b/h\n.tar#i"]
    errors = ["s3://b/g is too large: 9 bytes", r"s3://b/h\n.tar is too large: 8 bytes"]
    part = rows("gh", counts=[0, 0])
    for name, values in (("uri", uris), ("error", errors)):
        part = part.set_column(part.schema.names.index(name), part.schema.field(name), pa.array(values))
    later = table.append(images, table.write_fragments(part, images.uri))
    assert table.worst_causes(later)[0] == Cause(cause="is too large", count=2, examples=tuple(uris))


def test_new_metadata_columns_are_null_in_old_rows(images):
    schema = pa.schema([("caption", pa.string())])
    table.add_missing_columns(images, schema)
    table.add_missing_columns(images, schema)
    assert images.to_table(columns=["caption"])["caption"].null_count == 6


def test_a_version_that_is_lost_is_none(images):
    before = table.version_of(images)
    later = table.append(images, table.write_fragments(rows("g", counts=[1]), images.uri))
    assert table.version_of(table.open_version(later, before)) == before
    assert table.version_of(table.open_version(later, table.version_of(later))) == before + 1
    table.sweep_versions(images.uri, [])
    assert table.open_version(later, before) is None
    table.sweep_versions(images.uri, [before])  # a kept snapshot names it still
    assert table.open_version(later, before) is None
