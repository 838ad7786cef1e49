"""Rankings and their average precision, as `OC-OVIR` measures them (FOR, §4.1).

AP@k = Σ_{i≤k} P(i)·rel(i) / min(k, number of relevant images), with P(i) the share of relevant images among
the first i. A category without a relevant image is left out of the mean; ties are broken by image id.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rank_images(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The columns of the k highest scores of each row, highest first; of equal ones the lower column.

    Args:
        scores: [V, B], one row a category, the columns in the order of their image ids.
        k: At least 1; may be more than B.

    Returns:
        Columns [V, min(k, B)].

    Raises:
        ValueError: k is below 1, a score is NaN, or `scores` is no matrix.
    """
    scores = np.asarray(scores)
    if k < 1 or scores.ndim != 2:
        raise ValueError(f"expected k >= 1 and scores [V, B], got k = {k} and shape {list(scores.shape)}")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    num_images = scores.shape[1]
    k = min(k, num_images)
    ranked = np.empty((len(scores), k), np.int64)
    for row, values in enumerate(scores):
        candidates = np.arange(num_images)
        if k < num_images:
            # Everything down to the k-th score, its ties included: a partition alone would drop any of them.
            candidates = np.flatnonzero(values >= np.partition(values, num_images - k)[num_images - k])
        ranked[row] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
    return ranked


def average_precision_at_k(relevant: NDArray[np.bool_], num_relevant: int, k: int) -> float:
    """AP@k of one ranking.

    Args:
        relevant: [R], whether the image at this rank is relevant, best first; ranks beyond k don't count.
        num_relevant: Relevant images in the whole collection.
        k: At least 1.

    Returns:
        0 to 1; NaN where no image is relevant.

    Raises:
        ValueError: k is below 1, or more images are marked than there are.
    """
    first = np.asarray(relevant, bool)[:k]
    if k < 1 or first.sum() > num_relevant:
        raise ValueError(f"expected k >= 1 and at most {num_relevant} relevant, got k = {k}, {first.sum()}")
    if num_relevant == 0:
        return float("nan")
    precision = np.cumsum(first) / np.arange(1, len(first) + 1)
    return float(precision[first].sum() / min(k, num_relevant))


def average_precisions_at_k(
    scores: NDArray[np.floating], relevant: NDArray[np.bool_], k: int = 50
) -> NDArray[np.float64]:
    """AP@k of each category [V]; NaN for one without a relevant image.

    Args:
        scores: [V, B], the columns in the order of their image ids.
        relevant: [V, B], whether the image has the category.
        k: At least 1.

    Raises:
        ValueError: The shapes differ, k is below 1, or a score is NaN.
    """
    relevant = np.asarray(relevant, bool)
    if relevant.shape != np.shape(scores):
        raise ValueError(
            f"scores {list(np.shape(scores))} and relevant {list(relevant.shape)} differ in shape"
        )
    hits = np.take_along_axis(relevant, rank_images(scores, k), axis=1)
    totals = relevant.sum(axis=1)
    aps = [average_precision_at_k(hit, int(total), k) for hit, total in zip(hits, totals, strict=True)]
    return np.array(aps, np.float64)


def map_at_k(scores: NDArray[np.floating], relevant: NDArray[np.bool_], k: int = 50) -> float:
    """The mean of AP@k over the categories that have a relevant image; arguments as above.

    Raises:
        ValueError: No category has a relevant image, or what `average_precisions_at_k` refuses.
    """
    aps = average_precisions_at_k(scores, relevant, k)
    if np.isnan(aps).all():
        raise ValueError("no category has a relevant image, so there is no mean to take")
    return float(np.nanmean(aps))
