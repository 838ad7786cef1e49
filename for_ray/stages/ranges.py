"""Ranges of image ids: how the rows of the table are shared out among tasks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from for_ray.index.table import require_table
from for_ray.schema import Layout


@dataclass(frozen=True)
class RangeJob:
    """What every task that reads a range of the table has to know.

    Attributes:
        index_uri: The index.
        fingerprint: The encoder's.
        version: Of the table: all tasks read the same rows.
        run_id: Goes into the names of the segments.
    """

    index_uri: str
    fingerprint: str
    version: int
    run_id: str

    @property
    def layout(self) -> Layout:
        """The uris of the index."""
        return Layout(self.index_uri)

    def open_table(self) -> Any:
        """The table at the job's version."""
        return require_table(self.layout.images_uri(self.fingerprint), version=self.version)


def split_ids(first: int, end: int, *, most: int) -> list[tuple[int, int]]:
    """Ranges of about equally many ids, none with more than `most`, for tasks that read a batch at a time.

    How many images these are is another matter, since ids of deleted rows are holes: what a task holds must
    not grow with its range. Segments are cut by `Spread`.

    Args:
        first: The first id.
        end: Behind the last id.
        most: At least 1.
    """
    num_ranges = -(-(end - first) // most)
    edges = [first + (end - first) * i // num_ranges for i in range(num_ranges + 1)] if num_ranges else []
    return list(itertools.pairwise(edges))
