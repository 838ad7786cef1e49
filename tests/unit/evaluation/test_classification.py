"""F1 at K and mAP: by hand, against scikit-learn, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from for_ray.evaluation.classification import average_precisions, f1_at_k, mean_average_precision


def matrices(seed: int, num_categories: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties, and labels; some images and categories have none."""
    rng = np.random.default_rng(seed)
    scores = rng.permutation(num_categories * num_images).reshape(num_categories, num_images) / 1000
    return scores, rng.random((num_categories, num_images)) < 0.25


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 30), st.integers(1, 8))
def test_f1_equals_scikit_learn_s(seed, num_categories, num_images, k):
    scores, relevant = matrices(seed, num_categories, num_images)
    shown = relevant.any(axis=0)
    if not shown.any():
        assert math.isnan(f1_at_k(scores, relevant, k))
        return
    predicted = np.zeros_like(relevant)
    for image in range(num_images):
        predicted[np.argsort(-scores[:, image])[:k], image] = True
    expected = f1_score(relevant[:, shown].T, predicted[:, shown].T, average="micro")
    assert f1_at_k(scores, relevant, k) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 30))
def test_map_equals_scikit_learn_s(seed, num_categories, num_images):
    scores, relevant = matrices(seed, num_categories, num_images)
    shown = relevant.any(axis=1)
    expected = [average_precision_score(*pair) for pair in zip(relevant[shown], scores[shown], strict=True)]
    np.testing.assert_allclose(average_precisions(scores, relevant)[shown], expected, atol=1e-12)
    assert np.isnan(average_precisions(scores, relevant)[~shown]).all()
    if shown.any():
        assert mean_average_precision(scores, relevant) == pytest.approx(np.mean(expected), abs=1e-12)
    else:
        assert math.isnan(mean_average_precision(scores, relevant))


def test_f1_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.9, 0.4], [0.1, 0.8, 0.3], [0.0, 0.0, 0.9]])
    relevant = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    # The third image shows nothing and doesn't count. K = 1: both guesses right, of 4 labels.
    assert f1_at_k(scores, relevant, 1) == pytest.approx(2 * 1 * 0.5 / 1.5)
    # K = 2: guesses {0, 1} and {1, 2}: 3 of 4 right, 3 of 4 labels.
    assert f1_at_k(scores, relevant, 2) == pytest.approx(0.75)
    # K = 4 and more: every category is guessed: 4 of 8 right, all labels.
    assert f1_at_k(scores, relevant, 4) == f1_at_k(scores, relevant, 9) == pytest.approx(2 * 0.5 / 1.5)


def test_equal_scores_are_ranked_by_category_and_by_image():
    same = np.zeros((3, 4))
    relevant = np.zeros((3, 4), bool)
    relevant[2] = True
    assert f1_at_k(same, relevant, 2) == 0
    relevant[1] = True
    assert f1_at_k(same, relevant, 2) == pytest.approx(0.5)
    assert average_precisions(same, np.array([[0, 1, 0, 1]] * 3, bool)).tolist() == [0.5] * 3


def test_what_shows_nothing():
    scores = np.zeros((2, 3))
    assert math.isnan(f1_at_k(scores, np.zeros((2, 3), bool)))
    assert math.isnan(f1_at_k(np.zeros((0, 3)), np.zeros((0, 3), bool)))
    assert math.isnan(f1_at_k(np.zeros((3, 0)), np.zeros((3, 0), bool)))
    assert math.isnan(mean_average_precision(np.zeros((0, 3)), np.zeros((0, 3), bool)))
    assert np.isnan(average_precisions(np.zeros((2, 0)), np.zeros((2, 0), bool))).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        f1_at_k(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="NaN"):
        average_precisions(np.full((2, 3), np.nan), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="k >= 1"):
        f1_at_k(np.zeros((2, 3)), np.ones((2, 3), bool), 0)
