"""Exact search: every stored vector is compared, in batches, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK_VECTORS = 1 << 14
"""Vectors that are turned into float64 at once: 128 MB at 1024 dimensions."""

Batch = tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.floating]]
"""Image ids [B], offsets [B + 1] and vectors [n, D]: image i has the vectors offsets[i] to offsets[i + 1]."""


def exact_top_images(
    batches: Iterable[Batch], queries: NDArray[np.floating], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k images with the highest score for each query, score = highest cosine over the image's vectors.

    Scores are float64 products rounded to float32: they don't depend on how the vectors are batched, so
    equal vectors have equal scores, and ties are broken by image id.

    Args:
        batches: Each image in one batch only; an image without vectors is never found. The vectors have
            unit length, float16 or float32.
        queries: [Q, D], unit length.
        k: At least 1.

    Returns:
        Image ids [Q, R] and scores [Q, R], best first; R = min(k, images with vectors).

    Raises:
        ValueError: k is below 1, dimensions differ, or offsets don't fit the vectors.
    """
    queries = np.asarray(queries, np.float64)
    if k < 1 or queries.ndim != 2:
        raise ValueError(f"expected k >= 1 and queries [Q, D], got k = {k} and shape {list(queries.shape)}")
    best_ids = np.empty((len(queries), 0), np.int64)
    best_scores = np.empty((len(queries), 0), np.float32)
    for image_ids, offsets, vectors in batches:
        held, scores = _score_batch(image_ids, offsets, vectors, queries=queries)
        ids = np.concatenate([best_ids, np.broadcast_to(held, scores.shape)], axis=1)
        scores = np.concatenate([best_scores, scores], axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        best_ids = np.take_along_axis(ids, order, axis=1)
        best_scores = np.take_along_axis(scores, order, axis=1)
    return best_ids, best_scores


def _score_batch(
    image_ids: NDArray[np.int64],
    offsets: NDArray[np.integer],
    vectors: NDArray[np.floating],
    *,
    queries: NDArray[np.floating],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The images that have vectors [R], and their scores [Q, R]."""
    offsets, counts = np.asarray(offsets, np.int64), np.diff(offsets)
    if len(counts) != len(image_ids) or (counts < 0).any() or offsets[0] < 0 or offsets[-1] > len(vectors):
        raise ValueError(f"offsets do not fit {len(image_ids)} images and {len(vectors)} vectors")
    if vectors.ndim != 2 or vectors.shape[1] != queries.shape[1]:
        raise ValueError(f"expected vectors of {queries.shape[1]} dimensions, got {list(vectors.shape)}")
    held = np.asarray(image_ids, np.int64)[counts > 0]
    if not len(held):
        return held, np.empty((len(queries), 0), np.float32)
    products = np.empty((len(queries), len(vectors)), np.float32)
    for start in range(0, len(vectors), CHUNK_VECTORS):
        part = slice(start, start + CHUNK_VECTORS)
        products[:, part] = queries @ vectors[part].astype(np.float64).T  # [Q, D] · [D, n] -> [Q, n]
    # Each segment of reduceat ends where the next begins: images without vectors are left out of it, and
    # what lies behind the last image's vectors is cut off.
    starts = offsets[:-1][counts > 0]
    return held, np.maximum.reduceat(products[:, : offsets[-1]], starts, axis=1)


def recall_at_k(found: Sequence[NDArray[np.int64]], exact: Sequence[NDArray[np.int64]]) -> float:
    """Of the images that exact search ranks first, the share that was found; mean over the queries.

    Args:
        found: For each query the image ids found, any number, no order.
        exact: For each query the right image ids; a query with none does not count.

    Raises:
        ValueError: The numbers of queries differ, or no query counts.
    """
    shares = [np.isin(right, ids).mean() for ids, right in zip(found, exact, strict=True) if len(right)]
    if not shares:
        raise ValueError("no query has an exact answer, so there is no recall to measure")
    return float(np.mean(shares))
