"""Segments: exactly the vectors given, however they come in, or nothing."""

from __future__ import annotations

import hashlib
import itertools
import pickle

import faiss
import numpy as np
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.index import segment as segment_module
from for_ray.index.rabitq import encode
from for_ray.index.segment import build_segment
from for_ray.schema import pack_vector_ids


@pytest.fixture
def images(make_images):
    return make_images(150)


@pytest.fixture
def codec_path(images, build):
    return build(images, "IVF8,RaBitQ4").codec_path


def test_what_is_returned_is_what_is_there(images, codec_path, tmp_path):
    path = tmp_path / "segment.faiss"
    written = build_segment(codec_path, [(images.vector_ids, images.vectors)], path, threads=1)
    content = path.read_bytes()
    assert written[:4] == (path, len(images.vectors), len(content), hashlib.sha256(content).hexdigest())
    assert pickle.loads(pickle.dumps(written)) == written
    index = faiss.read_index(str(path))
    ids = np.concatenate(
        [faiss.rev_swig_ptr(index.invlists.get_ids(i), index.get_list_size(i)) for i in range(8)]
    )
    np.testing.assert_array_equal(np.sort(ids), images.vector_ids)
    sizes = np.array([index.get_list_size(i) for i in range(8)])
    assert written.imbalance == pytest.approx(8 * (sizes**2).sum() / len(ids) ** 2)
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("codec", ["IVF8,Flat", "HR,IVF8,RaBitQ4", "IVF8,SQ8"])
def test_batches_chunks_threads_and_precision_make_no_difference(images, build, codec, tmp_path, monkeypatch):
    codec_path = build(images, codec, name="c").codec_path
    ids, vectors = images.vector_ids, images.vectors
    whole = build_segment(codec_path, [(ids, vectors)], tmp_path / "whole", threads=1)
    cuts = [0, 1, 1, 30, 200, len(ids)]
    pieces = [(ids[a:b], vectors[a:b].astype(np.float32)) for a, b in itertools.pairwise(cuts)]
    monkeypatch.setattr(segment_module, "CHUNK_VECTORS", 17)
    assert build_segment(codec_path, pieces, tmp_path / "pieces", threads=2).sha256 == whole.sha256


def test_no_vectors(codec_path, tmp_path):
    for batches in ([], [(np.empty(0, np.int64), np.empty((0, 16), np.float16))]):
        written = build_segment(codec_path, batches, tmp_path / "empty.faiss", threads=1)
        assert (written.num_vectors, written.imbalance) == (0, 1.0)
        assert faiss.read_index(str(written.path)).ntotal == 0


@pytest.mark.parametrize(
    ("value", "says"),
    [(np.nan, "length nan"), (np.inf, "length inf"), (0.0, "length 0"), (0.5, "length 2")],
)
def test_a_vector_that_is_not_of_length_one_is_named(images, codec_path, tmp_path, value, says):
    vectors = images.vectors.copy()
    vectors[17] = value
    image_id, slot = int(images.vector_ids[17]) // 256, int(images.vector_ids[17]) % 256
    path = tmp_path / "segment.faiss"
    with pytest.raises(DataError, match=rf"image {image_id}, slot {slot} has {says}.*\(1 of {len(vectors)} "):
        build_segment(codec_path, [(images.vector_ids, vectors)], path, threads=1)
    assert not path.exists()


def test_float16_rounding_is_no_wrong_length(build, tmp_path, make_images):
    images = make_images(200, dim=1024, max_slots=4)
    built = build(images, "IVF2,Flat")  # would raise
    assert faiss.read_index(str(built.paths[0])).ntotal == len(images.vectors)


def test_an_id_that_comes_twice_is_named(images, codec_path, tmp_path):
    ids, vectors = images.vector_ids, images.vectors
    twice = [(ids, vectors), (ids[40:41], vectors[40:41])]
    with pytest.raises(
        DataError, match=rf"image {int(ids[40]) // 256}, slot {int(ids[40]) % 256} comes twice"
    ):
        build_segment(codec_path, twice, tmp_path / "segment.faiss", threads=1)


def test_wrong_shapes_are_refused(images, codec_path, tmp_path):
    path = tmp_path / "segment.faiss"
    with pytest.raises(ValueError, match=r"\[3, 16\] for the codec, got \[3, 15\]"):
        build_segment(codec_path, [(images.vector_ids[:3], images.vectors[:3, :15])], path, threads=1)
    with pytest.raises(ValueError, match=r"\[2, 16\] for the codec, got \[3, 16\]"):
        build_segment(codec_path, [(images.vector_ids[:2], images.vectors[:3])], path, threads=1)
    with pytest.raises(ValueError, match="must not be negative"):
        build_segment(codec_path, [(np.array([-1]), images.vectors[:1])], path, threads=1)


def test_a_disk_that_refuses_is_a_storage_error(images, codec_path, tmp_path):
    path = tmp_path / "no such folder" / "segment.faiss"
    with pytest.raises(StorageError, match=r"cannot write segment .*no such folder") as caught:
        build_segment(codec_path, [(images.vector_ids, images.vectors)], path, threads=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HR,IVF8,RaBitQ4"])
def test_a_disk_that_gets_full_leaves_no_half_file(images, build, factory, little_space, tmp_path):
    """Whatever is missing: the last byte, ids, codes, or a part of the codec."""
    built = build(images, factory)
    whole, path = built.paths[0].read_bytes(), tmp_path / "segment.faiss"
    batches = [(images.vector_ids, images.vectors)]
    for num_bytes in (len(whole) - 1, len(whole) - 300, len(whole) // 2, 100):
        with (
            little_space(num_bytes),
            pytest.raises(
                StorageError, match=r"^cannot write segment .*/segment\.faiss: .*File too large; free"
            ),
        ):
            build_segment(built.codec_path, batches, path, threads=1)
        assert list(tmp_path.glob("segment*")) == []
    with little_space(len(whole)):
        build_segment(built.codec_path, batches, path, threads=1)
    assert path.read_bytes() == whole


def test_the_last_slot_is_kept(images, codec_path, tmp_path):
    ids = pack_vector_ids(np.array([7]), np.array([255]))
    written = build_segment(codec_path, [(ids, images.vectors[:1])], tmp_path / "one", threads=1)
    index = faiss.read_index(str(written.path))
    index.nprobe = 8
    assert index.search(images.vectors[:1].astype(np.float32), 1)[1].item() == 7 * 256 + 255


@pytest.mark.parametrize("factory", ["HR,IVF8,RaBitQ4", "IVF8,RaBitQ2"])
def test_codes_of_several_bits_are_encoded_in_blocks(factory, images, build):
    built = build(images, factory)
    index = faiss.read_index(str(built.paths[0]))
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    vectors = images.vectors.astype(np.float32)
    if factory.startswith("HR"):
        vectors = index.chain.at(0).apply(vectors)
    lists = ivf.quantizer.assign(vectors, 1).ravel()
    expected = encode(vectors, ivf.quantizer.reconstruct_batch(lists), bits=ivf.rabitq.nb_bits, threads=1)

    for number in range(8):
        num_codes = ivf.invlists.list_size(number)
        codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), num_codes * ivf.code_size)
        assert np.array_equal(codes.reshape(num_codes, ivf.code_size), expected[lists == number])
    assert index.ntotal == len(vectors)
