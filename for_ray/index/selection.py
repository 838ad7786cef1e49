"""Which images a search may find, and FAISS's selectors of their vector ids."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.schema import MAX_SLOTS

MAX_BITMAP_BYTES = 4 << 30
"""Of address space: 2^27 image ids at a bit for each of an image's 256 vector ids. Memory is used from the
first id that is marked to the last, 32 bytes an id. With higher ids, hits are fetched and dropped."""

Ids = NDArray[np.int64]
Span = tuple[int, int]
"""Image ids that a segment may hold: first <= id < end."""

ALL_IDS: Span = (0, 1 << 55)


class Part(NamedTuple):
    """How one segment is searched.

    Attributes:
        is_empty: No image of it may be found.
        selector: What FAISS passes over is left out inside its search; None where it finds all vectors.
        allows: Says which images of hits may be found, where FAISS finds others, too.
    """

    is_empty: bool = False
    selector: faiss.IDSelector | None = None
    allows: Callable[[Ids], NDArray[np.bool_]] | None = None


def select_parts(only: Ids | None, excluded: Ids | None, spans: Sequence[Span]) -> list[Part]:
    """What to search each segment with; nothing refers to the arrays afterwards.

    Args:
        only: Image ids, sorted and distinct: no others are found. None for all.
        excluded: Sorted; these are not found.
        spans: Of the segments.

    Raises:
        ValueError: `only` is not sorted and distinct.
    """
    ids, is_allowed = _marked(only, excluded)
    cuts = [_cut(ids, span) for span in spans]
    parts = [_simple_part(cut, is_allowed) for cut in cuts]
    if all(parts):
        return [part for part in parts if part is not None]
    general = _general_part(ids, is_allowed)  # one for all segments, whose spans may overlap
    return [general if part is None else part for part in parts]


def is_among(ids: Ids, some: Ids) -> NDArray[np.bool_]:
    """Which ids are among the sorted ones; any shape. `numpy.isin` would sort a million for a few."""
    if not len(some):
        return np.zeros(ids.shape, bool)
    places = np.minimum(np.searchsorted(some, ids), len(some) - 1)
    return np.asarray(some[places] == ids)


def allowed_ids(only: Ids, excluded: Ids | None) -> Ids:
    """The allowed images that are not excluded.

    Raises:
        ValueError: `only` is not sorted and distinct.
    """
    only = np.asarray(only, np.int64)
    if only.ndim != 1 or (np.diff(only) <= 0).any():
        raise ValueError("expected the image ids of a filter in ascending order, each once")
    return only if excluded is None or not len(excluded) else only[~is_among(only, excluded)]


def _marked(only: Ids | None, excluded: Ids | None) -> tuple[Ids, bool]:
    """The ids to mark, and whether they are those that may be found or those that may not."""
    if only is not None:
        return allowed_ids(only, excluded), True
    return (np.empty(0, np.int64) if excluded is None else np.asarray(excluded, np.int64)), False


def _cut(ids: Ids, span: Span) -> Ids:
    start, stop = np.searchsorted(ids, span)
    return ids[start:stop]


def _simple_part(ids: Ids, is_allowed: bool) -> Part | None:
    if not len(ids):
        return Part(is_empty=is_allowed)
    first, end = int(ids[0]), int(ids[-1]) + 1
    if end - first != len(ids):
        return None
    within = faiss.IDSelectorRange(first * MAX_SLOTS, end * MAX_SLOTS)
    return Part(selector=within if is_allowed else faiss.IDSelectorNot(within))


def _general_part(ids: Ids, is_allowed: bool) -> Part:
    bytes_an_image = MAX_SLOTS // 8
    num_images = int(ids[-1]) + 1
    if num_images * bytes_an_image > MAX_BITMAP_BYTES:
        ids = ids.copy()
        return Part(allows=lambda found: is_among(found, ids) == is_allowed)
    bits = np.zeros((num_images, bytes_an_image // 8), np.uint64)  # pages without a mark take no memory
    bits[ids] = np.iinfo(np.uint64).max
    marked = faiss.IDSelectorBitmap(bits.view(np.uint8).reshape(-1))
    return Part(selector=marked if is_allowed else faiss.IDSelectorNot(marked))


Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """What was made of two arrays, for as long as both live: a question gives the same ones in each round.

    Args:
        make: Gives what is remembered, and keeps neither array; None stands for an array that is not there.
            The arrays are not to be changed. Threads may share it.
    """

    def __init__(self, make: Callable[[Ids | None, Ids | None], Made]) -> None:
        self._make = make
        self._made: dict[tuple[int, int], tuple[Callable[[], object], Callable[[], object], Made]] = {}
        self._lock = threading.Lock()

    def __call__(self, only: Ids | None, excluded: Ids | None) -> Made:
        """What was made of these very arrays; made now where they are new."""
        key = (id(only), id(excluded))
        with self._lock:
            found = self._made.get(key)
            if found is not None and found[0]() is only and found[1]() is excluded:
                return found[2]
            made = self._make(only, excluded)
            self._made[key] = (self._watch(only, key), self._watch(excluded, key), made)
            return made

    def _watch(self, ids: Ids | None, key: tuple[int, int]) -> Callable[[], object]:
        if ids is None:
            return lambda: None
        made = self._made
        return weakref.ref(ids, lambda _: made.pop(key, None))
