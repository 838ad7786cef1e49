"""What each epoch of a tuning of CLIP's towers is measured by, with the towers as they are.

    gpr, mcip    the validation images find each other (mAP, R@1), and are named by their classes' prompts
    realign      captions find their images (R@1, R@5, R@10)

The measures are those of `jobs/evaluate.py --task`, within the rounding of vectors to float16. The vectors of
the tower that is locked are computed once. Each worker asks with its part of the images or captions, all
among all images. Memory of each: all vectors of images and texts, float16, the images' once more as float32,
and some of the cosines at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.classes import no_pair
from for_ray.datasets.labelled import Ragged
from for_ray.evaluation.similarity import (
    RANKS,
    SCORES_AT_ONCE,
    VectorSets,
    ask_for_classes,
    text_to_image,
    zero_shot_accuracy,
)
from for_ray.model.trainer import HaltedError
from for_ray.stages.shared_towers import SharedTowers
from for_ray.stages.tower_val import TowerVal

Totals = dict[str, tuple[float, int]]
"""For each measure the sum over some queries, and how many these are."""


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
        self._locked_texts: NDArray[np.float16] | None = None
        self.num_unreadable = 0

    def measure(self, *, goes_on: bool = False) -> dict[str, float]:
        """By name, 0 to 1.

        Args:
            goes_on: What the store refuses counts as unreadable.

        Raises:
            HaltedError: Too many images are unreadable, or what is left cannot be measured.
            StorageError: The store refused, or the network failed again and again.
        """
        val, rank, world = self._val, self._towers.rank, self._towers.world
        if self._are_captions:
            seen = self._locked_images = self._locked_images or self._look(goes_on=goes_on)
            captions = self._finite(self._towers.embed_captions(val.texts), "captions")
            of_image = val.of_image.select(seen.rows)
            return self._means(caption_totals(seen.vectors, captions, of_image, rank=rank, world=world))
        if self._locked_texts is None:
            self._locked_texts = self._finite(self._towers.embed_names(val.texts), "class names")
        seen = self._look(goes_on=goes_on)
        classes = val.of_image.values[seen.rows].astype(np.int64)
        if np.bincount(classes).max() < 2:
            raise HaltedError(f"--val: {no_pair(val.name, are_read=True)}; {self._left_out()}")
        return self._means(class_totals(seen.vectors, self._locked_texts, classes, rank=rank, world=world))

    def _look(self, *, goes_on: bool) -> Seen:
        found = self._towers.embed_images(self._val.images, goes_on=goes_on)
        vectors, is_readable = (part.numpy() for part in found)
        rows = np.flatnonzero(is_readable & np.isfinite(vectors).all(axis=1))
        self.num_unreadable = len(self._val) - len(rows)
        if not len(rows) or self.num_unreadable > self._max_bad_fraction * len(self._val):
            may = f"at most {self._max_bad_fraction:.0%} may (--max-bad-fraction)"
            raise HaltedError(f"--val: {self._left_out()}; {may}")
        return Seen(vectors[rows], rows)

    def _left_out(self) -> str:
        return (
            f"{self.num_unreadable:,} of {len(self._val):,} images of {self._val.name} cannot be read, or "
            "have no finite vector"
        )

    def _finite(self, vectors: NDArray[np.float16], what: str) -> NDArray[np.float16]:
        """Vectors of all texts; one that is not finite would be as near as the first to all images."""
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise HaltedError(
                f"--val: {len(bad):,} of {len(vectors):,} {what} of {self._val.name} have no finite vector, "
                f"such as {self._val.texts[bad[0]][:80]!r}: take another --encoder, or a lower --lr"
            )
        return vectors

    def _means(self, mine: Totals) -> dict[str, float]:
        """Over the queries of all workers."""
        summed = self._towers.sum([value for pair in mine.values() for value in pair])
        return {name: total / num for name, total, num in zip(mine, summed[::2], summed[1::2], strict=True)}


def class_totals(
    images: NDArray[np.float16],
    names: NDArray[np.float16],
    classes: NDArray[np.int64],
    *,
    rank: int = 0,
    world: int = 1,
) -> Totals:
    """How images find those of their class, and how their class is told by its name.

    Args:
        images: Unit vectors [B, D].
        names: Unit vectors [V, D].
        classes: Which of the names each image is of [B].
        rank: Which worker asks, with the images rank, rank + world, …; may be none.
        world: How many there are.
    """
    is_asking = np.arange(len(images)) % world == rank
    asked = ask_for_classes(VectorSets(np.arange(len(images) + 1), images), classes, is_asking)
    num_found = len(asked.precisions)
    held, own = names.astype(np.float32), np.flatnonzero(is_asking)
    num_right = 0.0
    for some in _chunks(len(own), len(names)):
        rows = own[some]
        scores = held @ images[rows].astype(np.float32).T
        num_right += len(rows) * zero_shot_accuracy(scores, classes[rows])
    return {
        "image-to-image mAP": (float(asked.precisions.sum()), num_found),
        "image-to-image R@1": (float(asked.is_first.sum()), num_found),
        "zero-shot accuracy": (num_right, len(own)),
    }


def caption_totals(
    images: NDArray[np.float16],
    captions: NDArray[np.float16],
    of_image: Ragged,
    *,
    rank: int = 0,
    world: int = 1,
) -> Totals:
    """How captions find their images.

    Args:
        images: Unit vectors [B, D].
        captions: Unit vectors [C, D].
        of_image: Which of the captions each image has; a caption that none has is no query.
        rank: Which worker asks: with the captions rank, rank + world, … of those that are queries.
        world: How many there are.
    """
    asked = np.unique(of_image.values)[rank::world]
    owners = np.repeat(np.arange(len(images)), np.diff(of_image.offsets))
    held = images.astype(np.float32).T
    totals = np.zeros(len(RANKS))
    for some in _chunks(len(asked), len(images)):
        texts = asked[some]
        is_pair = np.isin(of_image.values, texts)
        places = np.searchsorted(texts, of_image.values[is_pair])
        scores = captions[texts].astype(np.float32) @ held
        totals += len(texts) * np.array(text_to_image(scores, places, owners[is_pair], RANKS))
    return {
        f"text-to-image R@{k}": (total, len(asked)) for k, total in zip(RANKS, totals.tolist(), strict=True)
    }


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Some rows at a time of a matrix that is too large to be held."""
    step = max(1, SCORES_AT_ONCE // max(1, num_columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
