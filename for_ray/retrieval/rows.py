"""Rows of the table of images, by image id, at the version that a snapshot names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.index.conjunction import ImageObjects
from for_ray.index.search import ImageVectors
from for_ray.index.table import unpack_vectors
from for_ray.storage.refusals import lance_refusals

SAMPLE_IMAGES = 512
"""Images that stand for the index where it is asked what scores a name has there."""

REMEDY = "check credentials and endpoint, or search a newer snapshot"
"""What to do where the table refuses: an old snapshot may have been swept."""


def take_vectors(images: Any, image_ids: NDArray[np.int64]) -> ImageVectors:
    """The stored vectors of these images; those that the table does not hold are left out."""
    rows = take_rows(images, image_ids, ["vectors"])
    return unpack_vectors(rows["_rowid"], rows["vectors"])


def take_objects(images: Any, image_ids: NDArray[np.int64]) -> ImageObjects:
    """As `take_vectors`, with the boxes."""
    return objects_of(take_rows(images, image_ids, ["vectors", "boxes"]))


def objects_of(rows: pa.Table) -> ImageObjects:
    """Vectors and boxes of rows that have both columns and `_rowid`."""
    found = unpack_vectors(rows["_rowid"], rows["vectors"])
    boxes = rows["boxes"].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    return ImageObjects(*found, boxes.reshape(-1, 4))


def take_rows(images: Any, image_ids: NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Columns of these images and `_rowid`, in no order; those that the table does not hold are left out."""
    ids = ", ".join(map(str, image_ids.tolist())) or "-1"
    with lance_refusals(images.uri, remedy=REMEDY):
        # With stable row ids, Lance turns this filter into a look-up: 0.05 s for 5,000 of 800,000 rows.
        return images.to_table(columns=[*columns, "_rowid"], filter=f"_rowid in ({ids})")


def sample_vectors(images: Any) -> ImageVectors:
    """The vectors of `SAMPLE_IMAGES` images, evenly drawn, the same ones of the same version."""
    with lance_refusals(images.uri, remedy=REMEDY):
        num_rows = images.count_rows()
        drawn = np.random.default_rng(0).choice(num_rows, min(SAMPLE_IMAGES, num_rows), replace=False)
        rows = images.take(np.sort(drawn).tolist(), columns=["vectors"])
    return unpack_vectors(pa.chunked_array([np.sort(drawn)]), rows["vectors"])
