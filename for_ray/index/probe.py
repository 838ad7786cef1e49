"""Search one segment in the lists of a query, and merge its hits with others'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.index.selection import Part
from for_ray.schema import image_ids_of


class Hits(NamedTuple):
    """The best vectors of each query: scores [Q, R], descending, and vector ids [Q, R].

    Scores are the codec's approximation of the cosine. Where a query has fewer than R hits, the rest of its
    row is -inf and -1.
    """

    scores: NDArray[np.float32]
    vector_ids: NDArray[np.int64]


class Searchable(Protocol):
    """What is searched as one index: segments in this process, or shards in others."""

    @property
    def dim(self) -> int:
        """D; 0 where there is no segment."""

    @property
    def nlist(self) -> int:
        """Lists of the codec; 0 where there is no segment."""

    @property
    def nprobe(self) -> int:
        """Lists that a search looks at in each segment, where it does not say."""

    @property
    def num_vectors(self) -> int:
        """In all segments, those of images that are gone among them."""

    def close(self) -> None:
        """Give back memory and processes; not to be searched again."""

    def search(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        exclude_image_ids: NDArray[np.int64] | None = None,
        only_image_ids: NDArray[np.int64] | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """As `search.SegmentSet.search`: the k best vectors of each query, of images that may be found."""


def checked_queries(
    queries: NDArray[np.floating], k: int, *, dim: int, nprobe: int = 1
) -> NDArray[np.float32]:
    """Queries as FAISS takes them; any dimension where `dim` is 0, since nothing is there.

    Raises:
        ValueError: k or nprobe is below 1, or the queries have another dimension or a NaN.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or (dim and queries.shape[1] != dim):
        raise ValueError(f"expected queries of shape [Q, {dim}], got {list(queries.shape)}")
    if not np.isfinite(queries).all():
        raise ValueError("a query has NaN or infinite values; expected unit vectors")
    if k < 1 or nprobe < 1:
        raise ValueError(f"expected k >= 1 and nprobe >= 1, got {k} and {nprobe}")
    return queries


class Probes(NamedTuple):
    """Queries as the codec sees them [Q, D'], and the lists that each looks at [Q, nprobe], nearest first."""

    queries: NDArray[np.float32]
    similarity: NDArray[np.float32]
    lists: NDArray[np.int64]


def choose_lists(segment: faiss.Index, queries: NDArray[np.float32], nprobe: int) -> Probes:
    """Transform queries and choose their lists: the same for all segments of a codec."""
    ivf = faiss.extract_index_ivf(segment)
    nprobe = min(nprobe, ivf.nlist)
    if isinstance(segment, faiss.IndexPreTransform):
        for position in range(segment.chain.size()):
            queries = faiss.downcast_VectorTransform(segment.chain.at(position)).apply(queries)
    quantizer = faiss.downcast_index(ivf.quantizer)
    is_graph = isinstance(quantizer, faiss.IndexHNSW)
    if is_graph and nprobe == ivf.nlist:
        # A graph's search may miss a list; to look at all of them, ask its centroids one by one.
        quantizer = faiss.downcast_index(quantizer.storage)
        is_graph = False
    graph = {"params": faiss.SearchParametersHNSW(efSearch=2 * nprobe)} if is_graph else {}
    return Probes(queries, *quantizer.search(queries, nprobe, **graph))


def search_segment(segment: faiss.Index, probes: Probes, k: int, part: Part) -> Hits:
    """The k best vectors of each query that may be found; -1 and any score where there are fewer.

    With parameters of its own: the shared index is never changed.
    """
    if part.allows is None:
        return _search_lists(segment, probes, min(k, segment.ntotal), part.selector)
    fetch = min(k, segment.ntotal)
    while True:
        found = _search_lists(segment, probes, fetch, None)
        kept = _drop(found, ~part.allows(image_ids_of(found.vector_ids)))
        lacking = (kept.vector_ids >= 0).sum(axis=1) < k
        if fetch == segment.ntotal or not (lacking & (found.vector_ids[:, -1] >= 0)).any():
            return Hits(kept.scores[:, :k], kept.vector_ids[:, :k])
        fetch = min(2 * fetch, segment.ntotal)


def _search_lists(segment: faiss.Index, probes: Probes, k: int, selector: faiss.IDSelector | None) -> Hits:
    ivf = faiss.extract_index_ivf(segment)
    queries, similarity, lists = probes
    scores = np.empty((len(queries), k), np.float32)
    vector_ids = np.empty((len(queries), k), np.int64)
    ivf.search_preassigned_c(
        len(queries),
        faiss.swig_ptr(queries),
        k,
        *map(faiss.swig_ptr, (lists, similarity, scores, vector_ids)),
        False,
        faiss.SearchParametersIVF(nprobe=lists.shape[1], sel=selector),
    )
    return Hits(scores, vector_ids)


def _drop(hits: Hits, is_dropped: NDArray[np.bool_]) -> Hits:
    scores = np.where(is_dropped, -np.inf, hits.scores).astype(np.float32)
    vector_ids = np.where(is_dropped, -1, hits.vector_ids)
    return _take(Hits(scores, vector_ids), np.argsort(vector_ids < 0, axis=1, kind="stable"))


def trim_hits(hits: Hits, k: int) -> Hits:
    """The first k columns, without those in which no query has a hit."""
    width = min(k, int((hits.vector_ids >= 0).sum(axis=1).max(initial=0)))
    return Hits(hits.scores[:, :width], hits.vector_ids[:, :width])


def no_hits(num_queries: int) -> Hits:
    """Of as many queries, none a hit."""
    return Hits(np.empty((num_queries, 0), np.float32), np.empty((num_queries, 0), np.int64))


def merge_hits(found: Sequence[Hits], k: int) -> Hits:
    """The k best of several segments' hits; equal scores by vector id. Columns without a hit are left out."""
    scores = np.concatenate([hits.scores for hits in found], axis=1)
    vector_ids = np.concatenate([hits.vector_ids for hits in found], axis=1)
    # FAISS gives "none" the lowest float32.
    scores[vector_ids < 0] = -np.inf
    best = _best_columns(Hits(scores, vector_ids), k)
    return trim_hits(_take(best, np.lexsort((best.vector_ids, -best.scores), axis=1)), k)


def _best_columns(hits: Hits, k: int) -> Hits:
    """The k best of each query, and all that tie with the last of them, in no order.

    Many segments give many times k hits, and to sort them all would take longer than to find them.
    """
    num_hits = hits.scores.shape[1]
    if num_hits <= k:
        return hits
    last = np.partition(hits.scores, num_hits - k, axis=1)[:, num_hits - k, None]
    num_kept = int((hits.scores >= last).sum(axis=1).max())
    return _take(hits, np.argpartition(hits.scores, num_hits - num_kept, axis=1)[:, num_hits - num_kept :])


def _take(hits: Hits, order: NDArray[np.int64]) -> Hits:
    scores = np.take_along_axis(hits.scores, order, axis=1)
    return Hits(scores, np.take_along_axis(hits.vector_ids, order, axis=1))


def check_same_codec(segments: Sequence[faiss.Index], paths: Sequence[Path]) -> None:
    """FAISS's own check for merging: dimension, lists, code and every centroid."""
    for segment, path in zip(segments[1:], paths[1:], strict=True):
        try:
            segments[0].check_compatible_for_merge(segment)
        except RuntimeError as error:
            reason = " ".join(str(error).rsplit("Error: ", 1)[-1].split())
            raise DataError(
                f"{path} is of another codec than {paths[0]} ({reason}); "
                "the segments of one snapshot share one codec, build the index again"
            ) from error
