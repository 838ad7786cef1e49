"""Lists of lists in two arrays, and what a data set holds in memory while it is read."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from for_ray.datasets.labelled import Ragged
from for_ray.datasets.spec import open_dataset
from tests.formats import coco_content

rows_of_values = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8)


@given(rows_of_values, st.randoms(use_true_random=False))
def test_lists_by_pairs_equal_lists_by_rows(rows, random):
    pairs = [(row, value) for row, values in enumerate(rows) for value in values]
    random.shuffle(pairs)
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    made = Ragged.of_pairs(columns[:, 0], columns[:, 1], len(rows))
    expected = Ragged.of(rows)
    np.testing.assert_array_equal(made.offsets, expected.offsets)
    np.testing.assert_array_equal(made.values, expected.values)
    assert (made.offsets.dtype, made.values.dtype) == (np.int64, np.int32)
    assert [made.row(row).tolist() for row in range(len(made))] == [sorted(set(values)) for values in rows]


def test_reading_takes_a_fraction_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("for_ray.datasets.streams.CHUNK_BYTES", 1 << 16)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_content({number: ["person", "cat", "dog"] for number in range(8000)})))
    open_dataset(f"coco:{path}:{tmp_path}")  # what is imported and cached counts for nothing
    tracemalloc.start()
    images = open_dataset(f"coco:{path}:{tmp_path}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 8000
    assert peak < path.stat().st_size / 2


@pytest.mark.parametrize("num_rows", [0, 3])
def test_empty_lists_hold_nothing(num_rows):
    made, expected = Ragged.empty(num_rows), Ragged.of([[]] * num_rows)
    assert len(made) == num_rows
    for name in ("offsets", "values"):
        assert getattr(made, name).dtype == getattr(expected, name).dtype
        assert np.array_equal(getattr(made, name), getattr(expected, name))
