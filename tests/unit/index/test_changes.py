"""Images that are gone since a version of the table: found whatever became of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from for_ray.index import changes, table
from for_ray.schema import images_schema

SCHEMA = images_schema(2)


def add(images: Any, counts: list[int | None]) -> Any:
    """Append images with so many vectors each, as one file; None: quarantined."""
    columns = {field.name: pa.nulls(len(counts), field.type) for field in SCHEMA}
    columns["uri"] = pa.array([str(number) for number in range(len(counts))])
    for name, value in (("vectors", [0, 1]), ("boxes", [0, 0, 1, 1])):
        lists = [None if count is None else [value] * count for count in counts]
        columns[name] = pa.array(lists, SCHEMA.field(name).type)
    return table.append(images, table.write_fragments(pa.table(columns, schema=SCHEMA), images.uri))


@pytest.fixture
def images(tmp_path: Path) -> Any:
    """Images 0 to 29 in three files; image i has i % 4 vectors."""
    made = table.create_table(str(tmp_path / "images.lance"), SCHEMA)
    for start in range(0, 30, 10):
        made = add(made, [number % 4 for number in range(start, start + 10)])
    return made


def at(images: Any, version: int | None = None) -> Any:
    return table.open_table(images.uri, version=version)


def found(before: Any, after: Any) -> dict[int, int]:
    gone = changes.find_gone(before, after)
    assert gone.image_ids.dtype == gone.num_vectors.dtype == np.int64
    assert (np.diff(gone.image_ids) > 0).all()
    return dict(zip(gone.image_ids.tolist(), gone.num_vectors.tolist(), strict=True))


def test_nothing_is_gone_from_the_same_table(images):
    assert found(images, images) == {}
    assert found(images, add(at(images), [3, 3])) == {}


def test_gone_images_come_with_their_vectors(images):
    """Image 4 and 8 had none; a whole file goes, and images that came later are nobody's loss."""
    table.delete_images(at(images), np.array([3, 4, 7, 8]))
    table.delete_images(add(at(images), [2]), np.array([30, *range(20, 30)]))
    gone = [number for number in (3, 7, *range(20, 30)) if number % 4]
    assert found(images, at(images)) == {number: number % 4 for number in gone}


def test_only_what_is_gone_since_then(images):
    table.delete_images(at(images), np.array([1, 11, 21]))
    middle = at(images)
    table.delete_images(at(images), np.array([2, 13]))
    assert found(images, middle) == {1: 1, 11: 3, 21: 1}
    assert found(middle, at(images)) == {2: 2, 13: 1}
    assert found(images, at(images)) == {1: 1, 2: 2, 11: 3, 13: 1, 21: 1}


@pytest.mark.parametrize("rows_at_once", [1, 15, 1000])
def test_compaction_moves_rows_and_loses_none(images, monkeypatch, rows_at_once):
    monkeypatch.setattr(changes, "ROWS_AT_ONCE", rows_at_once)
    table.delete_images(at(images), np.array([1, 2, 3, 14, 15]))
    compacted = at(images)
    compacted.optimize.compact_files(
        target_rows_per_fragment=20, materialize_deletions=True, materialize_deletions_threshold=0.05
    )
    assert {each.fragment_id for each in at(images).get_fragments()} != {0, 1, 2}
    gone = {1: 1, 2: 2, 3: 3, 14: 2, 15: 3}
    assert found(images, at(images)) == gone
    table.delete_images(at(images), np.array([5, 29]))
    assert found(images, at(images)) == gone | {5: 1, 29: 1}


def test_a_quarantined_image_has_no_vectors(images):
    later = add(at(images), [None, 2])
    table.delete_images(at(images), np.array([30, 31]))
    assert found(later, at(images)) == {31: 2}


def test_files_without_a_loss_are_not_read(images, monkeypatch):
    table.delete_images(at(images), np.array([13]))
    read = []
    scan = changes._scan_ids
    monkeypatch.setattr(
        changes,
        "_scan_ids",
        lambda images, files: read.append([each.fragment_id for each in files]) or scan(images, files),
    )
    assert found(images, at(images)) == {13: 1}
    assert read == [[1], [1]]


def test_more_than_a_take_holds(images, monkeypatch):
    monkeypatch.setattr(changes, "IDS_IN_A_DELETE", 4)
    table.delete_images(at(images), np.arange(30))
    assert found(images, at(images)) == {number: number % 4 for number in range(30) if number % 4}
