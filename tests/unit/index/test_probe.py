"""Merging hits: what sorting all of them gives."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.index.probe import Hits, merge_hits, no_hits

LOWEST = np.finfo(np.float32).min


def draw(random, num_queries, width, *, num_scores):
    """Hits of one segment, as FAISS gives them: some scores equal, "none" at the end of some rows."""
    scores = -np.sort(-random.integers(0, num_scores, (num_queries, width)).astype(np.float32), axis=1)
    vector_ids = random.permutation(10_000)[: num_queries * width].reshape(num_queries, width)
    for row in range(num_queries):
        end = random.integers(0, 2 * width)
        scores[row, end:], vector_ids[row, end:] = LOWEST, -1
    return Hits(scores, vector_ids.astype(np.int64))


def definition(found, k):
    """Each query's (score, vector id) pairs, best first, equal scores by id."""
    rows = []
    for row in range(len(found[0].scores)):
        pairs = [
            (-float(score), int(vector_id))
            for hits in found
            for score, vector_id in zip(hits.scores[row], hits.vector_ids[row], strict=True)
            if vector_id >= 0
        ]
        rows.append([(-score, vector_id) for score, vector_id in sorted(pairs)[:k]])
    return rows


@pytest.mark.parametrize("num_scores", [1, 3, 10_000])
@pytest.mark.parametrize("k", [1, 5, 30, 1000])
@pytest.mark.parametrize("num_segments", [1, 2, 9])
def test_merged_hits_are_the_first_of_all_sorted_ones(num_segments, k, num_scores):
    random = np.random.default_rng([num_segments, k, num_scores])
    for num_queries in (1, 4):
        found = [draw(random, num_queries, 20, num_scores=num_scores) for _ in range(num_segments)]
        right = definition(found, k)
        merged = merge_hits(found, k)
        assert merged.scores.shape == merged.vector_ids.shape
        assert merged.scores.shape[1] == max(map(len, right))
        for scores, vector_ids, row in zip(*merged, right, strict=True):
            is_hit = vector_ids >= 0
            assert list(zip(scores[is_hit].tolist(), vector_ids[is_hit].tolist(), strict=True)) == row
            assert (vector_ids[len(row) :] == -1).all()
            assert np.isneginf(scores[len(row) :]).all()


def test_nothing_is_merged_into_nothing():
    nothing = Hits(np.full((2, 3), LOWEST), np.full((2, 3), -1))
    for found in ([nothing], [nothing, nothing], [no_hits(2)]):
        assert merge_hits(found, 2).vector_ids.shape == (2, 0)
