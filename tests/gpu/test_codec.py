"""A codec that was trained on the GPU finds what one of the CPU finds."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index.codec import codec_to_bytes, read_codec, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.search import SegmentSet
from for_ray.index.segment import build_segment

CODECS = ["HR,IVF64,RaBitQ4", "IVF64,SQ8", "RR32,IVF64_HNSW32,RaBitQ2"]
NUM_VECTORS, DIM, RANKED = 12_000, 32, 10


def clustered(count: int, seed: int) -> NDArray[np.float32]:
    directions = np.random.default_rng(0).standard_normal((50, DIM), np.float32)
    rng = np.random.default_rng(seed)
    vectors = directions[rng.integers(50, size=count)] + 0.8 * rng.standard_normal((count, DIM), np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def recall(index: faiss.Index, folder: Path, *, nprobe: int) -> float:
    """Of the 10 nearest vectors, the share that a segment on the codec finds."""
    vectors, queries = clustered(NUM_VECTORS, 1), clustered(200, 2)
    folder.mkdir()
    (folder / "codec.faiss").write_bytes(codec_to_bytes(index))
    ids = np.arange(NUM_VECTORS)
    built = build_segment(folder / "codec.faiss", [(ids, vectors)], folder / "one.faiss", threads=2)
    found = SegmentSet([built.path], nprobe=nprobe).search(queries, RANKED).vector_ids
    right = np.argsort(-(queries @ vectors.T), axis=1)[:, :RANKED]
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(right, found, strict=True)]))


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_of_the_gpu_finds_what_one_of_the_cpu_finds(faiss_device, codec, tmp_path, monkeypatch):
    sample = clustered(NUM_VECTORS, 1)
    plan = plan_index(len(sample), DIM, codec=codec)
    on_gpu = train_codec(sample, plan, threads=2)
    with monkeypatch.context() as without:
        without.setattr(faiss, "get_num_gpus", lambda: 0)
        on_cpu = train_codec(sample, plan, threads=2)
    if faiss_device is not None:  # the lists were found where they should be, in float16 tables
        assert [type(index) for index in faiss_device.given] == [faiss.IndexFlatIP]
        assert faiss_device.given[0].ntotal == plan.nlist
        assert faiss_device.options[0].useFloat16
    for nprobe in (4, 16):
        found = [
            recall(index, tmp_path / f"{name}-{nprobe}", nprobe=nprobe)
            for name, index in (("gpu", on_gpu), ("cpu", on_cpu))
        ]
        assert found[0] == pytest.approx(found[1], abs=0.01)
        assert found[0] > 0.5
    ivf = faiss.extract_index_ivf(on_gpu)
    assert ivf.clustering_index is None  # nothing of the GPU is left in what is written


def test_centroids_of_the_gpu_have_length_one_and_the_file_is_read_without_a_gpu(faiss_device, tmp_path):
    sample = clustered(NUM_VECTORS, 3)
    plan = plan_index(len(sample), DIM, codec="IVF64,SQ8")
    path = tmp_path / "codec.faiss"
    path.write_bytes(codec_to_bytes(train_codec(sample, plan, threads=2)))
    index = read_codec(path)
    centroids = faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, plan.nlist)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-3)
    # Every list has its share: k-means in float16 leaves none of them empty.
    nearest = np.argmax(sample @ centroids.T, axis=1)
    assert np.bincount(nearest, minlength=plan.nlist).min() > 0
