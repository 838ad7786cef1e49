"""What the table of encoded images has lost since a version of it; what costs is what has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.index.table import IDS_IN_A_DELETE, take_rows
from for_ray.storage.refusals import lance_refusals

ROWS_AT_ONCE = 1 << 20
"""Rows of changed fragments whose ids are compared at once: 16 MB."""


class GoneImages(NamedTuple):
    """Images with vectors that a version of the table held and a later one does not.

    Attributes:
        image_ids: int64 [n], ascending.
        num_vectors: int64 [n], that each had; at least 1.
    """

    image_ids: NDArray[np.int64]
    num_vectors: NDArray[np.int64]


def find_gone(before: Any, after: Any) -> GoneImages:
    """Images with vectors that `before` holds and `after` does not.

    Only the fragments that lost rows are read, and of these the row ids; then the rows that are gone.

    Args:
        before: The table at some version.
        after: The same one, later.
    """
    ids, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for missing in _missing_ids(before, after):
        for start in range(0, len(missing), IDS_IN_A_DELETE):
            # Compaction moves rows to other fragments, and they keep their ids.
            some = missing[start : start + IDS_IN_A_DELETE]
            some = np.setdiff1d(some, _row_ids(take_rows(after, some, ["_rowid"])))
            if len(some):
                gone = _count_each(before, some)
                ids.append(gone.image_ids)
                counts.append(gone.num_vectors)
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids)
    return GoneImages(all_ids[order], np.concatenate(counts)[order])


def _missing_ids(before: Any, after: Any) -> Iterator[NDArray[np.int64]]:
    """Row ids that fragments have lost, among them those that lie in another fragment now."""
    later = {fragment.fragment_id: fragment for fragment in after.get_fragments()}
    for group in _changed(before, later):
        left = [later[fragment.fragment_id] for fragment in group if fragment.fragment_id in later]
        held = _scan_ids(after, left) if left else np.empty(0, np.int64)
        yield np.setdiff1d(_scan_ids(before, group), held)


def _changed(before: Any, later: dict[int, Any]) -> Iterator[list[Any]]:
    """The fragments that are gone or have lost rows, in groups of about `ROWS_AT_ONCE` rows."""
    group: list[Any] = []
    num_rows = 0
    for fragment in before.get_fragments():
        successor = later.get(fragment.fragment_id)
        # A fragment's rows can be deleted only: as many as before are the same ones.
        if successor is not None and successor.num_deletions == fragment.num_deletions:
            continue
        group.append(fragment)
        num_rows += fragment.physical_rows
        if num_rows >= ROWS_AT_ONCE:
            yield group
            group, num_rows = [], 0
    if group:
        yield group


def _scan_ids(table: Any, fragments: Sequence[Any]) -> NDArray[np.int64]:
    with lance_refusals(table.uri):
        return _row_ids(table.scanner(columns=[], with_row_id=True, fragments=fragments).to_table())


def _count_each(table: Any, image_ids: NDArray[np.int64]) -> GoneImages:
    rows = take_rows(table, image_ids, ["_rowid", "boxes"])
    counts = pc.fill_null(pc.list_value_length(rows["boxes"]), 0).to_numpy().astype(np.int64)
    return GoneImages(_row_ids(rows)[counts > 0], counts[counts > 0])


def _row_ids(rows: Any) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = rows["_rowid"].to_numpy().astype(np.int64)
    return ids
