"""The codec: the same from the same sample, and refused where it can't be trained."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from for_ray.errors import ConfigError, DataError
from for_ray.index.codec import codec_record, codec_to_bytes, read_codec, train_codec
from for_ray.index.plan import plan_index

CODECS = ["IVF8,Flat", "HR,IVF8,RaBitQ4", "IVF8_HNSW8,SQ8"]


@pytest.fixture
def sample(make_images):
    return make_images(200).vectors.astype(np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_is_trained_empty_and_compares_by_inner_product(sample, codec, tmp_path):
    plan = plan_index(len(sample), 16, codec=codec)
    path = tmp_path / "codec.faiss"
    path.write_bytes(codec_to_bytes(train_codec(sample, plan, threads=1)))
    index = read_codec(path)
    assert index.is_trained
    assert (index.ntotal, index.d, index.metric_type) == (0, 16, faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_sample_gives_the_same_codec_for_any_number_of_threads(sample, codec):
    plan = plan_index(len(sample), 16, codec=codec)
    records = [
        codec_record(
            codec_to_bytes(train_codec(sample, plan, threads=threads)), plan, num_trained_on=len(sample)
        )
        for threads in (1, 1, 2)
    ]
    assert records[0] == records[1] == records[2]
    assert records[0].file_name == f"codec-{records[0].codec_id}.faiss"
    assert records[0].sha256.startswith(records[0].codec_id)
    other = codec_to_bytes(train_codec(sample[::-1][:150], plan, threads=1))
    assert codec_record(other, plan, num_trained_on=150).codec_id != records[0].codec_id


def test_lists_are_spherical_clusters(sample):
    plan = plan_index(len(sample), 16, codec="IVF8,Flat")
    index = train_codec(sample, plan, threads=1)
    centroids = faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, 8)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-5)


def test_faiss_does_not_warn(sample, capfd):
    plan = plan_index(len(sample), 16, codec="IVF8,Flat")
    train_codec(sample[:40], plan, threads=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("num_vectors", [1, 2, 40])
def test_tiny_samples(num_vectors, sample):
    plan = plan_index(num_vectors, 16)
    assert train_codec(sample[:num_vectors], plan, threads=1).is_trained


def test_equal_vectors(sample):
    equal = np.repeat(sample[:1], 400, axis=0)
    assert train_codec(equal, plan_index(400, 16), threads=1).is_trained


def test_fewer_vectors_than_lists_are_refused(sample):
    plan = plan_index(len(sample), 16, codec="IVF8,Flat")
    with pytest.raises(ConfigError, match="needs at least 8 training vectors, got 7"):
        train_codec(sample[:7], plan, threads=1)


def test_too_few_vectors_for_a_codebook_are_refused_in_one_line(sample):
    plan = plan_index(100, 16, codec="IVF,PQ4")
    with pytest.raises(ConfigError, match="'IVF2,PQ4' cannot be trained on 100 vectors") as caught:
        train_codec(sample[:100], plan, threads=1)
    assert "\n" not in str(caught.value)


def test_nan_and_wrong_shapes_are_refused(sample):
    plan = plan_index(len(sample), 16)
    bad = sample.copy()
    bad[3, 5] = np.nan
    with pytest.raises(DataError, match="NaN"):
        train_codec(bad, plan, threads=1)
    with pytest.raises(ValueError, match=r"\[n, 16\], got \[5, 15\]"):
        train_codec(sample[:5, :15], plan, threads=1)
    with pytest.raises(ValueError, match=r"\[n, 16\], got \[16\]"):
        train_codec(sample[0], plan, threads=1)


def test_read_refuses_what_is_no_codec(make_images, build, tmp_path):
    with pytest.raises(DataError, match="is no file"):
        read_codec(tmp_path / "none.faiss")
    with pytest.raises(DataError, match=r"holds \d+ vectors; expected a trained, empty codec"):
        read_codec(build(make_images(100)).paths[0])
    untrained = tmp_path / "untrained.faiss"
    faiss.write_index(faiss.index_factory(4, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT), str(untrained))
    with pytest.raises(DataError, match="is not trained"):
        read_codec(untrained)
    (tmp_path / "text.faiss").write_text("not an index")
    with pytest.raises(DataError, match="not a whole FAISS inverted file") as caught:
        read_codec(tmp_path / "text.faiss")
    assert "\n" not in str(caught.value)
