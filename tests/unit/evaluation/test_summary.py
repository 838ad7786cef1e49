"""Means by group, and rankings of somebody else's."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.evaluation.classification import f1_at_k
from for_ray.evaluation.ranking import average_precisions_at_k, map_at_k, rank_images
from for_ray.evaluation.summary import (
    GroupMeans,
    multilabel_scores,
    summarise_rankings,
    summarise_scores,
)


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, relevant and is_novel: 9 categories, the last 3 novel, two of all without an image."""
    rng = np.random.default_rng(0)
    relevant = rng.random((9, 200)) < 0.3
    relevant[[2, 7]] = False
    return rng.random((9, 200)).astype(np.float32), relevant, np.arange(9) >= 6


def test_groups(problem):
    scores, relevant, is_novel = problem
    found = summarise_scores(scores, relevant, is_novel)
    assert found.num_left_out == 2
    np.testing.assert_array_equal(found.ap50, average_precisions_at_k(scores, relevant, 50))
    assert found.map50.all == pytest.approx(map_at_k(scores, relevant, 50))
    assert found.map50.base == pytest.approx(map_at_k(scores[:6], relevant[:6], 50))
    assert found.map50.novel == pytest.approx(map_at_k(scores[6:], relevant[6:], 50))


def test_a_group_without_a_category_has_no_mean():
    means = GroupMeans.of(np.array([0.25, np.nan, 0.75]), np.array([False, True, False]))
    assert means.model_dump() == {"base": 0.5, "novel": None, "all": 0.5}
    means = GroupMeans.of(np.array([np.nan]), np.array([False]))
    assert means.model_dump_json() == '{"base":null,"novel":null,"all":null}'


def test_the_ranking_of_the_scores_gives_what_the_scores_give(problem):
    scores, relevant, is_novel = problem
    found = summarise_rankings(rank_images(scores, 50), relevant, is_novel)
    expected = summarise_scores(scores, relevant, is_novel)
    np.testing.assert_array_equal(found.ap50, expected.ap50)
    assert found.map50 == expected.map50


def test_strangers_in_a_ranking_are_wrong_answers():
    relevant = np.array([[True, True, False], [True, False, False], [False, False, False]])
    is_novel = np.array([False, False, True])
    ranked = np.array([[0, -1, 1], [-1, 0, -1], [0, 1, 2]])
    found = summarise_rankings(ranked, relevant, is_novel)
    np.testing.assert_allclose(found.ap50, [(1 + 2 / 3) / 2, 1 / 2, np.nan])
    assert summarise_rankings(np.empty((3, 0), int), relevant, is_novel).map50.all == 0
    with pytest.raises(ValueError, match="ranked"):
        summarise_rankings(ranked[:2], relevant, is_novel)


def test_multilabel(problem):
    scores, relevant, is_novel = problem
    found = multilabel_scores(scores, relevant, is_novel)
    assert found.gzsl_f1 == f1_at_k(scores, relevant, 3)
    assert found.zsl_f1 == f1_at_k(scores[6:], relevant[6:], 3)
    assert found.gzsl_map == pytest.approx(map_at_k(scores, relevant, 200))
    assert found.zsl_map == pytest.approx(map_at_k(scores[6:], relevant[6:], 200))
    none = multilabel_scores(scores, relevant, np.zeros(9, bool))
    assert (none.zsl_f1, none.zsl_map) == (None, None)
    assert none.gzsl_f1 == found.gzsl_f1
