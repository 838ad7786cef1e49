"""Multi-label classification (FOR, Table 10): which categories does an image show? F1 at K, and mAP.

GZSL asks for all categories, ZSL for the novel ones alone: the caller gives the rows that count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.evaluation.ranking import average_precision_at_k, rank_images


def f1_at_k(scores: NDArray[np.floating], relevant: NDArray[np.bool_], k: int = 3) -> float:
    """F1 of the K highest categories of each image, counted over all images together (micro).

    Precision = hits / (K · images), recall = hits / labels. Images that show none of the categories are left
    out: they could only be wrong. The paper must do the same: with a share of novel labels as COCO has, its
    ZSL F1 of 50 would be out of reach otherwise. Equal scores are ranked by category.

    Args:
        scores: [V, B].
        relevant: [V, B], whether the image shows the category.
        k: At least 1; above V it counts as V.

    Returns:
        0 to 1; NaN where no image shows any category.

    Raises:
        ValueError: The shapes differ, k is below 1, or a score is NaN.
    """
    scores, relevant = _matrices(scores, relevant)
    is_counted = relevant.any(axis=0)
    relevant = relevant[:, is_counted].T  # [V, B] -> [B, V]
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}")
    if not relevant.size:
        return float("nan")
    predicted = rank_images(scores[:, is_counted].T, k)
    num_hits = int(np.take_along_axis(relevant, predicted, axis=1).sum())
    # 2·P·R / (P + R), with P and R over the same hits
    return 2 * num_hits / (predicted.size + int(relevant.sum()))


def average_precisions(scores: NDArray[np.floating], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """AP of each category over the whole ranking of the images [V]; NaN for one without a relevant image.

    Equal scores are ranked by image id.

    Args:
        scores: [V, B], the columns in the order of their image ids.
        relevant: [V, B].

    Raises:
        ValueError: The shapes differ, or a score is NaN.
    """
    scores, relevant = _matrices(scores, relevant)
    num_images = max(scores.shape[1], 1)
    aps = np.empty(len(scores), np.float64)
    for row in range(len(scores)):  # one ranking of all images at a time
        hits = relevant[row, rank_images(scores[row : row + 1], num_images)[0]]
        aps[row] = average_precision_at_k(hits, int(hits.sum()), num_images)
    return aps


def mean_average_precision(scores: NDArray[np.floating], relevant: NDArray[np.bool_]) -> float:
    """The mean of `average_precisions` over the categories that have a relevant image; NaN without any."""
    aps = average_precisions(scores, relevant)
    counted = aps[~np.isnan(aps)]
    return float(counted.mean()) if counted.size else float("nan")


def _matrices(
    scores: NDArray[np.floating], relevant: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    scores, relevant = np.asarray(scores), np.asarray(relevant, bool)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise ValueError(
            f"expected scores and relevant [V, B], got {list(scores.shape)} and {list(relevant.shape)}"
        )
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    return scores, relevant
