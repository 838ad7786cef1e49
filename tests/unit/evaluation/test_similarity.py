"""The second paper's measures against plain definitions on random data, and k-NN against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation import similarity
from for_ray.evaluation.similarity import (
    VectorSets,
    image_scores,
    image_to_image,
    knn_accuracy,
    text_to_image,
    zero_shot_accuracy,
)


def units(rng: np.random.Generator, count: int, dim: int = 6) -> np.ndarray:
    vectors = rng.standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def singles(vectors: np.ndarray) -> VectorSets:
    return VectorSets(np.arange(len(vectors) + 1), vectors)


def many(rng: np.random.Generator, count: int) -> VectorSets:
    lengths = rng.integers(1, 5, count)
    return VectorSets(np.concatenate([[0], np.cumsum(lengths)]), units(rng, int(lengths.sum())))


@pytest.fixture(params=[1 << 25, 1])
def _at_once(request, monkeypatch):
    """All at once, and one picture at a time."""
    monkeypatch.setattr(similarity, "SCORES_AT_ONCE", request.param)


@pytest.mark.usefixtures("_at_once")
def test_scores_are_the_mean_of_the_best_cosines():
    rng = np.random.default_rng(0)
    queries, gallery = many(rng, 5), many(rng, 7)

    def of(sets: VectorSets, row: int) -> np.ndarray:
        return sets.vectors[sets.offsets[row] : sets.offsets[row + 1]]

    found = np.concatenate([scores for _, scores in image_scores(queries, gallery)])
    expected = [[(of(queries, q) @ of(gallery, g).T).max(1).mean() for g in range(7)] for q in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_image_without_vectors_has_no_score():
    empty = VectorSets(np.array([0, 1, 1]), np.ones((1, 2), np.float32))
    assert empty.is_read.tolist() == [True, False]
    with pytest.raises(ValueError, match="without a vector"):
        list(image_scores(empty, empty))
    assert len(empty.select(empty.is_read)) == 1


@pytest.mark.usefixtures("_at_once")
def test_image_to_image_by_plain_loops():
    rng = np.random.default_rng(1)
    vectors, classes = units(rng, 40), rng.integers(0, 7, 40)
    classes[5] = 99  # alone
    precisions, firsts = [], []
    for query in range(40):
        others = sorted(set(range(40)) - {query}, key=lambda i: (-(vectors[query] @ vectors[i]), i))
        hits, total = 0, 0.0
        for rank, image in enumerate(others, start=1):
            if classes[image] == classes[query]:
                hits += 1
                total += hits / rank
        if hits:
            precisions.append(total / hits)
            firsts.append(classes[others[0]] == classes[query])
    found = image_to_image(singles(vectors), classes)
    assert found.mean_average_precision == pytest.approx(np.mean(precisions), rel=1e-9)
    assert (found.recall_at_1, found.num_alone) == (pytest.approx(np.mean(firsts)), 1)
    assert len(precisions) == 39


def test_the_query_is_left_out_even_beside_its_copy():
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    assert image_to_image(singles(vectors), np.array([0, 0, 1, 1]))[:2] == (1.0, 1.0)
    assert image_to_image(singles(vectors), np.array([0, 1, 0, 1]))[1] == 0.0
    with pytest.raises(ValueError, match="no image has another"):
        image_to_image(singles(vectors), np.arange(4))


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("k", [1, 21, 500])
def test_knn_is_that_of_scikit_learn(k):
    rng = np.random.default_rng(2)
    centres = units(rng, 8)
    classes, known = rng.integers(0, 8, 150), rng.integers(0, 8, 300)

    def near(labels: np.ndarray) -> np.ndarray:
        noisy = centres[labels] + 1.5 * units(rng, len(labels))
        return (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)

    images, gallery = near(classes), near(known)
    theirs = KNeighborsClassifier(
        n_neighbors=min(k, 300), metric="cosine", weights=lambda d: (1 - d).clip(0), algorithm="brute"
    ).fit(gallery, known)
    expected = (theirs.predict(images) == classes).mean()
    found = knn_accuracy(singles(images), classes, gallery=singles(gallery), gallery_classes=known, k=k)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.3 < found < 1


def test_knn_of_a_set_with_itself_leaves_each_image_out():
    rng = np.random.default_rng(3)
    vectors, classes = units(rng, 60), rng.integers(0, 3, 60)
    right = 0
    for row in range(60):
        rest = np.arange(60) != row
        theirs = KNeighborsClassifier(
            n_neighbors=5, metric="cosine", weights=lambda d: (1 - d).clip(0), algorithm="brute"
        ).fit(vectors[rest], classes[rest])
        right += theirs.predict(vectors[[row]])[0] == classes[row]
    assert knn_accuracy(singles(vectors), classes, k=5) == pytest.approx(right / 60)


def test_zero_shot_takes_the_best_name():
    scores = np.array([[0.5, 0.1, 0.3], [0.4, 0.1, 0.9]])
    assert zero_shot_accuracy(scores, np.array([0, 1, 1])) == pytest.approx(2 / 3)  # of equal ones the first


def test_text_to_image_by_plain_loops():
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((12, 9)).round(1)  # with ties
    of_image = Ragged.of([[0, 1, 2], [3], [4, 5], [6], [7], [0, 8], [9], [], [10]])
    expected = []
    for k in (1, 3, 5):
        hits = []
        for caption in range(11):
            ranked = sorted(range(9), key=lambda image, c=caption: (-scores[c, image], image))[:k]
            hits.append(any(caption in of_image.row(image) for image in ranked))
        expected.append(np.mean(hits))
    owners = np.repeat(np.arange(9), np.diff(of_image.offsets))
    mixed = rng.permutation(len(owners))
    found = text_to_image(scores, of_image.values[mixed], owners[mixed], (1, 3, 5))
    assert found == pytest.approx(expected)


def test_of_equal_neighbours_the_first_vote():
    gallery, classes = singles(np.ones((6, 1), np.float32)), np.array([2, 2, 1, 1, 1, 0])
    asked = singles(np.ones((1, 1), np.float32))

    def right(own: int, k: int) -> float:
        return knn_accuracy(asked, np.array([own]), gallery=gallery, gallery_classes=classes, k=k)

    assert [right(2, k) for k in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]  # two of 2, then as many of 1: the lower
    assert right(1, 5) == 1
