"""An index of planted vectors, made by hand of the real pieces: bundle, Lance table, segments, snapshots."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.index import snapshots, table
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.segment import build_segment
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import Layout, Segment, Snapshot, images_schema, pack_boxes
from for_ray.storage import local_copy, upload, write_bytes


@dataclass(frozen=True)
class Planted:
    """One row of `images.lance`; quarantined where it has an error."""

    uri: str
    vectors: NDArray[np.floating]
    boxes: Sequence[Sequence[float]] = ()
    etag: str | None = ""
    error: str | None = None
    width: int | None = None
    height: int | None = None


def at_cosines(query: NDArray[np.float32], *cosines: float) -> NDArray[np.float32]:
    """Unit vectors [n, D] with these cosines to the unit vector [D]."""
    noise = np.random.default_rng(0).normal(size=(len(cosines), len(query)))
    across = noise - (noise @ query)[:, None] * query
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    cosine = np.array(cosines)[:, None]
    return np.asarray(cosine * query + np.sqrt(1 - cosine**2) * across, np.float32)


def make_tiny_bundle(folder: Path) -> Bundle:
    """A CLIP of 16 dimensions with random weights, its model config written to the folder."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = folder / "model.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return open_bundle(f"open_clip:{path}@random", head="cluster", num_slots=4, allow_untrained=True)


@dataclass
class PlantedIndex:
    """An index that grows by hand; image ids count from 0 in the order in which rows were added."""

    layout: Layout
    bundle: Bundle
    segments: list[Segment] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # vectors of each image
    num_built: int = 0
    codec_path: Path | None = None
    end_image_id: int = 0

    @classmethod
    def make(cls, where: Path | str, bundle: Bundle) -> PlantedIndex:
        """An index without images in a new folder or bucket, its encoder saved."""
        layout = Layout(str(where))
        bundle.save(layout.bundle_uri(bundle.fingerprint))
        return cls(layout, bundle)

    @property
    def uri(self) -> str:
        return self.layout.index_uri

    @property
    def images_uri(self) -> str:
        return self.layout.images_uri(self.bundle.fingerprint)

    def segment_path(self, file_name: str) -> Path:
        """Where the index is a folder."""
        return Path(self._segment_uri(file_name))

    def _segment_uri(self, file_name: str) -> str:
        return self.layout.segment_uri(self.bundle.fingerprint, file_name)

    def add(
        self, images: Sequence[Planted], *, codec: str = "IVF2,Flat", deleted: Sequence[int] = ()
    ) -> None:
        """Append the rows, delete some of the table's, and build a segment of the rows that were appended."""
        first = self.end_image_id
        self.append(images)
        images_table = table.open_table(self.images_uri)
        self._build_segment(images_table, first, codec)
        table.delete_images(images_table, np.array(deleted, np.int64))

    def append(self, images: Sequence[Planted]) -> None:
        """Append rows in one commit, and build nothing."""
        images_table = table.open_table(self.images_uri)
        schema = images_schema(self.bundle.dim)
        if images_table is None:
            images_table = table.create_table(self.images_uri, schema)
        table.append(images_table, table.write_fragments(_rows(images, schema), self.images_uri))
        self.end_image_id += len(images)
        self.counts += [len(image.vectors) for image in images]

    def _build_segment(self, images_table: object, first: int, codec: str) -> None:
        batches = list(table.read_vectors(images_table, first, self.end_image_id, batch_rows=100))
        vectors = np.concatenate([batch.vectors for batch in batches])
        if self.codec_path is None:
            plan = plan_index(len(vectors), self.bundle.dim, codec=codec)
            content = codec_to_bytes(train_codec(vectors.astype(np.float32), plan, threads=1))
            self._codec = codec_record(content, plan, num_trained_on=len(vectors))
            write_bytes(self._segment_uri(self._codec.file_name), content)
            self.codec_path = local_copy(self._segment_uri(self._codec.file_name), sha256=self._codec.sha256)
        segment_id = str(self.num_built)
        self.num_built += 1
        file_name = f"segment-{segment_id}.faiss"
        pairs = [(batch.vector_ids, batch.vectors) for batch in batches]
        with tempfile.TemporaryDirectory() as folder:
            built = build_segment(self.codec_path, pairs, Path(folder) / file_name, threads=1)
            upload(built.path, self._segment_uri(file_name))
        self.segments.append(
            Segment(
                segment_id=segment_id,
                codec_id=self._codec.codec_id,
                file_name=file_name,
                sha256=built.sha256,
                num_bytes=built.num_bytes,
                num_vectors=built.num_vectors,
                first_image_id=first,
                end_image_id=self.end_image_id,
            )
        )

    def _counted(self, segment: Segment, deleted: Sequence[int]) -> Segment:
        inside = [each for each in deleted if segment.first_image_id <= each < segment.end_image_id]
        return segment.model_copy(update={"num_dead": sum(self.counts[each] for each in inside)})

    def publish(
        self, *, deleted: Sequence[int] = (), nprobe: int = 1, fingerprint: str | None = None
    ) -> Snapshot:
        """Publish what the table and the segments hold now."""
        images_table = table.open_table(self.images_uri)
        indexed, quarantined = table.count_images(images_table)
        segments = [self._counted(segment, deleted) for segment in self.segments]
        return snapshots.publish(
            self.layout,
            Snapshot(
                snapshot_id=0,
                created_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
                fingerprint=fingerprint or self.bundle.fingerprint,
                images_version=images_table.version,
                codec=self._codec if self.segments else None,
                segments=segments,
                deleted_image_ids=np.array(deleted, np.int64),
                nprobe=nprobe,
                listed=indexed + quarantined,
                indexed=indexed,
                quarantined=quarantined,
                num_vectors=sum(segment.num_live for segment in segments),
                recall_at_50=None,
            ),
        )


def _rows(images: Sequence[Planted], schema: pa.Schema) -> pa.Table:
    """The rows as a table; the boxes of an image without any are its whole area."""
    whole = (0.0, 0.0, 1.0, 1.0)
    rows = [
        {
            "uri": image.uri,
            "etag": image.etag,
            "width": image.width,
            "height": image.height,
            "error": image.error,
            "vectors": [vector.astype(np.float16) for vector in image.vectors],
            "boxes": [
                pack_boxes(np.array(box)).tolist() for box in image.boxes or [whole] * len(image.vectors)
            ],
        }
        for image in images
    ]
    return pa.Table.from_pylist(rows, schema=schema)
