"""Ids, boxes, uris and records of an index: packing is undone exactly, and says what it refuses."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from for_ray.schema import (
    BOX_SCALE,
    BOXES_TYPE,
    MAX_SLOTS,
    Codec,
    Layout,
    Segment,
    Snapshot,
    image_ids_of,
    images_schema,
    pack_boxes,
    pack_vector_ids,
    slots_of,
    unpack_boxes,
    vectors_type,
)

IMAGE_IDS = st.integers(0, (1 << 55) - 1)
PAIRS = st.lists(st.tuples(IMAGE_IDS, st.integers(0, MAX_SLOTS - 1)), max_size=20)


@given(PAIRS)
@example([(0, 0)])
@example([((1 << 55) - 1, 255), ((1 << 55) - 1, 0)])
def test_vector_ids_are_undone_and_keep_the_order(pairs):
    image_ids, slots = np.array(pairs, np.int64).reshape(-1, 2).T
    vector_ids = pack_vector_ids(image_ids, slots)
    assert vector_ids.dtype == np.int64
    np.testing.assert_array_equal(image_ids_of(vector_ids), image_ids)
    np.testing.assert_array_equal(slots_of(vector_ids), slots)
    assert (vector_ids >= 0).all()
    assert np.argsort(vector_ids, kind="stable").tolist() == sorted(range(len(pairs)), key=lambda i: pairs[i])


def test_vector_ids_are_what_the_design_says():
    assert pack_vector_ids(np.array([3]), np.array([5])).tolist() == [3 * 256 + 5]
    assert image_ids_of(np.array([[-1, 0], [255, 256]])).tolist() == [[-1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("image_id", "slot", "says"),
    [
        (0, 256, "slots must lie in 0..255, got 256..256"),
        (0, -1, "slots must lie in 0..255, got -1..-1"),
        (-1, 0, "image ids must lie in"),
        (1 << 55, 0, "image ids must lie in"),
    ],
)
def test_ids_out_of_range_are_refused(image_id, slot, says):
    with pytest.raises(ValueError, match=says):
        pack_vector_ids(np.array([image_id]), np.array([slot]))


def ordered_boxes():
    """Boxes [n, 4] with x0 < x1 and y0 < y1 by at least a 64th, as encoders make them."""
    corner = st.floats(0, 63 / 64, width=32)
    size = st.floats(1 / 64, 1, width=32)
    one = st.tuples(corner, corner, size, size).map(
        lambda box: [box[0], box[1], min(1, box[0] + box[2]), min(1, box[1] + box[3])]
    )
    return st.lists(one, max_size=10).map(lambda boxes: np.array(boxes, np.float32).reshape(-1, 4))


@given(ordered_boxes())
def test_stored_boxes_hold_the_box_and_little_more(boxes):
    packed = pack_boxes(boxes)
    unpacked = unpack_boxes(packed)
    assert packed.dtype == np.uint8
    assert packed.shape == boxes.shape
    # Outwards, by less than a step; a hundredth of a step is float32's rounding.
    assert (unpacked[:, :2] <= boxes[:, :2] + 0.01 / BOX_SCALE).all()
    assert (unpacked[:, 2:] >= boxes[:, 2:] - 0.01 / BOX_SCALE).all()
    assert (np.abs(unpacked - boxes) < 1.01 / BOX_SCALE).all()
    assert (packed[:, :2] < packed[:, 2:]).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 5), st.just(4))))
def test_stored_boxes_survive_another_round(packed):
    np.testing.assert_array_equal(pack_boxes(unpack_boxes(packed)), packed)


def test_boxes_beyond_the_image_are_cut_off():
    packed = pack_boxes(np.array([[-0.5, 0, 1.5, 1]], np.float32))
    assert packed.tolist() == [[0, 0, 255, 255]]
    assert pack_boxes(np.zeros((2, 0, 4), np.float32)).shape == (2, 0, 4)


def test_the_table_holds_vectors_boxes_and_metadata():
    schema = images_schema(3, pa.schema([pa.field("camera", pa.string(), nullable=False)]))
    assert schema.names == [
        "uri", "etag", "size_bytes", "width", "height", "error", "vectors", "boxes", "encoded_at", "camera"
    ]  # fmt: skip
    assert not schema.field("uri").nullable
    assert schema.field("camera").nullable
    vectors = pa.array([[[1, 2, 3]], []], vectors_type(3))
    assert vectors.type.value_type.list_size == 3
    assert pa.array([[[0, 1, 2, 255]]], BOXES_TYPE).to_pylist() == [[[0, 1, 2, 255]]]


@pytest.mark.parametrize("index_uri", ["/data/index", "s3://bucket/a b/ü", "relative/index"])
def test_layout_is_what_the_design_says(index_uri):
    for written in (index_uri, index_uri + "/", index_uri + "//"):
        layout = Layout(written)
        assert layout.index_uri == index_uri
        assert layout.snapshots_uri == f"{index_uri}/snapshots.lance"
        assert layout.lease_uri == f"{index_uri}/lease.json"
        assert layout.bundle_uri("ab") == f"{index_uri}/encoder-ab/bundle"
        assert layout.images_uri("ab") == f"{index_uri}/encoder-ab/images.lance"
        assert (
            layout.segment_uri("ab", "segment-1.faiss") == f"{index_uri}/encoder-ab/segments/segment-1.faiss"
        )
        assert layout.work_uri("run") == f"{index_uri}/work/run"


def test_records_are_frozen_and_know_their_fields():
    codec = Codec(
        codec_id="c",
        file_name="f",
        sha256="s",
        num_bytes=1,
        factory="IVF1,Flat",
        dim=2,
        nlist=1,
        num_trained_on=1,
    )
    segment = Segment(
        segment_id="s", codec_id="c", file_name="f", sha256="s", num_bytes=1, num_vectors=1,
        first_image_id=0, end_image_id=1,
    )  # fmt: skip
    snapshot = Snapshot(
        snapshot_id=1, created_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), fingerprint="f",
        images_version=1, codec=codec, segments=[segment], deleted_image_ids=[1], nprobe=1, listed=1,
        indexed=1, quarantined=0, num_vectors=1, recall_at_50=None,
    )  # fmt: skip
    assert Snapshot.model_validate_json(snapshot.model_dump_json()) == snapshot
    with pytest.raises(ValidationError, match="frozen"):
        snapshot.listed = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        Codec.model_validate(codec.model_dump() | {"color": "red"})
