"""Where the vectors of a table lie, by image id: what decides which ids become one segment."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

MOST_BLOCKS = 1 << 20
"""Blocks of ids that are counted apart: 8 MB, however many images there are. A thousand million ids make
blocks of 1,024."""


class Spread:
    """Images and vectors from an id on, counted in blocks of ids that grow with the largest id.

    Args:
        first: The first id.
        most_blocks: An even number.

    Attributes:
        num_images: Images that were added.
        num_vectors: Their vectors.
        end: Behind the largest id; `first` where there is none.
    """

    def __init__(self, first: int, *, most_blocks: int = MOST_BLOCKS) -> None:
        self.num_images, self.num_vectors, self.end = 0, 0, first
        self._first, self._width = first, 1
        self._counts = np.zeros(most_blocks, np.int64)

    def add(self, image_ids: NDArray[np.int64], num_vectors: NDArray[np.int64]) -> None:
        """Count images [n], none below the first id, in any order, and the vectors [n] of each."""
        if not len(image_ids):
            return
        self.num_images += len(image_ids)
        self.num_vectors += int(num_vectors.sum())
        self.end = max(self.end, int(image_ids.max()) + 1)
        while self.end - self._first > self._width * len(self._counts):
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self._width *= 2
        np.add.at(self._counts, (image_ids - self._first) // self._width, num_vectors)

    def cut(self, most_vectors: int) -> list[tuple[int, int]]:
        """Ranges of ids, from the first to the end, with about equally many vectors each.

        Args:
            most_vectors: None has more than these and those of one block together.
        """
        num_ranges = -(-self.num_vectors // max(1, most_vectors))
        if not num_ranges:
            return []
        shares = self.num_vectors * np.arange(1, num_ranges) // num_ranges
        inner = self._first + self._width * (1 + np.searchsorted(np.cumsum(self._counts), shares))
        edges = np.unique([self._first, *inner.tolist(), self.end])
        return list(itertools.pairwise(edges[edges <= self.end].tolist()))
