"""Recall is measured with texts and with what the index's images hold; the worse of the two counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import StageError
from for_ray.evaluation.exact import exact_top_images
from for_ray.index import table
from for_ray.index.codec import codec_to_bytes, train_codec
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


@pytest.fixture
def measure(layout, tmp_path, monkeypatch):
    """Measures an index of these vectors, each an image, in so many segments of one codec."""

    def exact(job, ranges, queries):
        parts = list(verify._read(job.open_table(), ranges))
        found = list(exact_top_images(parts, queries, verify.RANKED + 1)[0])
        compared.append(sum(len(part.vectors) for part in parts))
        return verify._Exact(found, compared[-1])

    compared: list[int] = []
    monkeypatch.setattr(verify, "_exact", exact)

    def make(vectors: np.ndarray, queries: np.ndarray, codec: str, *, num_segments: int = 1):
        images = add(table.create_table(layout.images_uri("f"), SCHEMA), vectors, [1] * len(vectors))
        plan = plan_index(len(vectors), DIM, codec=codec)
        content = codec_to_bytes(train_codec(vectors.astype(np.float32), plan, threads=1))
        (tmp_path / "codec").write_bytes(content)
        (tmp_path / "encoder-f" / "segments").mkdir()
        edges = [len(vectors) * number // num_segments for number in range(num_segments + 1)]
        segments = []
        for first, end in itertools.pairwise(edges):
            path = Path(layout.segment_uri("f", f"{first}.faiss"))
            batch = (np.arange(first, end) * 256, vectors[first:end])
            built = build_segment(tmp_path / "codec", [batch], path, threads=1)
            named = {"file_name": path.name, "sha256": built.sha256, "num_vectors": end - first}
            segments.append(span(first, end, **named))
        job = RangeJob(layout.index_uri, "f", table.version_of(images), "run")
        given = {"deleted": np.empty(0, np.int64), "nprobe": 1, "cache_path": tmp_path / "cache"}
        cluster = SimpleNamespace(resources={})
        return lambda **more: verify.measure_recall(cluster, job, segments, queries, **given | more), compared

    return make


def test_images_need_more_lists_than_the_texts_do(measure, monkeypatch):
    random = np.random.default_rng(1)
    alike, others = 0.001 * random.standard_normal((60, DIM)), random.standard_normal((2000, DIM))
    alike[:, 0], others[:, 0] = 1, 0
    vectors = unit(np.concatenate([alike, others]))
    run, _ = measure(vectors, np.eye(DIM, dtype=np.float32)[:1], "IVF32,Flat")
    measured = run(target=0.95)
    assert measured.nprobe > 1
    assert measured.recall >= 0.95
    monkeypatch.setattr(verify, "_draw_examples", lambda *_: (np.empty((0, DIM)), np.empty(0, np.int64)))
    assert run(target=0.95) == (1.0, 1, 0.95)


@pytest.mark.parametrize("num_segments", [1, 3])
def test_a_sample_says_what_the_whole_says(measure, monkeypatch, num_segments):
    """A quarter of the images: of 50 images about 12 lie in it, and take as many lists."""
    random = np.random.default_rng(2)
    vectors = unit(random.standard_normal((20_000, DIM)))
    queries = unit(random.standard_normal((100, DIM))).astype(np.float32)
    run, compared = measure(vectors, queries, "IVF64,Flat", num_segments=num_segments)
    whole = [run(target=0.0, nprobe=nprobe) for nprobe in (2, 8, 24)]
    monkeypatch.setattr(verify, "SAMPLED_VECTORS", 5000)
    sampled = [run(target=0.0, nprobe=nprobe) for nprobe in (2, 8, 24)]
    assert compared[:3] == [20_000] * 3
    assert 4900 <= compared[3] <= 5100
    for one, other in zip(whole, sampled, strict=True):
        assert one.recall == pytest.approx(other.recall, abs=0.05)
    assert 0.2 < whole[0].recall < 0.6 < whole[2].recall < 0.99
    assert run(target=0.8).nprobe == 16


def test_images_that_are_alike_lie_side_by_side(measure, monkeypatch):
    """As frames of a video do: of a few long pieces, most images' neighbours would be missing as a whole."""
    random = np.random.default_rng(2)
    centres = np.repeat(random.standard_normal((100, DIM)), 200, axis=0)
    vectors = unit(centres + 0.35 * random.standard_normal(centres.shape))
    queries = unit(random.standard_normal((100, DIM))).astype(np.float32)
    run, _ = measure(vectors, queries, "IVF64,Flat")
    whole = run(target=0.0, nprobe=2)
    monkeypatch.setattr(verify, "SAMPLED_VECTORS", 5000)
    assert run(target=0.0, nprobe=2).recall == pytest.approx(whole.recall, abs=0.07)


