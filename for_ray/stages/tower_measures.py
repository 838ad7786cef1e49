"""What each epoch of a tuning of CLIP's towers is measured by, with the towers as they are.

    gpr, mcip    the validation images find each other (mAP, R@1), and are named by their classes' prompts
    realign      captions find their images (R@1, R@5, R@10)

The measures are those of `jobs/evaluate.py --task`. The vectors of the tower that is locked are computed
once. Memory: the vectors, and some of the cosines at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation.similarity import (
    SCORES_AT_ONCE,
    VectorSets,
    image_to_image,
    text_to_image,
    zero_shot_accuracy,
)
from for_ray.model.trainer import HaltedError
from for_ray.stages.shared_towers import SharedTowers
from for_ray.stages.tower_val import TowerVal

RANKS = (1, 5, 10)
"""Of R@k with captions."""


class Seen(NamedTuple):
    """The validation images that could be read: their vectors [B, D], float16, and which they are [B]."""

    vectors: NDArray[np.float16]
    rows: NDArray[np.int64]


class TowerMeasures:
    """Measures the towers; all workers call it at the same time, and all get the same.

    Args:
        val: What is measured on.
        towers: What is measured.
        are_captions: The texts of `val` are captions; the image tower is locked then, else the text tower.
        max_bad_fraction: Share of the images that may be unreadable.
    """

    def __init__(
        self, val: TowerVal, towers: SharedTowers, *, are_captions: bool, max_bad_fraction: float
    ) -> None:
        self._val, self._towers = val, towers
        self._are_captions, self._max_bad_fraction = are_captions, max_bad_fraction
        self._locked_images: Seen | None = None
        self._locked_texts: NDArray[np.float32] | None = None
        self.num_unreadable = 0

    def measure(self) -> dict[str, float]:
        """By name, 0 to 1.

        Raises:
            HaltedError: Too many images are unreadable, or those that are left cannot be measured.
        """
        val, towers = self._val, self._towers
        if self._are_captions:
            if self._locked_images is None:
                self._locked_images = self._look()
            seen = self._locked_images
            return caption_measures(
                seen.vectors, towers.embed_captions(val.texts), val.of_image.select(seen.rows)
            )
        if self._locked_texts is None:
            self._locked_texts = towers.embed_names(val.texts)
        seen = self._look()
        classes = val.of_image.values[seen.rows].astype(np.int64)
        if np.bincount(classes).max() < 2:
            raise HaltedError(
                f"--val: no class of {val.name} has two images that can be read to find each other; "
                f"{self.num_unreadable:,} of {len(val):,} cannot be read"
            )
        return class_measures(seen.vectors, self._locked_texts, classes)

    def _look(self) -> Seen:
        vectors, is_readable = (part.numpy() for part in self._towers.embed_images(self._val.images))
        rows = np.flatnonzero(is_readable & np.isfinite(vectors).all(axis=1))
        num_images, self.num_unreadable = len(self._val), len(self._val) - len(rows)
        if not len(rows) or self.num_unreadable > self._max_bad_fraction * num_images:
            raise HaltedError(
                f"--val: {self.num_unreadable:,} of {num_images:,} images of {self._val.name} cannot be "
                f"read, or have no finite vector; at most {self._max_bad_fraction:.0%} may "
                "(--max-bad-fraction)"
            )
        return Seen(vectors[rows], rows)


def class_measures(
    images: NDArray[np.float16], names: NDArray[np.float32], classes: NDArray[np.int64]
) -> dict[str, float]:
    """How images find those of their class, and how their class is told by its name.

    Args:
        images: Unit vectors [B, D].
        names: Unit vectors [V, D].
        classes: Which of the names each image is of [B]; one of them has two images at least.
    """
    found = image_to_image(VectorSets(np.arange(len(images) + 1), images), classes)
    rights = [
        zero_shot_accuracy(names @ images[some].astype(np.float32).T, classes[some])
        * (some.stop - some.start)
        for some in _chunks(len(images), len(names))
    ]
    return {
        "image-to-image mAP": found.mean_average_precision,
        "image-to-image R@1": found.recall_at_1,
        "zero-shot accuracy": sum(rights) / len(images),
    }


def caption_measures(
    images: NDArray[np.float16], captions: NDArray[np.float32], of_image: Ragged
) -> dict[str, float]:
    """How captions find their images.

    Args:
        images: Unit vectors [B, D].
        captions: Unit vectors [C, D].
        of_image: Which of the captions each image has; a caption that none has is no query.
    """
    owners = np.repeat(np.arange(len(images)), np.diff(of_image.offsets))
    by_caption = np.argsort(of_image.values, kind="stable")
    asked, owners = of_image.values[by_caption].astype(np.int64), owners[by_caption]
    held = images.astype(np.float32).T
    totals, num_asked = np.zeros(len(RANKS)), 0
    for some in _chunks(len(captions), len(images)):
        first, end = np.searchsorted(asked, [some.start, some.stop])
        if first == end:
            continue
        places = asked[first:end] - some.start
        num_queries = len(np.unique(places))
        found = text_to_image(captions[some] @ held, places, owners[first:end], RANKS)
        totals += num_queries * np.array(found)
        num_asked += num_queries
    return {
        f"text-to-image R@{k}": total / num_asked for k, total in zip(RANKS, totals.tolist(), strict=True)
    }


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Some rows at a time of a matrix that is too large to be held."""
    step = max(1, SCORES_AT_ONCE // max(1, num_columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
