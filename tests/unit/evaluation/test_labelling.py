"""Counts of pseudo-labels against a plain loop over images, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.evaluation.labelling import LabelTally, Lists


def lists(rows: list[list[int]]) -> Lists:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Lists(offsets, np.array([each for row in rows for each in row], np.int32))


def test_counts_by_hand():
    # names: 0 and 1 mean category 0, 2 means 1 and 2, 3 means nothing; category 3 has no name
    tally = LabelTally(lists([[0], [0], [1, 2], []]), 4, most=3)
    tally.add(lists([[0, 1, 3], [2], []]), lists([[0, 3], [1], [0]]))
    assert tally.images_of_name.tolist() == [1, 1, 1, 1]
    assert tally.images_with.tolist() == [1, 1, 0, 1]
    assert (tally.num_images, tally.num_labels) == (3, 4)
    assert tally.found.tolist() == [1, 1, 1, 0]  # two names of one category are one pair
    assert tally.right.tolist() == [1, 1, 0, 0]
    assert tally.shown.tolist() == [2, 1, 0, 1]
    assert tally.is_named.tolist() == [True, True, True, False]
    assert tally.precision_recall(np.ones(4, bool)) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert tally.precision_recall(np.array([False, False, True, False])) == (0.0, None)
    assert tally.precision_recall(np.array([False, False, False, True])) == (None, None)


def test_only_what_was_looked_for_is_judged():
    tally = LabelTally(lists([[0], [1], [2]]), 3, most=3)
    tally.add(lists([[0, 1, 2]]), lists([[0]]), lists([[1]]))
    assert tally.found.tolist() == [1, 1, 0]
    assert tally.precision_recall(np.ones(3, bool)) == (0.5, 1.0)


@pytest.mark.parametrize("with_negatives", [False, True])
def test_batches_add_up_to_a_plain_loop(with_negatives):
    draw = np.random.default_rng(0)
    num_images, num_names, num_categories = 60, 12, 5

    def some(count: int, most: int) -> list[int]:
        return draw.choice(count, draw.integers(0, most + 1), replace=False).tolist()

    meant = [some(num_categories, 2) for _ in range(num_names)]
    labels = [some(num_names, 6) for _ in range(num_images)]
    truth = [some(num_categories, 3) for _ in range(num_images)]
    negatives = [[each for each in range(num_categories) if each not in row][:2] for row in truth]
    tally = LabelTally(lists(meant), num_categories, most=6)
    for start in range(0, num_images, 17):
        part = slice(start, start + 17)
        tally.add(lists(labels[part]), lists(truth[part]), lists(negatives[part]) if with_negatives else None)
    found, right = np.zeros(num_categories, int), np.zeros(num_categories, int)
    for row, shown, absent in zip(labels, truth, negatives, strict=True):
        for category in {each for label in row for each in meant[label]}:
            found[category] += not with_negatives or category in shown or category in absent
            right[category] += category in shown
    assert tally.found.tolist() == found.tolist()
    assert tally.right.tolist() == right.tolist()
    assert tally.images_with.sum() == num_images
    assert tally.num_labels == sum(map(len, labels))


def test_no_images_count_nothing():
    tally = LabelTally(lists([[0]]), 1, most=2)
    tally.add(lists([]), lists([]))
    assert (tally.num_images, tally.num_labels) == (0, 0)
    assert tally.precision_recall(np.ones(1, bool)) == (None, None)
