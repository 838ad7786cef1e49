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
from for_ray.index.probe import Hits, check_same_codec, drop_images, merge_hits, search_segment, trim_hits
from for_ray.schema import Layout, Segment, image_ids_of, slots_of
from for_ray.storage import local_copy

CODE_NOISE = 1e-5
"""By how much FAISS's float32 sums of one and the same vector may differ, with a wide margin."""

HITS_PER_IMAGE = 4
"""Hits that are fetched at first for each image wanted; images with more of them cost another round."""

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
        is_exhaustive: Whether every vector of every list was looked at.
        num_candidates: Images that were ranked again.
    """

    image_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]
    is_complete: bool
    is_exhaustive: bool
    num_candidates: int


class SegmentSet:
    """Segments of one codec, memory-mapped, searched as one index. Threads may share it.

    Args:
        paths: The segments' files; may be none, then nothing is found.
        nprobe: Lists that a search looks at in each segment.
        threads: FAISS's threads for several queries at once; a single query runs on one.

    Raises:
        DataError: A file is damaged, or not all segments are of one codec.
        ValueError: `nprobe` or `threads` is below 1.
    """

    def __init__(self, paths: Sequence[Path], *, nprobe: int, threads: int = 1) -> None:
        if nprobe < 1 or threads < 1:
            raise ValueError(f"expected nprobe >= 1 and threads >= 1, got {nprobe} and {threads}")
        # Arrays are mapped as they lie in the file. `IO_FLAG_MMAP` maps the inverted lists alone, and its
        # lists are slower: 0.17 against 0.11 ms a query (RaBitQ4, 60,000 × 128, nlist 256, nprobe 32).
        self._segments = [open_index(Path(path), io_flags=faiss.IO_FLAG_MMAP_IFC) for path in paths]
        check_same_codec(self._segments, paths)
        self._threads = threads
        self.nprobe = nprobe
        self.num_vectors = sum(int(segment.ntotal) for segment in self._segments)

    @property
    def dim(self) -> int:
        """D; 0 where there is no segment."""
        return int(self._segments[0].d) if self._segments else 0

    @property
    def nlist(self) -> int:
        """Lists of the codec; 0 where there is no segment."""
        return int(faiss.extract_index_ivf(self._segments[0]).nlist) if self._segments else 0

    def search(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        exclude_image_ids: NDArray[np.int64] | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """The k best vectors of each query.

        Hits of excluded images are dropped, and more are fetched for them: right for the small share of
        images that are gone and not yet merged away.

        Args:
            queries: [Q, D], unit length.
            k: At least 1.
            exclude_image_ids: Sorted.
            nprobe: For this search alone; all lists where it is `nlist` or more.

        Returns:
            R <= k columns; R < k only if no query has more in the lists looked at.

        Raises:
            ValueError: k or nprobe is below 1, or the queries have another dimension or a NaN.
        """
        queries = self._checked(queries)
        nprobe = self.nprobe if nprobe is None else nprobe
        if k < 1 or nprobe < 1:
            raise ValueError(f"expected k >= 1 and nprobe >= 1, got {k} and {nprobe}")
        if not self.num_vectors or not len(queries):
            return Hits(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        faiss.omp_set_num_threads(self._threads)
        fetch = min(k, self.num_vectors)
        while True:
            found = self._search_all(queries, fetch, nprobe=nprobe)
            kept = found if exclude_image_ids is None else drop_images(found, exclude_image_ids)
            lacking = (kept.vector_ids >= 0).sum(axis=1) < k
            if fetch == self.num_vectors or not (lacking & (found.vector_ids[:, -1] >= 0)).any():
                return trim_hits(kept, k)
            fetch = min(2 * fetch, self.num_vectors)

    def _checked(self, queries: NDArray[np.floating]) -> NDArray[np.float32]:
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or (self._segments and queries.shape[1] != self.dim):
            raise ValueError(f"expected queries of shape [Q, {self.dim}], got {list(queries.shape)}")
        if not np.isfinite(queries).all():
            raise ValueError("a query has NaN or infinite values; expected unit vectors")
        return queries

    def _search_all(self, queries: NDArray[np.float32], k: int, *, nprobe: int) -> Hits:
        found = [
            search_segment(segment, queries, min(k, segment.ntotal), nprobe=nprobe)
            for segment in self._segments
            if segment.ntotal
        ]
        return merge_hits(found, k)


def open_segments(
    layout: Layout,
    fingerprint: str,
    segments: Sequence[Segment],
    *,
    nprobe: int,
    cache_path: Path | None = None,
) -> SegmentSet:
    """Fetch segments and map them into memory.

    Args:
        layout: The index.
        fingerprint: Of the encoder that made them.
        segments: Which; at least one.
        nprobe: Lists that a search looks at in each; what a snapshot without segments says (0) counts as 1.
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
    return SegmentSet(paths, nprobe=max(nprobe, 1))


def search_images(
    segments: SegmentSet,
    query: NDArray[np.floating],
    k: int,
    *,
    exact: Exact | None,
    exclude_image_ids: NDArray[np.int64] | None = None,
    nprobe: int | None = None,
    probes_more: bool = True,
) -> RankedImages:
    """The k images with the highest score: k distinct ones, or all that the index has.

    Candidates are the max(4k, k + 100) images that the codes rank first, and all that they rank equal to
    the k-th. With the codec Flat and all lists looked at, the answer is that of a comparison with every
    vector, ties included.

    Args:
        segments: What is searched.
        query: [D], unit length.
        k: At least 1; may exceed the number of images.
        exact: Gives the stored vectors for the exact scores; None leaves the codec's scores.
        exclude_image_ids: Sorted; images that are never found.
        nprobe: Lists looked at in each segment to begin with.
        probes_more: Look at more lists if these hold too few images. A measure of `nprobe` itself must not.

    Raises:
        ValueError: k or nprobe is below 1, or the query has another dimension or a NaN.
    """
    query = np.asarray(query, np.float32)
    if query.ndim != 1 or k < 1:
        raise ValueError(f"expected one query [D] and k >= 1, got shape {list(query.shape)} and k = {k}")
    candidates, is_exhaustive = _gather(
        segments,
        query,
        k,
        exclude_image_ids=exclude_image_ids,
        nprobe=segments.nprobe if nprobe is None else nprobe,
        probes_more=probes_more,
    )
    ranked = candidates if exact is None else _rerank(candidates.image_ids, query, exact=exact)
    best = ranked.first(k)
    is_complete = len(best.image_ids) == k
    return RankedImages(*best, is_complete, is_exhaustive, num_candidates=len(candidates.image_ids))


class _Ranking(NamedTuple):
    image_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]

    def first(self, k: int) -> _Ranking:
        return _Ranking(self.image_ids[:k], self.slots[:k], self.scores[:k])


def _gather(
    segments: SegmentSet,
    query: NDArray[np.float32],
    k: int,
    *,
    exclude_image_ids: NDArray[np.int64] | None,
    nprobe: int,
    probes_more: bool,
) -> tuple[_Ranking, bool]:
    """The candidates by the codec's scores, and whether the whole index was looked at."""
    wanted = max(4 * k, k + 100)
    fetch = HITS_PER_IMAGE * wanted
    while True:
        hits = segments.search(query[None], fetch, exclude_image_ids=exclude_image_ids, nprobe=nprobe)
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
