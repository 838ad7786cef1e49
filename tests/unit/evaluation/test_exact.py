"""Exact search against a loop over images, for any batching; recall."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest

from for_ray.evaluation import exact as exact_module
from for_ray.evaluation.exact import exact_top_images, recall_at_k


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def make_collection(num_images, *, dim=24, max_slots=6, seed=0):
    rng = np.random.default_rng(seed)
    ids = (1 << 40) + rng.permutation(5 * num_images)[:num_images]  # in no order
    slots = [unit(rng.normal(size=(rng.integers(0, max_slots + 1), dim))).astype(np.float16) for _ in ids]
    return ids, slots


def batches_of(ids, slots, cuts=()):
    for start, end in itertools.pairwise([0, *cuts, len(ids)]):
        part = slots[start:end]
        offsets = np.cumsum([0, *map(len, part)])
        yield ids[start:end], offsets, np.concatenate([np.empty((0, 24), np.float16), *part])


def loop(ids, slots, query, k):
    """One image at a time, one vector at a time."""
    scored = []
    for image_id, vectors in zip(ids, slots, strict=True):
        cosines = [np.dot(vector.astype(np.float64), query.astype(np.float64)) for vector in vectors]
        if cosines:
            scored.append((-np.float32(max(cosines)), int(image_id)))
    scored = sorted(scored)[:k]
    return [image_id for _, image_id in scored], [-score for score, _ in scored]


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 0, 50, 50, 199, 200), range(1, 200)])
def test_equals_a_loop(k, cuts):
    ids, slots = make_collection(200)
    queries = unit(np.random.default_rng(1).normal(size=(5, 24)))
    found, scores = exact_top_images(batches_of(ids, slots, cuts), queries, k)
    for row, query in enumerate(queries):
        expected_ids, expected_scores = loop(ids, slots, query, k)
        assert found[row].tolist() == expected_ids
        assert scores[row].tolist() == expected_scores
    assert scores.dtype == np.float32
    assert found.dtype == np.int64


def test_chunks_make_no_difference(monkeypatch):
    ids, slots = make_collection(200)
    queries = unit(np.random.default_rng(1).normal(size=(3, 24)))
    whole = exact_top_images(batches_of(ids, slots), queries, 20)
    monkeypatch.setattr(exact_module, "CHUNK_VECTORS", 7)
    chunked = exact_top_images(batches_of(ids, slots), queries, 20)
    np.testing.assert_array_equal(chunked[0], whole[0])
    np.testing.assert_array_equal(chunked[1], whole[1])


@pytest.mark.parametrize("cuts", [(), (3, 90), range(1, 300)])
def test_ties_are_broken_by_image_id_across_batches(cuts):
    ids, slots = make_collection(300, max_slots=3)
    same = unit(np.random.default_rng(2).normal(size=(1, 24))).astype(np.float16)
    for row in range(0, 300, 2):
        slots[row] = np.concatenate([slots[row], same])  # at another place in each batch
    query = unit(same.astype(np.float32))
    found, scores = exact_top_images(batches_of(ids, slots, cuts), query, 40)
    np.testing.assert_array_equal(found[0], np.sort(ids[::2])[:40])
    assert len(set(scores[0])) == 1


def test_batches_are_let_go():
    handed_out, alive = [], []

    def batches():
        for number in range(6):
            vectors = unit(np.random.default_rng(number).normal(size=(40, 24)))
            handed_out.append(weakref.ref(vectors))
            yield np.arange(10) + 10 * number, np.arange(0, 41, 4), vectors
            del vectors
            alive.append(sum(ref() is not None for ref in handed_out))

    exact_top_images(batches(), unit(np.ones((1, 24))), 5)
    assert max(alive) <= 1


def test_nothing_and_one():
    queries = unit(np.random.default_rng(1).normal(size=(2, 24)))
    no_vectors = np.empty((0, 24), np.float16)
    for batches in (
        [],
        [(np.empty(0, np.int64), np.zeros(1, int), no_vectors)],
        [(np.array([4, 5]), np.zeros(3, int), no_vectors)],
    ):
        found, scores = exact_top_images(batches, queries, 3)
        assert found.shape == scores.shape == (2, 0)
    one = [(np.array([9]), np.array([0, 1]), queries[:1].astype(np.float16))]
    found, scores = exact_top_images(one, queries[:1], 3)
    assert found.tolist() == [[9]]
    assert scores[0, 0] == pytest.approx(1, abs=1e-3)
    assert exact_top_images(one, queries[:0], 3)[0].shape == (0, 1)


def test_vectors_outside_the_offsets_do_not_count():
    vectors = unit(np.eye(24)[:4])
    queries = unit(np.eye(24)[[0, 3]])
    found, scores = exact_top_images([(np.array([1]), np.array([1, 3]), vectors)], queries, 1)
    assert found.tolist() == [[1], [1]]
    assert scores.tolist() == [[0.0], [0.0]]


def test_what_is_refused():
    ids, slots = make_collection(5)
    batches = list(batches_of(ids, slots))
    with pytest.raises(ValueError, match="k >= 1"):
        exact_top_images(batches, np.zeros((1, 24), np.float32), 0)
    with pytest.raises(ValueError, match="expected vectors of 23 dimensions"):
        exact_top_images(batches, np.zeros((1, 23), np.float32), 1)
    with pytest.raises(ValueError, match=r"queries \[Q, D\]"):
        exact_top_images(batches, np.zeros(24, np.float32), 1)
    with pytest.raises(ValueError, match="offsets do not fit"):
        exact_top_images([(ids[:3], *batches[0][1:])], np.zeros((1, 24), np.float32), 1)


def test_recall():
    exact = [np.array([1, 2, 3, 4]), np.array([5, 6]), np.array([], np.int64)]
    found = [np.array([4, 3, 9]), np.array([6, 5, 1]), np.array([7])]
    assert recall_at_k(found, exact) == pytest.approx((0.5 + 1.0) / 2)
    assert recall_at_k([row[::-1] for row in found], exact) == recall_at_k(found, exact)
    assert recall_at_k(exact, exact) == 1.0
    assert recall_at_k([np.array([], np.int64)] * 3, exact) == 0.0
    with pytest.raises(ValueError, match="no recall to measure"):
        recall_at_k(found[2:], exact[2:])
    with pytest.raises(ValueError, match="zip"):
        recall_at_k(found[:1], exact)
