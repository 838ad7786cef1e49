"""Search in memory-mapped segments: the best vectors, and from them the best images.

Score of an image = the highest cosine between the query and its vectors. The first k distinct images of a
sorted list of *all* hits are therefore the index's top k: fetch a number of hits, group them by image, and
fetch twice as many until there are enough distinct images or nothing is left. The codes' scores are
approximations, so more images than k are gathered and ranked again with their stored vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.index.codec import open_index
from for_ray.index.probe import (
    Hits,
    Searchable,
    check_same_codec,
    checked_queries,
    choose_lists,
    merge_hits,
    no_hits,
    search_segment,
)
from for_ray.index.selection import ALL_IDS, Remembered, Span, allowed_ids, select_parts
from for_ray.schema import Layout, Segment, image_ids_of, slots_of
from for_ray.storage import local_copy

CODE_NOISE = 1e-5
"""By how much FAISS's float32 sums of one and the same vector may differ, with a wide margin."""

HITS_PER_IMAGE = 2
"""Hits that are fetched at first for each image wanted; images with more of them cost another round. Of
3,000 pages of the picture book the first 200 have 1.06 hits each, at the 99th percentile of 160 names."""

FEW_IMAGES = 2000
"""Images that a filter leaves, so many or fewer, are all compared exactly, without the index."""

RERANK_AT_ONCE = 1024
"""Images whose vectors are held at once: 100 MB of float16 at 50 slots of 1024 dimensions."""

NUM_FETCHERS = 8
"""Segments that are fetched at once."""

ImageVectors = tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.floating]]
"""Image ids [b], offsets [b + 1], vectors [n, D]: image i has the vectors offsets[i] to offsets[i + 1], in
slot order."""

Exact = Callable[[NDArray[np.int64]], ImageVectors]
"""The stored vectors of these images; ids that are not there may be left out."""


class RankedImages(NamedTuple):
    """The best images of one query, best first; ties by image id.

    Attributes:
        image_ids: int64 [R], distinct, R <= k.
        slots: int64 [R], which stored vector of the image gives its score; of equal ones the first.
        scores: float32 [R]; exact cosines where the search was given the exact vectors.
        is_complete: Whether there are k images. If not, the index has no more, or no more lists were to be
            looked at.
        is_exhaustive: Whether every vector of every list was looked at, if only by its code.
        num_candidates: Images that were ranked again.
        ceiling: What others score at most, in the lists looked at: what the code says of the last candidate,
            and the most that it was off among them. -inf where there are no others.
    """

    image_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]
    is_complete: bool
    is_exhaustive: bool
    num_candidates: int
    ceiling: float = -np.inf


def num_candidates(k: int) -> int:
    """Images to rank again for the k best: the codes' scores are approximations."""
    return max(4 * k, k + 100)


