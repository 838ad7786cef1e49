"""The second paper's measures: pictures by pictures, k-NN, zero-shot, and pictures by captions.

An image's score for a picture is the mean, over the picture's vectors, of the highest cosine with one of the
image's, as a search with a picture has it; with one vector an image that is their cosine. Ties are broken by
the order of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.evaluation.ranking import rank_images

RANKS = (1, 5, 10)
"""Of R@k with captions (§4)."""

NEIGHBOURS = 21
"""k of the k-NN classification (§4)."""

SCORES_AT_ONCE = 1 << 25
"""Cosines that are held at a time: 256 MB."""


@dataclass(frozen=True)
class VectorSets:
    """The vectors of B images: image i has vectors[offsets[i]:offsets[i + 1]].

    Attributes:
        offsets: int64 [B + 1].
        vectors: Unit length [n, D], float16 or float32.
    """

    offsets: NDArray[np.int64]
    vectors: NDArray[np.floating]

    def __len__(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """Whether an image has vectors [B]."""
        return np.diff(self.offsets) > 0

    def select(self, is_chosen: NDArray[np.bool_]) -> VectorSets:
        """The images that are chosen [B], in their order."""
        lengths = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths[is_chosen])]).astype(np.int64)
        return VectorSets(offsets, self.vectors[np.repeat(is_chosen, lengths)])


class ImageToImage(NamedTuple):
    """How well images of a class find each other.

    mean_average_precision: Mean over the queries that have a relevant image; AP over the whole ranking.
    recall_at_1: Share of these whose first image is relevant.
    num_alone: Queries without a relevant image: in no mean.
    """

    mean_average_precision: float
    recall_at_1: float
    num_alone: int


def image_scores(queries: VectorSets, gallery: VectorSets) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Scores of all images for some pictures at a time: the number of the first of them, and [q, B].

    Raises:
        ValueError: An image has no vector.
    """
    if not (queries.is_read.all() and gallery.is_read.all()):
        raise ValueError("an image without a vector has no score")
    held = gallery.vectors.astype(np.float32)
    lengths = np.diff(queries.offsets)
    step = max(1, SCORES_AT_ONCE // max(1, len(held) * int(lengths.max(initial=1))))
    for first in range(0, len(queries), step):
        end = min(first + step, len(queries))
        edges = queries.offsets[first : end + 1]
        cosines = queries.vectors[edges[0] : edges[-1]].astype(np.float32) @ held.T
        best = np.maximum.reduceat(cosines, gallery.offsets[:-1], axis=1)  # [q · n, B]
        sums = np.add.reduceat(best, edges[:-1] - edges[0], axis=0)
        yield first, (sums / lengths[first:end, None]).astype(np.float32)


class ClassQueries(NamedTuple):
    """Of images that asked for their class, those that have another of it [Q].

    precisions: AP of each, float64.
    is_first: Whether its first image is relevant, bool.
    """

    precisions: NDArray[np.float64]
    is_first: NDArray[np.bool_]


def ask_for_classes(
    images: VectorSets, classes: NDArray[np.int64], is_asking: NDArray[np.bool_]
) -> ClassQueries:
    """Some images ask for the others of their class; each is left out of its own ranking of all.

    Args:
        images: B images.
        classes: Of each [B].
        is_asking: Which ask [B]; may be none.
    """
    asking, precisions, is_first = np.flatnonzero(is_asking), [], []
    for first, scores in image_scores(images.select(is_asking), images):
        for query, values in zip(asking[first:].tolist(), scores, strict=False):
            order = np.argsort(-values, kind="stable")
            order = order[order != query]
            is_relevant = classes[order] == classes[query]
            if is_relevant.any():
                precision = np.cumsum(is_relevant) / np.arange(1, len(order) + 1)
                precisions.append(float(precision[is_relevant].mean()))
                is_first.append(bool(is_relevant[0]))
    return ClassQueries(np.array(precisions, np.float64), np.array(is_first, bool))


def image_to_image(images: VectorSets, classes: NDArray[np.int64]) -> ImageToImage:
    """Each image asks for the others of its class; it is left out of its own ranking.

    Args:
        images: B images.
        classes: Of each [B].

    Raises:
        ValueError: No image has another of its class.
    """
    asked = ask_for_classes(images, classes, np.ones(len(images), bool))
    if not len(asked.precisions):
        raise ValueError("no image has another of its class")
    return ImageToImage(
        float(asked.precisions.mean()), float(asked.is_first.mean()), len(images) - len(asked.precisions)
    )


def knn_accuracy(
    images: VectorSets,
    classes: NDArray[np.int64],
    *,
    gallery: VectorSets | None = None,
    gallery_classes: NDArray[np.int64] | None = None,
    k: int = NEIGHBOURS,
) -> float:
    """The share of images whose k nearest neighbours name their class.

    Each neighbour votes for its class with its score; one below 0 has no vote. The class with most votes
    wins, of equal ones the lower. Fewer images than k all vote.

    Args:
        images: B images.
        classes: Of each [B].
        gallery: The neighbours; None: the images themselves, each without itself.
        gallery_classes: Of these.
        k: At least 1.
    """
    own = gallery is None or gallery_classes is None
    held = images if gallery is None else gallery
    held_classes = classes if gallery_classes is None else gallery_classes
    num_classes = int(held_classes.max()) + 1
    num_right = 0
    for first, scores in image_scores(images, held):
        if own:
            scores[np.arange(len(scores)), first + np.arange(len(scores))] = -np.inf
        order = rank_images(scores, k)
        weights = np.take_along_axis(scores, order, axis=1).clip(0).astype(np.float64)
        for row, (near, weight) in enumerate(zip(order, weights, strict=True)):
            votes = np.bincount(held_classes[near], weights=weight, minlength=num_classes)
            num_right += int(votes.argmax() == classes[first + row])
    return num_right / len(images)


def zero_shot_accuracy(scores: NDArray[np.floating], classes: NDArray[np.int64]) -> float:
    """The share of images whose class has the highest score of all names; of equal ones the first.

    Args:
        scores: [V, B].
        classes: Which of the names is right [B].
    """
    return float((np.argmax(scores, axis=0) == classes).mean())


def text_to_image(
    scores: NDArray[np.floating],
    captions: NDArray[np.integer],
    images: NDArray[np.integer],
    ranks: tuple[int, ...],
) -> list[float]:
    """R@k: the share of captions that find an image of theirs among the first k.

    A caption that several images have is one query, and any of them is right.

    Args:
        scores: Of every caption for every image [C, B].
        captions: Of each pair of a caption and an image [n]; a caption without a pair is no query.
        images: Of each pair [n].
        ranks: Each k.
    """
    by_caption = np.argsort(captions, kind="stable")
    asked, starts = np.unique(captions[by_caption], return_index=True)
    best = np.empty(len(asked), np.int64)
    for row, own in enumerate(np.split(images[by_caption], starts[1:])):
        values = scores[asked[row]]
        own = np.sort(own)
        first = own[np.argmax(values[own])]  # of equal ones the lower
        best[row] = (values > values[first]).sum() + (values[:first] == values[first]).sum()
    return [float((best < k).mean()) for k in ranks]
