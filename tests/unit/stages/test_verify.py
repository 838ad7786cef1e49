"""Recall is measured with texts and with what the index's images hold; the worse of the two counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from for_ray.evaluation.exact import exact_top_images
from for_ray.index import table
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.segment import build_segment
from for_ray.schema import Layout, Segment, images_schema
from for_ray.stages import verify
from for_ray.stages.ranges import RangeJob

DIM = 16
SCHEMA = images_schema(DIM)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def add(images, vectors: np.ndarray, counts: list[int]):
    columns = {field.name: pa.nulls(len(counts), field.type) for field in SCHEMA}
    columns["uri"] = pa.array([str(number) for number in range(len(counts))])
    parts = np.split(vectors, np.cumsum(counts)[:-1])
    columns["vectors"] = pa.array([list(part) for part in parts], SCHEMA.field("vectors").type)
    columns["boxes"] = pa.array([[[0, 0, 1, 1]] * count for count in counts], SCHEMA.field("boxes").type)
    return table.append(images, table.write_fragments(pa.table(columns, schema=SCHEMA), images.uri))


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout(str(tmp_path))


def span(first: int, end: int, **more) -> Segment:
    given = {"segment_id": "s", "codec_id": "c", "file_name": "s.faiss", "sha256": "0", "num_bytes": 1}
    return Segment(**given | {"num_vectors": 1, "first_image_id": first, "end_image_id": end} | more)


def test_examples_are_vectors_of_living_images_all_over_the_segments(layout):
    vectors = unit(np.random.default_rng(0).standard_normal((2000, DIM)))
    counts = [0 if number % 4 == 0 else 2 for number in range(1000)] + [500]  # the last image fills up
    images = add(table.create_table(layout.images_uri("f"), SCHEMA), vectors, counts)
    table.delete_images(images, np.arange(500, 600))
    images = table.open_table(images.uri)
    found, owners = verify._draw_examples(images, [span(0, 400), span(500, 900)])
    assert len(found) == len(owners) == len(np.unique(owners)) == verify.NUM_EXAMPLES
    assert {int(owner) // 100 for owner in owners} == {0, 1, 2, 3, 6, 7, 8}
    drawn = table.take_vectors(images, owners)
    assert (np.diff(drawn.offsets) == 2).all()
    slots = np.arange(len(owners)) % 2
    assert found.tolist() == drawn.vectors[drawn.offsets[:-1] + slots].astype(np.float32).tolist()


def test_images_need_more_lists_than_the_texts_do(layout, tmp_path, monkeypatch):
    random = np.random.default_rng(1)
    alike, others = 0.001 * random.standard_normal((60, DIM)), random.standard_normal((2000, DIM))
    alike[:, 0], others[:, 0] = 1, 0
    vectors = unit(np.concatenate([alike, others]))
    images = add(table.create_table(layout.images_uri("f"), SCHEMA), vectors, [1] * len(vectors))
    plan = plan_index(len(vectors), DIM, codec="IVF32,Flat")
    content = codec_to_bytes(train_codec(vectors.astype(np.float32), plan, threads=1))
    (tmp_path / "codec").write_bytes(content)
    ids = np.arange(len(vectors)) * 256
    folder = tmp_path / "encoder-f" / "segments"
    folder.mkdir()
    built = build_segment(tmp_path / "codec", [(ids, vectors)], folder / "s.faiss", threads=1)
    record = codec_record(content, plan, num_trained_on=1)
    segment = span(0, len(vectors), sha256=built.sha256, num_vectors=len(vectors), codec_id=record.codec_id)
    job = RangeJob(layout.index_uri, "f", table.version_of(images), "run")

    def exact(job, segments, queries):
        batches = table.read_vectors(job.open_table(), 0, len(vectors), batch_rows=512)
        return list(exact_top_images(batches, queries, verify.RANKED + 1)[0])

    monkeypatch.setattr(verify, "_exact", exact)
    text = np.eye(DIM, dtype=np.float32)[:1]
    given = {"deleted": np.empty(0, np.int64), "nprobe": 1, "cache_path": tmp_path / "cache"}
    cluster = SimpleNamespace(resources={})
    measured = verify.measure_recall(cluster, job, [segment], text, target=0.95, **given)
    assert measured.nprobe > 1
    assert measured.recall >= 0.95
    monkeypatch.setattr(verify, "_draw_examples", lambda *_: (np.empty((0, DIM)), np.empty(0, np.int64)))
    assert verify.measure_recall(cluster, job, [segment], text, target=0.95, **given) == (1.0, 1, 0.95)