class SegmentSet:
    """Segments of one codec, memory-mapped, searched as one index. Threads may share it.

    Args:
        paths: The segments' files; may be none, then nothing is found.
        nprobe: Lists that a search looks at in each segment.
        threads: FAISS's threads for several queries at once; a single query runs on one.
        spans: The image ids that each segment may hold, first <= id < end: one that holds none of a filter's
            is not searched. Any ids where None.

    Raises:
        DataError: A file is damaged, or not all segments are of one codec.
        ValueError: `nprobe` or `threads` is below 1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        nprobe: int,
        threads: int = 1,
        spans: Sequence[Span] | None = None,
    ) -> None:
        if nprobe < 1 or threads < 1:
            raise ValueError(f"expected nprobe >= 1 and threads >= 1, got {nprobe} and {threads}")
        # Arrays are mapped as they lie in the file. `IO_FLAG_MMAP` maps the inverted lists alone, and its
        # lists are slower: 0.17 against 0.11 ms a query (RaBitQ4, 60,000 × 128, nlist 256, nprobe 32).
        self._segments = [open_index(Path(path), io_flags=faiss.IO_FLAG_MMAP_IFC) for path in paths]
        check_same_codec(self._segments, paths)
        all_spans = [ALL_IDS] * len(paths) if spans is None else list(spans)
        self._parts = Remembered(lambda only, excluded: select_parts(only, excluded, all_spans))
        self._threads = threads
        self.nprobe = nprobe
        self.num_vectors = sum(int(segment.ntotal) for segment in self._segments)
        # Not asked of the segments: a search that still runs when they are closed must not take what it has
        # for all that there is.
        self.dim = int(self._segments[0].d) if paths else 0
        self.nlist = int(faiss.extract_index_ivf(self._segments[0]).nlist) if paths else 0

    def search(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        exclude_image_ids: NDArray[np.int64] | None = None,
        only_image_ids: NDArray[np.int64] | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """The k best vectors of each query, of images that may be found.

        What a filter means to the segments is kept for as long as its arrays live: do not change them.

        Args:
            queries: [Q, D], unit length.
            k: At least 1.
            exclude_image_ids: Sorted; images that are never found.
            only_image_ids: Sorted and distinct; no other images are found. None for all.
            nprobe: For this search alone; all lists where it is `nlist` or more.

        Returns:
            R <= k columns; R < k only if no query has more in the lists looked at.

        Raises:
            ValueError: k or nprobe is below 1, the queries have another dimension or a NaN, or the ids of a
                filter are not in order.
        """
        nprobe = self.nprobe if nprobe is None else nprobe
        queries = checked_queries(queries, k, dim=self.dim, nprobe=nprobe)
        parts = self._parts(only_image_ids, exclude_image_ids)
        pairs = [
            pair
            for pair in zip(self._segments, parts, strict=True)
            if pair[0].ntotal and not pair[1].is_empty
        ]
        if not pairs or not len(queries):
            return no_hits(len(queries))
        faiss.omp_set_num_threads(self._threads)
        probes = choose_lists(pairs[0][0], queries, nprobe)
        return merge_hits([search_segment(segment, probes, k, part) for segment, part in pairs], k)

    def close(self) -> None:
        """Unmap the files, as soon as no search runs in them; not to be searched again."""
        self._segments = []


def open_segments(
    layout: Layout,
    fingerprint: str,
    segments: Sequence[Segment],
    *,
    nprobe: int,
    threads: int = 1,
    cache_path: Path | None = None,
) -> SegmentSet:
    """Fetch segments and map them into memory.

    Args:
        layout: The index.
        fingerprint: Of the encoder that made them.
        segments: Which; at least one.
        nprobe: Lists that a search looks at in each; what a snapshot without segments says (0) counts as 1.
        threads: See `SegmentSet`.
        cache_path: For segments of a bucket; the usual cache where None.

    Raises:
        DataError: A file is not what its checksum says.
        StorageError: The store refused.
    """

    def fetch(segment: Segment) -> Path:
        uri = layout.segment_uri(fingerprint, segment.file_name)
        return local_copy(uri, sha256=segment.sha256, cache_path=cache_path)

    with ThreadPoolExecutor(NUM_FETCHERS) as fetchers:
        paths = list(fetchers.map(fetch, segments))
    spans = [(segment.first_image_id, segment.end_image_id) for segment in segments]
    return SegmentSet(paths, nprobe=max(nprobe, 1), threads=threads, spans=spans)


def search_images(
    segments: Searchable,
    query: NDArray[np.floating],
    k: int,
    *,
    exact: Exact | None,
    exclude_image_ids: NDArray[np.int64] | None = None,
    only_image_ids: NDArray[np.int64] | None = None,
    nprobe: int | None = None,
    probes_more: bool = True,
    candidates: int | None = None,
) -> RankedImages:
    """The k images with the highest score: k distinct ones, or all that the index has.

    Candidates are the max(4k, k + 100) images that the codes rank first, and all that they rank equal to
    the k-th; without exact scores the k first. With the codec Flat and all lists looked at, the answer is
    that of a comparison with every vector, ties included. So it is where a filter leaves few images: these
    are all compared, without the index.

    Args:
        segments: What is searched.
        query: [D], unit length.
        k: At least 1; may exceed the number of images.
        exact: Gives the stored vectors for the exact scores; None leaves the codec's scores.
        exclude_image_ids: Sorted; images that are never found.
        only_image_ids: Sorted and distinct; no other images are found. None for all.
        nprobe: Lists looked at in each segment to begin with.
        probes_more: Look at more lists if these hold too few images. A measure of `nprobe` itself must not.
        candidates: Images to rank again, at least k, where other than `num_candidates(k)`.

    Raises:
        ValueError: k or nprobe is below 1, the query has another dimension or a NaN, or the ids of a filter
            are not in order.
    """
    query = np.asarray(query, np.float32)
    if query.ndim != 1 or k < 1:
        raise ValueError(f"expected one query [D] and k >= 1, got shape {list(query.shape)} and k = {k}")
    wanted = k if exact is None else (candidates or num_candidates(k))
    if exact is not None and probes_more and only_image_ids is not None:
        allowed = allowed_ids(only_image_ids, exclude_image_ids)
        if len(allowed) <= max(FEW_IMAGES, wanted):
            return _compare_all(segments, query, k, allowed, exact=exact)
    gathered, is_exhaustive = _gather(
        segments,
        query,
        k,
        wanted,
        filters={"exclude_image_ids": exclude_image_ids, "only_image_ids": only_image_ids},
        nprobe=segments.nprobe if nprobe is None else nprobe,
        probes_more=probes_more,
    )
    ranked = gathered if exact is None else _rerank(gathered.image_ids, query, exact=exact)
    best = ranked.first(k)
    is_complete = len(best.image_ids) == k
    ceiling = -np.inf if is_exhaustive and len(gathered.image_ids) < wanted else _ceiling(gathered, ranked)
    return RankedImages(*best, is_complete, is_exhaustive, len(gathered.image_ids), ceiling)


class _Ranking(NamedTuple):
    image_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]

    def first(self, k: int) -> _Ranking:
        return _Ranking(self.image_ids[:k], self.slots[:k], self.scores[:k])


def _ceiling(gathered: _Ranking, ranked: _Ranking) -> float:
    if not len(ranked.image_ids):
        return -np.inf
    order = np.argsort(gathered.image_ids)
    places = order[np.searchsorted(gathered.image_ids, ranked.image_ids, sorter=order)]
    return float(gathered.scores[-1] + np.abs(gathered.scores[places] - ranked.scores).max())


def _compare_all(
    segments: Searchable, query: NDArray[np.float32], k: int, allowed: NDArray[np.int64], *, exact: Exact
) -> RankedImages:
    checked_queries(query[None], k, dim=segments.dim)
    best = _rerank(allowed, query, exact=exact).first(k)
    return RankedImages(*best, len(best.image_ids) == k, is_exhaustive=True, num_candidates=len(allowed))


def _gather(
    segments: Searchable,
    query: NDArray[np.float32],
    k: int,
    wanted: int,
    *,
    filters: dict[str, NDArray[np.int64] | None],
    nprobe: int,
    probes_more: bool,
) -> tuple[_Ranking, bool]:
    """The candidates by the codec's scores, and whether the whole index was looked at."""
    fetch = HITS_PER_IMAGE * wanted
    while True:
        hits = segments.search(query[None], fetch, nprobe=nprobe, **filters)
        images = _group(hits)
        is_drained = hits.scores.shape[1] < fetch  # nothing is left in these lists
        is_exhaustive = is_drained and nprobe >= segments.nlist
        is_final = is_drained and (is_exhaustive or not probes_more)
        if is_final or len(images.image_ids) >= wanted:
            # Images that tie with the k-th may lie behind the last hit: the lowest ids of them count.
            floor = images.scores[k - 1] - CODE_NOISE if len(images.image_ids) >= k else -np.inf
            if is_drained or hits.scores[0, -1] < floor:
                num_kept = max(wanted, int((images.scores >= floor).sum()))
                return images.first(num_kept), is_exhaustive
        if is_drained:
            nprobe *= 2
        else:
            fetch *= 2