def test_a_sample_is_drawn_of_several_pieces_of_each_segment(monkeypatch):
    monkeypatch.setattr(verify, "SAMPLED_VECTORS", 1000)
    monkeypatch.setattr(verify, "IMAGES_OF_A_PIECE", 1000)
    segments = [span(0, 800, num_vectors=900), span(800, 1200, num_vectors=400)]  # 1000 of 1300
    sample = verify._draw_sample(segments)
    pieces = {(100 * number, 100 * number + 77) for number in range(8)}
    assert set(sample.ranges) == pieces | {(800 + 50 * number, 838 + 50 * number) for number in range(8)}
    assert len(sample.ranges) == 16
    ids = [number for edges in sorted(sample.ranges) for number in range(*edges)]
    assert sample.image_ids.tolist() == ids
    monkeypatch.setattr(verify, "IMAGES_OF_A_PIECE", 20)
    assert verify._draw_sample(segments[:1] * 2).ranges[:2] == [(0, 19), (34, 53)]
    few = verify._draw_sample(segments[1:])
    assert (few.image_ids, few.ranges) == (None, [(800, 1200)])


def test_a_sample_of_short_segments_has_an_image_of_each_piece(monkeypatch):
    monkeypatch.setattr(verify, "SAMPLED_VECTORS", 1)
    assert verify._draw_sample([span(5, 8, num_vectors=600)]).ranges == [(5, 6), (6, 7), (7, 8)]


def test_a_sample_without_a_living_image_says_nothing(measure, monkeypatch):
    """What is drawn are ids, and of images that are gone these are holes."""
    vectors = unit(np.random.default_rng(3).standard_normal((400, DIM)))
    run, compared = measure(vectors, np.eye(DIM, dtype=np.float32)[:2], "IVF4,Flat")
    holes = verify._Sample([span(0, 400)], [(400, 500)], np.arange(400, 500))
    monkeypatch.setattr(verify, "_draw_sample", lambda segments: holes._replace(segments=segments))
    assert run(target=0.9) == (None, 1, 0.9)
    assert compared == [0]


def test_what_could_not_be_read_at_all_is_told_apart_from_what_was_not_there(layout):
    images = table.create_table(layout.images_uri("f"), SCHEMA)
    counts = {"num_quarantined": 0, "num_skipped": 7, "num_denied": 5, "num_listed": 100}
    verify.check_readable(images, **counts, most=0.07)
    told = r"7 of 100 .* Worst: 2 × not there, or not as listed; 5 × could not be read, nor .*AWS_ENDPOINT"
    with pytest.raises(StageError, match=told):
        verify.check_readable(images, **counts, most=0.05)


def test_a_task_takes_many_pieces_and_reads_what_is_left_of_them(layout, monkeypatch):
    monkeypatch.setattr(verify, "IMAGES_A_TASK", 100)
    pieces = [(0, 250), *[(low, low + 16) for low in range(300, 460, 40)]]
    shares = verify._share_out(pieces)
    assert shares == [[(0, 83)], [(83, 166)], [(166, 250), (300, 316)], pieces[2:]]
    vectors = unit(np.random.default_rng(0).standard_normal((500, DIM)))
    images = add(table.create_table(layout.images_uri("f"), SCHEMA), vectors, [1] * 500)
    table.delete_images(images, np.arange(310, 350))
    job = RangeJob(layout.index_uri, "f", table.version_of(table.open_table(images.uri)), "run")
    monkeypatch.setattr(verify, "IMAGES_A_READ", 32)
    for share in shares:
        ids = np.concatenate([np.arange(*edges) for edges in share])
        ids = ids[(ids < 310) | (ids >= 350)]
        part = table.ImageVectors(ids, np.arange(len(ids) + 1), vectors[ids])
        found = verify._exact_of_ranges(job, share, np.eye(DIM, dtype=np.float32)[:3])
        right = exact_top_images([part], np.eye(DIM, dtype=np.float32)[:3], verify.RANKED + 1)
        assert (found[0].tolist(), found[1].tolist(), found[2]) == (*map(np.ndarray.tolist, right), len(ids))
