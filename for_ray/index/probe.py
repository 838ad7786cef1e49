"""One segment's search, and what its hits become together with others'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.schema import image_ids_of


class Hits(NamedTuple):
    """The best vectors of each query: scores [Q, R], descending, and vector ids [Q, R].

    Scores are the codec's approximation of the cosine. Where a query has fewer than R hits, the rest of its
    row is -inf and -1.
    """

    scores: NDArray[np.float32]
    vector_ids: NDArray[np.int64]


def search_segment(segment: faiss.Index, queries: NDArray[np.float32], k: int, *, nprobe: int) -> Hits:
    """FAISS's search with parameters of its own: the shared index is never changed."""
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
    similarity, lists = quantizer.search(queries, nprobe, **graph)
    scores = np.empty((len(queries), k), np.float32)
    vector_ids = np.empty((len(queries), k), np.int64)
    ivf.search_preassigned_c(
        len(queries),
        faiss.swig_ptr(queries),
        k,
        *map(faiss.swig_ptr, (lists, similarity, scores, vector_ids)),
        False,
        _parameters(ivf, nprobe),
    )
    return Hits(scores, vector_ids)


def _parameters(ivf: faiss.IndexIVF, nprobe: int) -> faiss.SearchParametersIVF:
    if isinstance(ivf, faiss.IndexIVFRaBitQ):
        return faiss.IVFRaBitQSearchParameters(nprobe=nprobe)
    return faiss.SearchParametersIVF(nprobe=nprobe)


def drop_images(hits: Hits, image_ids: NDArray[np.int64]) -> Hits:
    """Turn hits of these images into "none" and move those behind the others."""
    is_dropped = np.isin(image_ids_of(hits.vector_ids), image_ids)
    scores = np.where(is_dropped, -np.inf, hits.scores).astype(np.float32)
    vector_ids = np.where(is_dropped, -1, hits.vector_ids)
    return _take(Hits(scores, vector_ids), np.argsort(vector_ids < 0, axis=1, kind="stable"))


def trim_hits(hits: Hits, k: int) -> Hits:
    """The first k columns, without those in which no query has a hit."""
    width = min(k, int((hits.vector_ids >= 0).sum(axis=1).max()))
    return Hits(hits.scores[:, :width], hits.vector_ids[:, :width])


def merge_hits(found: Sequence[Hits], k: int) -> Hits:
    """The k best of several segments' hits; equal scores by vector id."""
    scores = np.concatenate([hits.scores for hits in found], axis=1)
    vector_ids = np.concatenate([hits.vector_ids for hits in found], axis=1)
    # FAISS gives "none" the lowest float32.
    scores[vector_ids < 0] = -np.inf
    return _take(Hits(scores, vector_ids), np.lexsort((vector_ids, -scores), axis=1)[:, :k])


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
