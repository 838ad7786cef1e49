"""What lies in an index: ids, columns, file names and the record of a published snapshot.

    <index>/encoder-<fingerprint>/bundle/        the encoder; enough to search
    <index>/encoder-<fingerprint>/images.lance   one row an image
    <index>/encoder-<fingerprint>/segments/      codec-<id>.faiss, segment-<id>.faiss
    <index>/snapshots.lance                      one row a published snapshot
    <index>/lease.json                           who writes now
    <index>/work/<run>/                          what a run hands to its workers; removed when it ends

Stages never import each other: they meet through what stands here. Image id = row id of `images.lance`
(stable: it survives deletes and compaction); vector id = image id × 256 + slot, where a slot counts the
vectors that are *stored* for the image. Only this module packs and unpacks them.
"""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

MAX_SLOTS = 256
"""Slots that a vector id has room for; an encoder with more is refused."""

BOX_SCALE = 255
"""Boxes are stored as x0, y0, x1, y1 in 1/255 of the image's width and height."""

LISTING_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size_bytes", pa.int64())])
"""One object of a bucket. `size_bytes` may be null; columns behind these three are the user's metadata."""


def pack_vector_ids(image_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Vector ids [n] from image ids [n] and slots [n].

    Raises:
        ValueError: A slot is outside 0..255, or an image id is negative or has more than 55 bits.
    """
    image_ids, slots = np.asarray(image_ids, np.int64), np.asarray(slots, np.int64)
    if slots.size and (slots.min() < 0 or slots.max() >= MAX_SLOTS):
        raise ValueError(f"slots must lie in 0..{MAX_SLOTS - 1}, got {slots.min()}..{slots.max()}")
    if image_ids.size and (image_ids.min() < 0 or image_ids.max() >= 1 << 55):
        raise ValueError(f"image ids must lie in 0..2^55-1, got {image_ids.min()}..{image_ids.max()}")
    return image_ids * MAX_SLOTS + slots


def image_ids_of(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The image id of each vector id; any shape; FAISS's "nothing found" (-1) stays -1."""
    return np.asarray(vector_ids, np.int64) >> 8


def slots_of(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The slot of each vector id, 0..255; any shape."""
    return np.asarray(vector_ids, np.int64) & (MAX_SLOTS - 1)


def pack_boxes(boxes: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Boxes [..., 4] as fractions x0, y0, x1, y1 -> uint8; rounded outwards, so that none gets empty."""
    scaled = np.clip(np.asarray(boxes, np.float32), 0.0, 1.0) * BOX_SCALE
    low, high = np.floor(scaled[..., :2] + 1e-3), np.ceil(scaled[..., 2:] - 1e-3)
    return np.concatenate([low, high], axis=-1).astype(np.uint8)


def unpack_boxes(boxes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Stored boxes [..., 4] -> fractions x0, y0, x1, y1 of width and height, float32."""
    return np.asarray(boxes, np.float32) / np.float32(BOX_SCALE)


def vectors_type(dim: int) -> pa.DataType:
    """The column of an image's embeddings: list of [D] float16, unit length; empty where `error` is set."""
    return pa.list_(pa.list_(pa.float16(), dim))


BOXES_TYPE = pa.list_(pa.list_(pa.uint8(), 4))
"""The column of an image's boxes, one for each stored vector, in `BOX_SCALE` units."""


def images_schema(dim: int, metadata: pa.Schema | None = None) -> pa.Schema:
    """The columns of `images.lance`, then the user's metadata columns of the manifest (all nullable)."""
    fields = [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("error", pa.string()),
        pa.field("vectors", vectors_type(dim)),
        pa.field("boxes", BOXES_TYPE),
        pa.field("encoded_at", pa.timestamp("us", tz="UTC")),
    ]
    return pa.schema(fields + [field.with_nullable(True) for field in metadata or []])


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Record):
    """One immutable FAISS file: the vectors of the images with `first_image_id` <= id < `end_image_id`."""

    segment_id: str
    codec_id: str
    file_name: str
    sha256: str
    num_bytes: int
    num_vectors: int
    first_image_id: int
    end_image_id: int


class Codec(_Record):
    """The trained, empty FAISS index that all segments of a snapshot share.

    `wanted` is the factory string that the user asked for; None where the plan chose.
    """

    codec_id: str
    file_name: str
    sha256: str
    num_bytes: int
    factory: str
    dim: int
    nlist: int
    num_trained_on: int
    wanted: str | None = None


class Snapshot(_Record):
    """What searches see: one published state of an index."""

    snapshot_id: int
    created_at: datetime.datetime
    fingerprint: str
    images_version: int
    codec: Codec | None
    segments: list[Segment]
    deleted_image_ids: list[int]
    nprobe: int
    listed: int
    indexed: int
    quarantined: int
    num_vectors: int
    recall_at_50: float | None


class Layout:
    """The uris inside an index. Pure text: nothing is read or made.

    Args:
        index_uri: A folder or `s3://bucket/prefix`; a slash at the end is dropped.
    """

    def __init__(self, index_uri: str) -> None:
        self.index_uri = index_uri.rstrip("/")

    @property
    def snapshots_uri(self) -> str:
        """The table of published snapshots."""
        return f"{self.index_uri}/snapshots.lance"

    @property
    def lease_uri(self) -> str:
        """The lease that lets one run write."""
        return f"{self.index_uri}/lease.json"

    def encoder_uri(self, fingerprint: str) -> str:
        """Everything that one encoder made."""
        return f"{self.index_uri}/encoder-{fingerprint}"

    def bundle_uri(self, fingerprint: str) -> str:
        """The encoder itself."""
        return f"{self.encoder_uri(fingerprint)}/bundle"

    def images_uri(self, fingerprint: str) -> str:
        """The table of encoded images."""
        return f"{self.encoder_uri(fingerprint)}/images.lance"

    def segment_uri(self, fingerprint: str, file_name: str) -> str:
        """A segment or a codec."""
        return f"{self.encoder_uri(fingerprint)}/segments/{file_name}"

    def work_uri(self, run_id: str) -> str:
        """What a run hands to its workers."""
        return f"{self.index_uri}/work/{run_id}"
