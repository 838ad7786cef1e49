"""Near-duplicates in an answer: images whose vectors all say the same, folded under the best of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.index.search import ImageVectors

_SCREEN = 0.25
"""Pairs whose mean vectors are this much less alike than the threshold are not compared vector by vector."""


def fold_images(found: ImageVectors, order: NDArray[np.int64], *, threshold: float) -> NDArray[np.int64]:
    """Fold each image under the first, in the order, that is kept and as similar as the threshold.

    Similarity of two images = the mean, over the vectors of both, of the highest cosine with one of the
    other's: 1 for copies. A pair whose mean vectors are far less alike than the threshold is taken for
    different without comparing the others.

    Args:
        found: The vectors of the images; an image without vectors is like no other.
        order: Their ids, best first [R].
        threshold: Of the similarity.

    Returns:
        For each image of the order the position of the one that it is folded under; its own where it is kept.
    """
    position = {int(image_id): row for row, image_id in enumerate(found[0])}
    vectors = [_vectors(found, position.get(int(image_id))) for image_id in order]
    leaders = np.arange(len(order))
    places = np.flatnonzero([len(each) > 0 for each in vectors])
    flat = np.concatenate([np.empty((0, found[2].shape[1]), np.float32), *vectors])
    lengths = np.array([len(vectors[place]) for place in places], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    owners = np.repeat(np.arange(len(places)), lengths)
    means = np.array([_mean(vectors[place]) for place in places])
    is_kept = np.ones(len(places), bool)
    for number in range(1, len(places)):
        begin, end = offsets[number], offsets[number + 1]
        is_alike = is_kept[:number] & (means[:number] @ means[number] >= threshold - _SCREEN)
        alike = np.flatnonzero(is_alike)
        if not len(alike):
            continue
        likeness = _similarities(flat[:begin][is_alike[owners[:begin]]], lengths[alike], flat[begin:end])
        if (likeness >= threshold).any():
            is_kept[number] = False
            leaders[places[number]] = places[alike[np.argmax(likeness >= threshold)]]
    return leaders


def _similarities(
    theirs: NDArray[np.float32], lengths: NDArray[np.int64], own: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Of images with so many of the vectors each [R] and the image with its own [m, D]; [R]."""
    cosines = theirs @ own.T
    starts = np.cumsum(lengths) - lengths
    of_theirs = np.add.reduceat(cosines.max(axis=1), starts) / lengths
    of_own = np.maximum.reduceat(cosines, starts, axis=0).mean(axis=1)
    return np.asarray((of_theirs + of_own) / 2, np.float32)


def _vectors(found: ImageVectors, row: int | None) -> NDArray[np.float32]:
    if row is None:
        return np.empty((0, found[2].shape[1]), np.float32)
    _, offsets, vectors = found
    return vectors[offsets[row] : offsets[row + 1]].astype(np.float32)


def _mean(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    total = vectors.sum(axis=0)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)
