"""Our RaBitQ codes against FAISS's own, against the definition, and against the best scale there is."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index import rabitq as rabitq_module
from for_ray.index.rabitq import add_encoded, encode, encodes

SHAPES = [(256, 4), (256, 3), (64, 2), (100, 5), (37, 6), (16, 7), (5, 8), (24, 9), (7, 2)]
NUM_LISTS = 11


def _vectors(num: int, dim: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around 20 directions."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((20, dim))
    vectors = directions[random.integers(20, size=num)] + 0.5 * random.standard_normal((num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _index(vectors: NDArray[np.float32], bits: int) -> faiss.IndexIVFRaBitQ:
    index = faiss.index_factory(vectors.shape[1], f"IVF{NUM_LISTS},RaBitQ{bits}", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    return index


def _centroids(index: faiss.IndexIVFRaBitQ, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return index.quantizer.reconstruct_batch(index.quantizer.assign(vectors, 1).ravel())


def _parts(codes: NDArray[np.uint8], dim: int, bits: int) -> tuple[NDArray[np.float64], ...]:
    """Of each code the odd half steps [n, d], the signs' factors [n, 3] and the steps' [n, 2]."""
    signs_end = -(-dim // 8)
    steps_end = signs_end + 12 + -(-dim * (bits - 1) // 8)
    signs = np.unpackbits(codes[:, :signs_end], axis=1, count=dim, bitorder="little")
    each = np.unpackbits(
        codes[:, signs_end + 12 : steps_end], axis=1, count=dim * (bits - 1), bitorder="little"
    ).reshape(len(codes), dim, bits - 1)
    values = (each << np.arange(bits - 1)).sum(axis=2) + (signs.astype(np.int64) << (bits - 1))
    steps = values - (2 ** (bits - 1) - 0.5)
    signs_factors = np.ascontiguousarray(codes[:, signs_end : signs_end + 12]).view(np.float32)
    factors = np.ascontiguousarray(codes[:, steps_end:]).view(np.float32)
    return steps, signs_factors.astype(np.float64), factors.astype(np.float64)


def _cosines(steps: NDArray[np.float64], residuals: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(steps, axis=1) * np.linalg.norm(residuals, axis=1)
    return (steps * residuals).sum(axis=1) / lengths


def _best_cosines(residuals: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """By 3,000 scales each."""
    sizes = np.abs(residuals.astype(np.float64))
    last = 2 ** (bits - 1) - 1
    best = np.zeros(len(sizes))
    for factor in np.geomspace(0.5, 6, 3000):
        scale = factor * (last + 1) / sizes.max(axis=1, keepdims=True)
        steps = np.minimum(np.floor(sizes * scale), last) + 0.5
        best = np.maximum(best, _cosines(steps, sizes))
    return best


@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_everything_but_the_steps_is_as_faiss_writes_it(dim: int, bits: int) -> None:
    vectors = _vectors(500, dim)
    index = _index(vectors, bits)

    ours = encode(vectors, _centroids(index, vectors), bits=bits, threads=1)

    theirs = index.sa_encode(vectors)[:, index.coarse_code_size() :]
    steps, signs_factors, factors = _parts(ours, dim, bits)
    their_steps, their_signs_factors, their_factors = _parts(theirs, dim, bits)
    assert ours.shape == theirs.shape == (500, index.code_size)
    assert np.array_equal(steps > 0, their_steps > 0)
    assert np.allclose(signs_factors, their_signs_factors, atol=1e-5)
    assert np.allclose(factors[:, 0], their_factors[:, 0], atol=1e-5)


@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_faiss_scores_a_code_by_its_steps(dim: int, bits: int) -> None:
    vectors, queries = _vectors(300, dim), _vectors(7, dim, seed=1)
    index = _index(vectors, bits)
    centroids = _centroids(index, vectors)
    codes = encode(vectors, centroids, bits=bits, threads=1)

    add_encoded(index, vectors, np.arange(300), threads=1)
    index.nprobe = NUM_LISTS
    found = index.search(queries, 300)

    steps, _, _ = _parts(codes, dim, bits)
    residuals = (vectors - centroids).astype(np.float64)
    # The direction of the code, so long that <code, residual> = |residual|².
    lengths = (residuals**2).sum(axis=1) / (steps * residuals).sum(axis=1)
    expected = queries @ centroids.T + (centroids * residuals).sum(axis=1)
    expected = expected + ((queries[:, None] - centroids[None]) * (steps * lengths[:, None])[None]).sum(
        axis=2
    )
    for scores, ids, row in zip(*found, expected, strict=True):
        assert np.allclose(scores, row[ids], atol=1e-4)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.005), (3, 0.005), (4, 0.006), (6, 0.02), (8, 0.03)])
def test_a_code_is_nearly_as_near_as_the_best_scale_makes_it(bits: int, share: float) -> None:
    residuals = np.random.default_rng(2).standard_normal((200, 256)).astype(np.float32)

    codes = encode(residuals, np.zeros_like(residuals), bits=bits, threads=1)

    error = 1 - _cosines(_parts(codes, 256, bits)[0], residuals)
    least = 1 - _best_cosines(residuals, bits)
    assert error.mean() <= (1 + share) * least.mean()


def test_codes_of_four_bits_are_nearer_than_faiss_own() -> None:
    vectors = _vectors(1000, 256)
    index = _index(vectors, 4)
    centroids = _centroids(index, vectors)

    ours = encode(vectors, centroids, bits=4, threads=1)

    theirs = index.sa_encode(vectors)[:, index.coarse_code_size() :]
    errors = [1 - _cosines(_parts(codes, 256, 4)[0], vectors - centroids).mean() for codes in (ours, theirs)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_a_code_depends_on_no_batch_and_no_threads(
    dim: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = _vectors(200, dim)
    centroids = _centroids(_index(vectors, bits), vectors)
    whole = encode(vectors, centroids, bits=bits, threads=1)

    monkeypatch.setattr(rabitq_module, "BLOCK_VALUES", 7 * dim)
    in_blocks = encode(vectors, centroids, bits=bits, threads=3)
    one_by_one = [
        encode(vectors[number : number + 1], centroids[number : number + 1], bits=bits, threads=1)
        for number in range(200)
    ]

    assert np.array_equal(in_blocks, whole)
    assert np.array_equal(np.concatenate(one_by_one), whole)


def test_lists_hold_the_same_ids_in_the_same_order_as_faiss_puts_them() -> None:
    vectors = _vectors(400, 64)
    index = _index(vectors, 4)
    theirs = faiss.clone_index(index)
    vector_ids = np.random.default_rng(3).permutation(400) + (1 << 40)

    add_encoded(index, vectors, vector_ids, threads=2)
    theirs.add_with_ids(vectors, vector_ids)

    assert index.ntotal == 400
    for number in range(NUM_LISTS):
        lists = [one.invlists for one in (index, theirs)]
        ids = [faiss.rev_swig_ptr(one.get_ids(number), one.list_size(number)) for one in lists]
        assert np.array_equal(*ids)


def test_more_than_256_lists_are_told_apart() -> None:
    vectors = _vectors(700, 32)
    index = faiss.index_factory(32, "IVF600,RaBitQ4", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)

    add_encoded(index, vectors, np.arange(700), threads=1)

    expected = np.bincount(index.quantizer.assign(vectors, 1).ravel(), minlength=600)
    assert [index.invlists.list_size(number) for number in range(600)] == expected.tolist()


def test_a_vector_that_is_its_centroid_scores_as_the_centroid() -> None:
    vectors = _vectors(NUM_LISTS, 64)
    index = _index(vectors, 4)  # as many lists as vectors: each is its own centroid
    queries = _vectors(5, 64, seed=4)

    with np.errstate(all="raise"):
        add_encoded(index, vectors, np.arange(NUM_LISTS), threads=1)
    index.nprobe = NUM_LISTS
    scores, ids = index.search(queries, NUM_LISTS)

    assert np.allclose(scores, np.take_along_axis(queries @ vectors.T, ids, axis=1), atol=1e-5)


def test_a_vector_without_a_list_is_refused() -> None:
    index = _index(_vectors(50, 16), 4)
    with pytest.raises(ValueError, match="not finite"):
        add_encoded(index, np.full((1, 16), np.nan, np.float32), np.zeros(1, np.int64), threads=1)
    assert index.ntotal == 0


def test_a_single_list_needs_no_number() -> None:
    vectors = _vectors(60, 16)
    index = faiss.index_factory(16, "IVF1,RaBitQ4", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)

    add_encoded(index, vectors, np.arange(60), threads=1)

    assert index.invlists.list_size(0) == 60
    assert (index.search(vectors, 1)[1].ravel() == np.arange(60)).mean() > 0.9


def test_a_graph_finds_the_lists() -> None:
    vectors = _vectors(500, 32)
    index = faiss.index_factory(32, "IVF16_HNSW8,RaBitQ4", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)

    add_encoded(index, vectors, np.arange(500), threads=1)

    index.nprobe = 16
    assert (index.search(vectors, 1)[1].ravel() == np.arange(500)).mean() > 0.95


def test_a_value_of_zero_gets_the_least_negative_step() -> None:
    vector = np.zeros((1, 8), np.float32)
    vector[0, 0] = 1

    steps, _, _ = _parts(encode(vector, np.zeros_like(vector), bits=3, threads=1), 8, 3)

    assert steps[0, 0] > 0
    assert steps[0, 1:].tolist() == [-0.5] * 7


def test_no_vector_has_no_code() -> None:
    nothing = np.empty((0, 16), np.float32)

    assert encode(nothing, nothing, bits=4, threads=2).shape == (0, 2 + 12 + 6 + 8)


@pytest.mark.parametrize(
    ("factory", "metric", "expected"),
    [
        ("IVF4,RaBitQ4", faiss.METRIC_INNER_PRODUCT, True),
        ("IVF4,RaBitQ2", faiss.METRIC_INNER_PRODUCT, True),
        ("IVF4,RaBitQ9", faiss.METRIC_INNER_PRODUCT, True),
        ("IVF4,RaBitQ4", faiss.METRIC_L2, False),
        ("IVF4,RaBitQ", faiss.METRIC_INNER_PRODUCT, False),
        ("IVF4,SQ8", faiss.METRIC_INNER_PRODUCT, False),
    ],
)
def test_other_codes_are_left_to_faiss(factory: str, metric: int, expected: bool) -> None:
    assert encodes(faiss.index_factory(16, factory, metric)) is expected


@pytest.mark.parametrize("start", [-8, -4])
def test_codes_are_left_to_a_faiss_that_reads_other_factors(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_otherwise(*args: NDArray[np.float32], bits: int, threads: int) -> NDArray[np.uint8]:
        codes = encode(*args, bits=bits, threads=threads)
        factors = np.ascontiguousarray(codes[:, start:][:, :4]).view(np.float32)
        codes[:, start:][:, :4] = (-2 * factors).view(np.uint8)
        return codes

    monkeypatch.setattr(rabitq_module, "encode", encode_otherwise)
    rabitq_module._scores_right.cache_clear()
    try:
        assert not encodes(faiss.index_factory(20, "IVF4,RaBitQ4", faiss.METRIC_INNER_PRODUCT))
    finally:
        rabitq_module._scores_right.cache_clear()
