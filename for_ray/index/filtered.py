"""Segments of which only some images may be found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from for_ray.index.probe import Hits, drop_images, trim_hits
from for_ray.index.search import SegmentSet
from for_ray.schema import image_ids_of


class FilteredSegments(SegmentSet):
    """As the segments that it is made of, without what does not pass; the mapped files are shared.

    Args:
        segments: What is searched.
        only_image_ids: Sorted; no other images are found.
    """

    def __init__(self, segments: SegmentSet, only_image_ids: NDArray[np.int64]) -> None:
        self.__dict__.update(vars(segments))
        self._only = only_image_ids

    def search(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        exclude_image_ids: NDArray[np.int64] | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """The k best vectors of each query that pass; twice as many are fetched until they do."""
        fetch = k
        while True:
            found = super().search(queries, fetch, exclude_image_ids=exclude_image_ids, nprobe=nprobe)
            if not found.scores.shape[1]:
                return found
            kept = drop_images(found, self._dropped(found))
            is_drained = found.scores.shape[1] < fetch or (found.vector_ids[:, -1] < 0).all()
            if is_drained or not ((kept.vector_ids >= 0).sum(axis=1) < k).any():
                return trim_hits(kept, k)
            fetch *= 2

    def _dropped(self, found: Hits) -> NDArray[np.int64]:
        image_ids = np.unique(image_ids_of(found.vector_ids))
        if not len(self._only):
            return image_ids
        # Not `np.isin`, which would sort the millions that may be found.
        nearest = np.minimum(np.searchsorted(self._only, image_ids), len(self._only) - 1)
        is_other: NDArray[np.bool_] = self._only[nearest] != image_ids
        return image_ids[is_other]
