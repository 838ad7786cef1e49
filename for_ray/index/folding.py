"""Near-duplicates in an answer: images whose vectors all say the same, folded under the best of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.index.search import ImageVectors

_SCREEN = 0.1
"""Pairs whose mean vectors are this much less alike than the threshold are not compared vector by vector."""


def fold_images(found: ImageVectors, order: NDArray[np.int64], *, threshold: float) -> NDArray[np.int64]:
    """Fold each image under the first, in the order, that is kept and as similar as the threshold.

    Similarity of two images = the mean, over the vectors of both, of the highest cosine with one of the
    other's: 1 for copies.

    Args:
        found: The vectors of the images; an image without vectors is like no other.
        order: Their ids, best first [R].
        threshold: Of the similarity.

    Returns:
        For each image of the order the position of the one that it is folded under; its own where it is kept.
    """
    position = {int(image_id): row for row, image_id in enumerate(found[0])}
    vectors = [_vectors(found, position.get(int(image_id))) for image_id in order]
    means = np.array([_mean(each) for each in vectors])
    leaders = np.arange(len(order))
    for place in range(1, len(order)):
        kept = np.flatnonzero(leaders[:place] == np.arange(place))
        alike = kept[means[kept] @ means[place] >= threshold - _SCREEN]
        for leader in alike:
            if similarity(vectors[leader], vectors[place]) >= threshold:
                leaders[place] = leader
                break
    return leaders


def similarity(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Of two images' vectors [n, D] and [m, D]; 0 where one has none."""
    if not len(left) or not len(right):
        return 0.0
    cosines = left @ right.T
    return float((cosines.max(axis=0).mean() + cosines.max(axis=1).mean()) / 2)


def _vectors(found: ImageVectors, row: int | None) -> NDArray[np.float32]:
    if row is None:
        return np.empty((0, found[2].shape[1]), np.float32)
    _, offsets, vectors = found
    return vectors[offsets[row] : offsets[row + 1]].astype(np.float32)


def _mean(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    total = vectors.sum(axis=0)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)
