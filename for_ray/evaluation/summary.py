"""One method's measures on one data set: by group of categories, and by category."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from for_ray.evaluation.classification import average_precisions, f1_at_k
from for_ray.evaluation.ranking import average_precision_at_k, average_precisions_at_k

GROUPS = ("base", "novel", "all")

DEPTH = 50
"""How deep a ranking counts in retrieval: mAP@50."""

GUESSES = 3
"""How many categories an image is given in classification: F1@3."""


class GroupMeans(BaseModel):
    """A measure over the base categories, the novel ones, and all of them; None where no category counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: float | None
    novel: float | None
    all: float | None

    @classmethod
    def of(cls, values: NDArray[np.float64], is_novel: NDArray[np.bool_]) -> GroupMeans:
        """The means of what is no NaN among `values` [V]."""
        means = {}
        for group, is_in_group in zip(
            GROUPS, (~is_novel, is_novel, np.ones(len(is_novel), bool)), strict=True
        ):
            counted = values[is_in_group & ~np.isnan(values)]
            means[group] = float(counted.mean()) if counted.size else None
        return cls(**means)


@dataclass(frozen=True)
class RetrievalSummary:
    """How well images are found by their categories.

    Attributes:
        map50: The means of `ap50`.
        ap50: AP@50 of each category [V]; NaN for one without an image.
        num_left_out: Categories without an image: they are in no mean.
    """

    map50: GroupMeans
    ap50: NDArray[np.float64]
    num_left_out: int


class MultilabelScores(BaseModel):
    """How well the categories of an image are told.

    Attributes:
        gzsl_f1: F1@3 among all categories, over the images that show any (GZSL).
        gzsl_map: mAP over all categories (GZSL).
        zsl_f1: F1@3 among the novel categories alone, over the images that show any of them (ZSL).
        zsl_map: mAP over the novel categories (ZSL); images are ranked among all images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gzsl_f1: float | None
    gzsl_map: float | None
    zsl_f1: float | None
    zsl_map: float | None


def summarise_scores(
    scores: NDArray[np.floating], relevant: NDArray[np.bool_], is_novel: NDArray[np.bool_]
) -> RetrievalSummary:
    """mAP@50 of scores [V, B].

    Args:
        scores: [V, B], the columns in the order of their image ids.
        relevant: [V, B].
        is_novel: [V].

    Raises:
        ValueError: The shapes differ, or a score is NaN.
    """
    return _retrieval(average_precisions_at_k(scores, relevant, DEPTH), is_novel)


def summarise_rankings(
    ranked: NDArray[np.integer], relevant: NDArray[np.bool_], is_novel: NDArray[np.bool_]
) -> RetrievalSummary:
    """The same from rankings that somebody else made.

    Args:
        ranked: Columns of `relevant`, best first [V, R]; -1 for an image that is none of them, or for no
            image: it is a wrong answer at its rank. No image twice in a row.
        relevant: [V, B].
        is_novel: [V].

    Raises:
        ValueError: The shapes don't fit.
    """
    ranked, relevant = np.asarray(ranked), np.asarray(relevant, bool)
    if ranked.ndim != 2 or relevant.ndim != 2 or len(ranked) != len(relevant):
        raise ValueError(
            f"expected ranked [V, R] and relevant [V, B], got {list(ranked.shape)} and {list(relevant.shape)}"
        )
    padded = np.pad(relevant, ((0, 0), (0, 1)))  # -1 is the column that nobody shows
    hits = np.take_along_axis(padded, ranked, axis=1)
    aps = [
        average_precision_at_k(hit, int(shown.sum()), DEPTH)
        for hit, shown in zip(hits, relevant, strict=True)
    ]
    return _retrieval(np.array(aps, np.float64), is_novel)


def multilabel_scores(
    scores: NDArray[np.floating], relevant: NDArray[np.bool_], is_novel: NDArray[np.bool_]
) -> MultilabelScores:
    """F1@3 and mAP of scores [V, B]; arguments and errors as for `summarise_scores`."""
    aps = GroupMeans.of(average_precisions(scores, relevant), is_novel)
    return MultilabelScores(
        gzsl_f1=_number(f1_at_k(scores, relevant, GUESSES)),
        gzsl_map=aps.all,
        zsl_f1=_number(f1_at_k(scores[is_novel], relevant[is_novel], GUESSES)),
        zsl_map=aps.novel,
    )


def _retrieval(aps: NDArray[np.float64], is_novel: NDArray[np.bool_]) -> RetrievalSummary:
    return RetrievalSummary(GroupMeans.of(aps, is_novel), aps, int(np.isnan(aps).sum()))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
