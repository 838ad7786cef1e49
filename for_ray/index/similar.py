"""Search with a picture: the images that have something like each of its vectors.

Score of an image = the mean, over the picture's vectors, of the highest cosine with one of the image's. A
copy of the picture scores 1. Candidates come from one search a vector; those that look best by the codes'
scores are ranked exactly with their stored vectors. Unlike the search with one vector, whose first hits prove
the rest worse, this is not exact: an image that is only fairly near to every vector may be missed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.index.probe import Hits, Searchable, checked_queries
from for_ray.index.search import (
    FEW_IMAGES,
    HITS_PER_IMAGE,
    RERANK_AT_ONCE,
    Exact,
    RankedImages,
    num_candidates,
)
from for_ray.index.selection import allowed_ids
from for_ray.schema import image_ids_of


def search_similar(
    segments: Searchable,
    queries: NDArray[np.floating],
    k: int,
    *,
    exact: Exact,
    exclude_image_ids: NDArray[np.int64] | None = None,
    only_image_ids: NDArray[np.int64] | None = None,
) -> RankedImages:
    """The k images with the highest mean score: k distinct ones, or all that the index has.

    Where a filter leaves few images, these are all compared, without the index.

    Args:
        segments: What is searched.
        queries: The picture's vectors [Q, D], unit length, Q >= 1.
        k: At least 1; may exceed the number of images.
        exact: Gives the stored vectors for the exact scores.
        exclude_image_ids: Sorted; images that are never found.
        only_image_ids: Sorted and distinct; no other images are found. None for all.

    Returns:
        Best first, ties by image id; `slots` are those nearest to any of the picture's vectors.

    Raises:
        ValueError: There is no query, k is below 1, the queries have another dimension or a NaN, or the ids
            of a filter are not in order.
    """
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or not len(queries) or k < 1:
        raise ValueError(f"expected queries [Q, D] and k >= 1, got shape {list(queries.shape)} and k = {k}")
    checked_queries(queries, k, dim=segments.dim)
    wanted = num_candidates(k)
    allowed = None if only_image_ids is None else allowed_ids(only_image_ids, exclude_image_ids)
    if allowed is not None and len(allowed) <= max(FEW_IMAGES, wanted):
        candidates, is_exhaustive = allowed, True
    else:
        filters = {"exclude_image_ids": exclude_image_ids, "only_image_ids": only_image_ids}
        candidates, is_exhaustive = _gather(segments, queries, wanted, filters)
    ids, slots, scores = _rank(candidates, queries, exact=exact)
    is_complete = len(ids) >= k
    return RankedImages(ids[:k], slots[:k], scores[:k], is_complete, is_exhaustive, len(candidates))


def _gather(
    segments: Searchable,
    queries: NDArray[np.float32],
    wanted: int,
    filters: dict[str, NDArray[np.int64] | None],
) -> tuple[NDArray[np.int64], bool]:
    """Candidates, ascending ids, and whether the whole index was looked at."""
    fetch, nprobe = HITS_PER_IMAGE * wanted, segments.nprobe
    while True:
        hits = segments.search(queries, fetch, nprobe=nprobe, **filters)
        is_drained = hits.scores.shape[1] < fetch
        is_exhaustive = is_drained and nprobe >= segments.nlist
        candidates = _best_by_code(hits, wanted)
        if is_exhaustive or len(candidates) >= wanted:
            return candidates, is_exhaustive
        fetch, nprobe = (fetch, 2 * nprobe) if is_drained else (2 * fetch, nprobe)


def _best_by_code(hits: Hits, count: int) -> NDArray[np.int64]:
    """The images with the highest mean of the codes' scores, ascending ids.

    Where a query has no hit of an image, the image counts the query's last hit: it can't be nearer than that.
    """
    found = hits.vector_ids >= 0
    if not found.any():
        return np.empty(0, np.int64)
    image_ids, positions = np.unique(image_ids_of(hits.vector_ids[found]), return_inverse=True)
    last = np.min(np.where(found, hits.scores, np.inf), axis=1)
    best = np.repeat(np.where(np.isfinite(last), last, 0.0)[:, None], len(image_ids), axis=1)  # [Q, images]
    np.maximum.at(best, (np.nonzero(found)[0], positions), hits.scores[found])
    order = np.lexsort((image_ids, -best.mean(axis=0)))[:count]
    return np.sort(image_ids[order])


def _rank(
    image_ids: NDArray[np.int64], queries: NDArray[np.float32], *, exact: Exact
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    parts = [
        _mean_scores(*exact(image_ids[start : start + RERANK_AT_ONCE]), queries=queries)
        for start in range(0, len(image_ids), RERANK_AT_ONCE)
    ]
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    ids, slots, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores))
    return ids[order], slots[order], scores[order]


def _mean_scores(
    image_ids: NDArray[np.int64],
    offsets: NDArray[np.integer],
    vectors: NDArray[np.floating],
    *,
    queries: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    held = np.diff(offsets) > 0
    starts, ends = offsets[:-1][held], offsets[1:][held]
    if not len(starts):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    # In float64 and rounded once, as in `search`: equal images have equal scores.
    cosines = vectors.astype(np.float64) @ queries.astype(np.float64).T  # [n, D] · [D, Q] -> [n, Q]
    scores = np.maximum.reduceat(cosines, starts, axis=0).mean(axis=1).astype(np.float32)
    nearest = cosines.max(axis=1)
    slots = [int(nearest[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
    return np.asarray(image_ids, np.int64)[held], np.array(slots, np.int64), scores
