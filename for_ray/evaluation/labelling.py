"""How good pseudo-labels are, where the truth is known: counts over a table, batch by batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Lists(NamedTuple):
    """Lists of integers: list i is values[offsets[i]:offsets[i + 1]].

    offsets: int64 [n + 1], from 0.
    values: integers [offsets[-1]].
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.integer]

    @property
    def owners(self) -> NDArray[np.int64]:
        """The list that each value is in."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class LabelTally:
    """Counts over pseudo-labelled images; memory is that of the vocabulary and one batch.

    A pair (image, category) is *found* when one of the image's pseudo-labels means the category, *shown* when
    the image has the category as a label, *right* when both hold. Where not all categories were looked for in
    an image, only those that were are judged.

    Args:
        meanings: For each name of the vocabulary the categories that it means.
        num_categories: Of the data set.
        most: Labels of an image, at most.
    """

    def __init__(self, meanings: Lists, num_categories: int, *, most: int) -> None:
        self._meanings = meanings
        self._num_categories = num_categories
        self.images_of_name = np.zeros(len(meanings.offsets) - 1, np.int64)
        self.images_with = np.zeros(most + 1, np.int64)
        self.found, self.right, self.shown = (np.zeros(num_categories, np.int64) for _ in range(3))

    @property
    def num_images(self) -> int:
        """Images that were counted."""
        return int(self.images_with.sum())

    @property
    def num_labels(self) -> int:
        """Pseudo-labels that were counted."""
        return int(self.images_of_name.sum())

    @property
    def is_named(self) -> NDArray[np.bool_]:
        """Whether some name of the vocabulary means the category; the others cannot be found."""
        is_named = np.zeros(self._num_categories, bool)
        is_named[self._meanings.values] = True
        return is_named

    def add(self, labels: Lists, truth: Lists, negatives: Lists | None = None) -> None:
        """Count B images.

        Args:
            labels: Their pseudo-labels, indices into the vocabulary, each once.
            truth: The categories that they show, each once.
            negatives: The categories that they are known not to show; None where all were looked for.
        """
        counts = np.diff(labels.offsets)
        self.images_with += np.bincount(counts, minlength=len(self.images_with))
        self.images_of_name += np.bincount(labels.values, minlength=len(self.images_of_name))
        shown, found = self._keys(truth), np.unique(self._keys(self._meant(labels)))
        if negatives is not None:
            found = found[np.isin(found, np.concatenate([shown, self._keys(negatives)]))]
        right = found[np.isin(found, shown)]
        for total, keys in ((self.found, found), (self.right, right), (self.shown, shown)):
            total += np.bincount(keys % self._num_categories, minlength=self._num_categories)

    def precision_recall(self, chosen: NDArray[np.bool_]) -> tuple[float | None, float | None]:
        """Over all pairs of the chosen categories [V] together; None where there is nothing to divide by.

        Recall is over the categories that have a name.
        """
        chosen = chosen & self.is_named
        found, right, shown = (int(total[chosen].sum()) for total in (self.found, self.right, self.shown))
        return right / found if found else None, right / shown if shown else None

    def _meant(self, labels: Lists) -> Lists:
        """The categories that labels mean, image by image."""
        starts, lengths = self._meanings.offsets[:-1], np.diff(self._meanings.offsets)
        num_meant = lengths[labels.values]
        ends = np.concatenate([[0], np.cumsum(num_meant)])
        places = np.arange(ends[-1]) + np.repeat(starts[labels.values] - ends[:-1], num_meant)
        return Lists(ends[labels.offsets], self._meanings.values[places])

    def _keys(self, categories: Lists) -> NDArray[np.int64]:
        """One number for each (image, category)."""
        return categories.owners * self._num_categories + categories.values