def _group(hits: Hits) -> _Ranking:
    """One query's hits by image: its best hit counts. Best first, ties by image id."""
    vector_ids, scores = hits.vector_ids[0], hits.scores[0]
    image_ids, first = np.unique(image_ids_of(vector_ids), return_index=True)  # hits are sorted: first = best
    order = np.lexsort((image_ids, -scores[first]))
    best = first[order]
    return _Ranking(image_ids[order], slots_of(vector_ids[best]), scores[best])


def _rerank(image_ids: NDArray[np.int64], query: NDArray[np.float32], *, exact: Exact) -> _Ranking:
    """Rank images by the exact score; those that `exact` has no vectors for are left out."""
    parts = [
        _exact_scores(*exact(image_ids[start : start + RERANK_AT_ONCE]), query=query)
        for start in range(0, len(image_ids), RERANK_AT_ONCE)
    ]
    if not parts:
        return _Ranking(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    ids, slots, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores))
    return _Ranking(ids[order], slots[order], scores[order])


def _exact_scores(
    image_ids: NDArray[np.int64],
    offsets: NDArray[np.integer],
    vectors: NDArray[np.floating],
    *,
    query: NDArray[np.float32],
) -> _Ranking:
    # Summed in float64 and rounded once: equal vectors then have equal scores, wherever they lie in the
    # batch, and agree with `evaluation.exact`.
    products = vectors.astype(np.float64) @ query.astype(np.float64)  # [n, D] · [D] -> [n]
    cosines = products[offsets[0] : offsets[-1]].astype(np.float32)
    counts = np.diff(offsets)
    rows = np.repeat(np.arange(len(image_ids)), counts)
    slots = np.arange(len(rows)) - np.repeat(offsets[:-1] - offsets[0], counts)
    order = np.lexsort((slots, -cosines, rows))
    held, first = np.unique(rows[order], return_index=True)
    best = order[first]
    return _Ranking(np.asarray(image_ids, np.int64)[held], slots[best], cosines[best])
