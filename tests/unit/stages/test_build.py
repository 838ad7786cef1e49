"""The codec's training sample: over all images, all slots, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from for_ray.index import table
from for_ray.schema import images_schema
from for_ray.stages.build import draw_vectors

NUM_IMAGES, DIM = 900, 2


@pytest.fixture
def images(tmp_path: Path) -> Any:
    """Image i has 0 to 40 vectors (i, slot)."""
    uri = str(tmp_path / "images.lance")
    counts = np.random.default_rng(0).integers(0, 41, NUM_IMAGES)
    columns = {field.name: pa.nulls(NUM_IMAGES, field.type) for field in images_schema(DIM)}
    columns["uri"] = pa.array([str(number) for number in range(NUM_IMAGES)])
    vectors = [[[number, slot] for slot in range(count)] for number, count in enumerate(counts)]
    columns["vectors"] = pa.array(vectors, images_schema(DIM).field("vectors").type)
    columns["boxes"] = pa.array(
        [[[0, 0, 1, 1]] * count for count in counts], images_schema(DIM).field("boxes").type
    )
    made = table.create_table(uri, images_schema(DIM))
    rows = pa.table(columns, schema=images_schema(DIM))
    return table.append(made, table.write_fragments(rows, uri))


@pytest.mark.parametrize("count", [100, 2000, 9000])
def test_a_sample_is_even_over_images_and_slots(images, count):
    sample = draw_vectors(images, count)
    assert sample.dtype == np.float32
    assert 0.85 * count <= len(sample) <= count
    assert len(np.unique(sample, axis=0)) == len(sample)
    assert abs(sample[:, 0].mean() - NUM_IMAGES / 2) < NUM_IMAGES / 10
    if count <= 2000:  # few of many: no slot is preferred (means over images with 0 to 40 vectors)
        every = table.take_vectors(images, np.arange(NUM_IMAGES)).vectors
        assert abs(sample[:, 1].mean() - every[:, 1].mean()) < 4


def test_all_there_is_when_more_is_asked(images):
    every = table.take_vectors(images, np.arange(NUM_IMAGES)).vectors.astype(np.float32)
    sample = draw_vectors(images, 10**6)
    np.testing.assert_array_equal(np.unique(sample, axis=0), np.unique(every, axis=0))


def test_deleted_images_leave_no_gap_in_the_sample(images):
    table.delete_images(images, np.arange(0, 700))
    sample = draw_vectors(images, 500)
    assert 0.8 * 500 <= len(sample) <= 500
    assert sample[:, 0].min() >= 700


def test_the_same_table_gives_the_same_sample(images):
    np.testing.assert_array_equal(draw_vectors(images, 300), draw_vectors(images, 300))
