"""What an index and a data set share, and rankings of ids as rankings of columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from for_ray.index.table import open_table, read_vectors
from for_ray.stages.rank import Members, _only, as_columns, find_members
from tests.planted import Planted, PlantedIndex

VECTORS = np.eye(3, 16, dtype=np.float32)


@pytest.fixture
def table(planted_index: PlantedIndex):
    """Ids 0 to 5; 2 is deleted, 4 is quarantined, and the data set below does not know 1."""
    names = ["d", "stranger", "b", "a", "e", "c"]
    images = [
        Planted(
            f"/{name}", VECTORS[: number % 3 + 1] if name != "e" else [], error="bad" if name == "e" else None
        )
        for number, name in enumerate(names)
    ]
    planted_index.add(images, deleted=[2])
    return open_table(planted_index.images_uri)


def test_members_are_what_both_have_with_vectors(table):
    uris = pa.chunked_array([["/a", "/b"], ["/c", "/d", "/e", "/f"]])
    members = find_members(table, uris)
    assert members.image_ids.tolist() == [0, 3, 5]
    assert members.rows.tolist() == [3, 0, 2]
    assert members.strangers.tolist() == [1]
    none = find_members(table, pa.chunked_array([["/x"]]))
    assert (none.image_ids.tolist(), none.strangers.tolist()) == ([], [0, 1, 3, 5])


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_only_members_stay_in_a_batch(table, batch_rows):
    kept = {}
    batches = read_vectors(table, 0, 100, batch_rows=batch_rows)
    for image_ids, offsets, vectors in _only(batches, np.array([0, 5])):
        assert (offsets[0], offsets[-1]) == (0, len(vectors))
        for row, image_id in enumerate(image_ids.tolist()):
            kept[image_id] = vectors[offsets[row] : offsets[row + 1]].astype(np.float32)
    assert sorted(kept) == [0, 5]
    np.testing.assert_array_equal(kept[0], VECTORS[:1])
    np.testing.assert_array_equal(kept[5], VECTORS)


def test_rankings_by_column():
    members = Members(np.array([10, 20, 30]), np.array([4, 0, 2]), np.array([], np.int64))
    column_of_row = np.array([0, -1, 1, -1, 2])
    rankings = [np.array([30, 10]), np.array([], np.int64), np.array([20, 30, 10])]
    assert as_columns(rankings, members, column_of_row, 4).tolist() == [
        [1, 2, -1, -1],
        [-1, -1, -1, -1],
        [0, 1, 2, -1],
    ]
