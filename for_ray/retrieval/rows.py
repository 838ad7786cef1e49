"""Rows of the table of images, by image id, at the version that a snapshot names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.index.conjunction import ImageObjects
from for_ray.index.search import ImageVectors
from for_ray.index.table import unpack_vectors
from for_ray.schema import unpack_boxes
from for_ray.sheet import Box
from for_ray.storage.refusals import lance_refusals

SAMPLE_IMAGES = 512
"""Images that stand for the index where it is asked what scores a name has there."""

SHOWN = ("uri", "etag", "width", "height")
"""Columns that say which image a hit is."""

REMEDY = "check credentials and endpoint, or search a newer snapshot"
"""What to do where the table refuses: an old snapshot may have been swept."""


@dataclass(frozen=True)
class StoredImage:
    """One image as a snapshot holds it.

    Attributes:
        image_id: Its row id in `images.lance`.
        uri: Where it lies.
        etag: The state of it that was encoded, for `storage.read_image`; may be empty.
        width: Of the upright image in pixels; None where it is not known.
        height: Likewise.
    """

    image_id: int
    uri: str
    etag: str
    width: int | None
    height: int | None


@dataclass(frozen=True)
class StoredObjects:
    """What a snapshot holds of one image.

    Attributes:
        image: Which.
        boxes: Of its slots, in their order: x0, y0, x1, y1 as fractions of the upright image.
        columns: What else the table says of it, the manifest's columns among them.
    """

    image: StoredImage
    boxes: tuple[Box, ...]
    columns: Mapping[str, Any]


def find_image(images: Any, image_id: int) -> StoredImage | None:
    """The image with this id; None where the table does not hold it, or only why it could not be encoded."""
    rows = take_rows(images, np.array([image_id]), [*SHOWN, "error"]).to_pylist()
    return _stored(rows[0]) if rows and rows[0]["error"] is None else None


def find_objects(images: Any, image_id: int) -> StoredObjects | None:
    """As `find_image`, with what it shows."""
    names = [name for name in images.schema.names if name != "vectors"]
    rows = take_rows(images, np.array([image_id]), names).to_pylist()
    if not rows or rows[0]["error"] is not None:
        return None
    row = rows[0]
    boxes = unpack_boxes(np.array(row["boxes"], np.uint8).reshape(-1, 4)).tolist()
    columns = {name: row[name] for name in names if name not in {*SHOWN, "boxes", "error"}}
    return StoredObjects(_stored(row), tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes), columns)


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


def _stored(row: Mapping[str, Any]) -> StoredImage:
    return StoredImage(row["_rowid"], row["uri"], row["etag"] or "", row["width"], row["height"])


def sample_vectors(images: Any) -> ImageVectors:
    """The vectors of `SAMPLE_IMAGES` images, evenly drawn, the same ones of the same version."""
    with lance_refusals(images.uri, remedy=REMEDY):
        num_rows = images.count_rows()
        drawn = np.random.default_rng(0).choice(num_rows, min(SAMPLE_IMAGES, num_rows), replace=False)
        rows = images.take(np.sort(drawn).tolist(), columns=["vectors"])
    return unpack_vectors(pa.chunked_array([np.sort(drawn)]), rows["vectors"])
