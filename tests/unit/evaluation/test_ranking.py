"""Rankings and AP@k: closed forms, a reference written as the definition reads, and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from for_ray.evaluation.ranking import (
    average_precision_at_k,
    average_precisions_at_k,
    map_at_k,
    rank_images,
)


def reference_ap(ranking, relevant, k):
    """Σ_{i≤k} P(i)·rel(i) / min(k, number of relevant), i from 1, in plain Python."""
    total = 0.0
    for i in range(1, min(k, len(ranking)) + 1):
        if relevant[ranking[i - 1]]:
            total += sum(relevant[image] for image in ranking[:i]) / i
    return total / min(k, sum(relevant))


def apk(actual, predicted, k):
    """`ml_metrics.apk`, written out: the mean over what is found, out of min(what there is, k)."""
    predicted = predicted[:k]
    score, num_hits = 0.0, 0.0
    for i, p in enumerate(predicted):
        if p in actual and p not in predicted[:i]:
            num_hits += 1.0
            score += num_hits / (i + 1.0)
    return score / min(len(actual), k) if actual else 0.0


def mapk(actual, predicted, k):
    """`ml_metrics.mapk`: the mean over all queries, one without an answer counts as 0."""
    return sum(apk(*pair, k) for pair in zip(actual, predicted, strict=True)) / len(actual)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 5, 50, 400])
def test_equals_ml_metrics_on_random_rankings(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.random((12, 300)).astype(np.float32)
    relevant = rng.random((12, 300)) < rng.choice([0.01, 0.1, 0.5], (12, 1))
    relevant[:, 0] |= ~relevant.any(
        axis=1
    )  # theirs counts a category without an image as 0, ours leaves it out
    actual = [np.flatnonzero(row).tolist() for row in relevant]
    predicted = [np.argsort(-row).tolist() for row in scores]
    aps = average_precisions_at_k(scores, relevant, k)
    np.testing.assert_allclose(
        aps, [apk(*pair, k) for pair in zip(actual, predicted, strict=True)], atol=1e-12
    )
    assert map_at_k(scores, relevant, k) == pytest.approx(mapk(actual, predicted, k), abs=1e-12)


def reference_ranking(scores, k):
    return sorted(range(len(scores)), key=lambda image: (-scores[image], image))[:k]


@st.composite
def problems(draw):
    num_categories, num_images = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    cells = num_categories * num_images
    # Few values: most rankings have ties.
    scores = draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=cells, max_size=cells))
    relevant = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    shape = (num_categories, num_images)
    return np.reshape(scores, shape), np.reshape(relevant, shape), draw(st.integers(1, 15))


@settings(deadline=None, max_examples=300)
@given(problems())
def test_equals_the_definition(problem):
    scores, relevant, k = problem
    ranked = rank_images(scores, k)
    aps = average_precisions_at_k(scores, relevant, k)
    for row in range(len(scores)):
        assert ranked[row].tolist() == reference_ranking(scores[row].tolist(), k)
        if relevant[row].any():
            expected = reference_ap(ranked[row].tolist(), relevant[row].tolist(), k)
            assert aps[row] == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(aps[row])


@settings(deadline=None, max_examples=100)
@given(problems())
def test_properties(problem):
    scores, relevant, k = problem
    aps = average_precisions_at_k(scores, relevant, k)
    counted = aps[~np.isnan(aps)]
    assert ((counted >= 0) & (counted <= 1)).all()
    # Only the order of the scores counts.
    np.testing.assert_array_equal(average_precisions_at_k(3 * scores + 7, relevant, k), aps)
    # The order of the categories does not.
    np.testing.assert_array_equal(average_precisions_at_k(scores[::-1], relevant[::-1], k), aps[::-1])
    # A category's own relevance as its score is perfect.
    perfect = average_precisions_at_k(relevant.astype(float), relevant, k)
    assert (perfect[relevant.any(axis=1)] == 1).all()
    if len(counted):
        assert map_at_k(scores, relevant, k) == pytest.approx(counted.mean())


def test_moving_a_relevant_image_up_never_lowers_the_ap():
    for marks in itertools.product([False, True], repeat=6):
        for place in range(1, 6):
            if marks[place] and not marks[place - 1]:
                better = list(marks)
                better[place - 1], better[place] = True, False
                one, other = (average_precision_at_k(np.array(m), sum(marks), 4) for m in (marks, better))
                assert other >= one


@pytest.mark.parametrize(
    ("marks", "num_relevant", "k", "expected"),
    [
        ([True], 1, 1, 1.0),
        ([False, True], 1, 2, 1 / 2),
        ([True, False, True], 2, 3, (1 + 2 / 3) / 2),
        ([True, False, True], 2, 2, 1 / 2),  # the second lies behind the cut
        ([True, True], 100, 2, 1.0),  # divided by k: more than k relevant are no loss
        ([True, True], 4, 10, 2 / 4),  # divided by the number of relevant
        ([False, False], 3, 2, 0.0),
        ([], 2, 5, 0.0),
    ],
)
def test_by_hand(marks, num_relevant, k, expected):
    assert average_precision_at_k(np.array(marks, bool), num_relevant, k) == pytest.approx(expected)


def test_random_scores_give_about_the_share_of_relevant_images():
    rng = np.random.default_rng(0)
    relevant = rng.random((300, 2000)) < 0.2
    assert map_at_k(rng.random((300, 2000)), relevant, 50) == pytest.approx(0.2**2, abs=0.03)


def test_categories_without_a_relevant_image_are_left_out():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    relevant = np.array([[True, False, False], [False, False, False], [False, False, True]])
    assert map_at_k(scores, relevant) == pytest.approx((1 + 1 / 3) / 2)
    with pytest.raises(ValueError, match="no category has a relevant image"):
        map_at_k(scores[1:2], relevant[1:2])


def test_equal_scores_are_ranked_by_image_id():
    np.testing.assert_array_equal(rank_images(np.zeros((1, 100)), 5), [[0, 1, 2, 3, 4]])
    scores = np.zeros((1, 1000))
    scores[0, [400, 900]] = 1
    np.testing.assert_array_equal(rank_images(scores, 4), [[400, 900, 0, 1]])


def test_no_images_and_no_categories():
    assert rank_images(np.zeros((3, 0)), 5).shape == (3, 0)
    assert rank_images(np.zeros((0, 3)), 5).shape == (0, 3)
    assert np.isnan(average_precisions_at_k(np.zeros((2, 0)), np.zeros((2, 0), bool))).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="k >= 1"):
        rank_images(np.zeros((2, 2)), 0)
    with pytest.raises(ValueError, match=r"scores \[V, B\]"):
        rank_images(np.zeros(2), 1)
    with pytest.raises(ValueError, match="NaN"):
        rank_images(np.array([[0.0, np.nan]]), 1)
    with pytest.raises(ValueError, match="differ in shape"):
        map_at_k(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="at most 1 relevant"):
        average_precision_at_k(np.array([True, True]), 1, 2)
    with pytest.raises(ValueError, match="k >= 1"):
        average_precision_at_k(np.array([True]), 1, 0)
