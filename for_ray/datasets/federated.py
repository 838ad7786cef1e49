"""LVIS is federated: of most categories nobody looked whether they are in an image.

So the supervised softmax of an image runs over its positives, its annotated negatives, and categories
sampled by their frequency. As in the federated loss of CenterNet2 (Zhou, Koltun, Krähenbühl), a category is
drawn in proportion to the square root of the number of its images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged

LEAST_NEGATIVES = 50


class FederatedCandidates:
    """Which categories take part in the softmax of an image.

    Args:
        labels: Categories that each image shows, of all B images: their frequency is counted here.
        negatives: Categories that are annotated as absent from each image.
        num_categories: V, the categories of the loss; greater indices in the lists are passed over.
        least: Negatives of an image at least, annotated and drawn; all that there are where V has no more.
            `LEAST_NEGATIVES` where None.
    """

    def __init__(
        self, labels: Ragged, negatives: Ragged, num_categories: int, *, least: int | None = None
    ) -> None:
        self._labels, self._negatives = labels, negatives
        self._num_categories = num_categories
        self._least = LEAST_NEGATIVES if least is None else least
        frequency = np.bincount(labels.values, minlength=num_categories)[:num_categories]
        with np.errstate(divide="ignore"):
            self._log_weights = 0.5 * np.log(frequency)  # a category without images is never drawn

    def annotated(self, rows: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Of which categories somebody looked whether these images show them, bool [len(rows), V]."""
        return self._marked(self._labels, rows) | self._marked(self._negatives, rows)

    def draw(self, rows: NDArray[np.integer], *, seed: tuple[int, ...]) -> NDArray[np.bool_]:
        """The annotated categories and drawn ones, bool [len(rows), V]; the same seed draws the same.

        Args:
            rows: Indices of the images of one batch.
            seed: Of the draw: run, epoch, batch.
        """
        positive, negative = self._marked(self._labels, rows), self._marked(self._negatives, rows)
        missing = self._least - negative.sum(axis=1)
        noise = np.random.default_rng(seed).gumbel(size=positive.shape)
        keys = np.where(positive | negative, -np.inf, self._log_weights + noise)
        ranks = np.argsort(np.argsort(-keys, axis=1, kind="stable"), axis=1, kind="stable")
        drawn = (ranks < missing[:, None]) & np.isfinite(keys)
        return np.asarray(positive | negative | drawn)

    def _marked(self, lists: Ragged, rows: NDArray[np.integer]) -> NDArray[np.bool_]:
        picked = lists.select(rows)
        images = np.repeat(np.arange(len(rows)), np.diff(picked.offsets))
        kept = picked.values < self._num_categories
        marked = np.zeros((len(rows), self._num_categories), bool)
        marked[images[kept], picked.values[kept]] = True
        return marked
