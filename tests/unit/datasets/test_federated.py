"""Which categories take part in an image's softmax, where nobody looked for most of them."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.datasets.federated import FederatedCandidates
from for_ray.datasets.labelled import Ragged

NUM_CATEGORIES, NUM_IMAGES = 200, 300


@pytest.fixture(scope="module")
def lists() -> tuple[Ragged, Ragged]:
    """Categories with few and many images; the last 20 have none; negatives are not among the positives."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, NUM_CATEGORIES + 1, dtype=float)[::-1].copy()
    weights[-20:] = 0
    weights /= weights.sum()
    labels, negatives = [], []
    for _ in range(NUM_IMAGES):
        drawn = rng.choice(NUM_CATEGORIES, 12, replace=False, p=weights)
        labels.append(drawn[:4])
        negatives.append(drawn[4 : 4 + rng.integers(0, 9)])
    return Ragged.of(labels), Ragged.of(negatives)


def test_positives_annotated_negatives_and_at_least_fifty_negatives_take_part(lists):
    labels, negatives = lists
    rows = np.arange(0, NUM_IMAGES, 3)
    candidates = FederatedCandidates(labels, negatives, NUM_CATEGORIES).draw(rows, seed=(0, 1, 2))
    assert candidates.shape == (len(rows), NUM_CATEGORIES)
    for row, taking_part in zip(rows, candidates, strict=True):
        assert taking_part[labels.row(row)].all()
        assert taking_part[negatives.row(row)].all()
        assert taking_part.sum() == len(labels.row(row)) + 50


def test_more_annotated_negatives_than_fifty_all_take_part():
    labels, negatives = Ragged.of([[0], [1]]), Ragged.of([range(1, 80), [0]])
    candidates = FederatedCandidates(labels, negatives, 100).draw(np.array([0]), seed=(0,))
    assert candidates[0].nonzero()[0].tolist() == list(range(80))


def test_categories_without_images_are_never_drawn_and_few_categories_all_take_part(lists):
    labels, negatives = lists
    drawn = FederatedCandidates(labels, negatives, NUM_CATEGORIES).draw(np.arange(NUM_IMAGES), seed=(4,))
    assert not drawn[:, -20:].any()
    few = FederatedCandidates(Ragged.of([[0], [1, 2]]), Ragged.of([[], []]), 3)
    assert few.draw(np.array([0, 1]), seed=(0,)).all()


def test_draws_follow_the_square_root_of_the_number_of_images():
    """One category has 9 images, one has 1, one image has neither: 3 to 1, when one negative is drawn."""
    labels = Ragged.of([[0]] * 9 + [[1]] + [[]])
    candidates = FederatedCandidates(labels, Ragged.of([[]] * 11), 2, least=1)
    drawn = np.concatenate([candidates.draw(np.array([10] * 100), seed=(seed,)) for seed in range(100)])
    assert (drawn.sum(axis=1) == 1).all()
    assert drawn[:, 0].mean() == pytest.approx(0.75, abs=0.02)  # 10,000 draws: 4.6 standard deviations


def test_a_draw_hangs_on_its_seed_and_novel_categories_are_passed_over(lists):
    labels, negatives = lists
    candidates = FederatedCandidates(labels, negatives, 150)
    rows = np.arange(40)
    first = candidates.draw(rows, seed=(0, 1))
    assert first.shape == (40, 150)
    assert (first == candidates.draw(rows, seed=(0, 1))).all()
    assert (first != candidates.draw(rows, seed=(0, 2))).any()
