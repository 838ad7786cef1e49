"""Pseudo-captions: an index of our own on captions' vectors, and the nearest of each image.

The driver trains the codec and builds the segments, as for images, on its disk; the codes find candidates,
the vectors, which lie in a mapped file, rank them. How many lists are looked at is measured, as for images.

At 10⁷ captions of D = 1024: 5.5 GB of segments on the driver's disk beside the vectors (540 bytes a caption);
in memory 1.1 GB for the codec's sample, then 2 GB at most for a segment that is built.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation.exact import exact_top_images, recall_at_k
from for_ray.evaluation.similarity import VectorSets
from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.plan import DEFAULT_TARGET_RECALL, plan_index
from for_ray.index.search import SegmentSet
from for_ray.index.segment import build_segment
from for_ray.schema import image_ids_of, pack_vector_ids
from for_ray.stages.verify import LEAST_GAIN

NUM_ASKED = 64
"""Images that recall is measured with, all over the data set."""

CANDIDATES = 4
"""Captions that the codes find, for each one that is wanted."""

IMAGES_AT_ONCE = 256

CHUNK_VECTORS = 1 << 16


@dataclass(frozen=True)
class Nearest:
    """The nearest captions of B images, the nearest first.

    Attributes:
        of_image: Rows of captions; may be empty.
        cosines: Of these, exact, float32.
    """

    of_image: Ragged
    cosines: NDArray[np.float32]


class CaptionRecall(NamedTuple):
    """How well an index of captions finds.

    recall: Of the nearest captions of an image, as a comparison with all has them, the share that is found;
        the mean over the images that were asked for. None where there was none.
    nprobe: Lists that are looked at.
    """

    recall: float | None
    nprobe: int


class CaptionIndex:
    """Captions, found by their vectors.

    Args:
        vectors: Unit length [C, D], float16; C at least 1.
        folder: For its files; the caller removes it.
        threads: FAISS's.
    """

    def __init__(self, vectors: NDArray[np.float16], folder: Path, *, threads: int | None = None) -> None:
        self._vectors, threads = vectors, threads or len(os.sched_getaffinity(0))
        plan = plan_index(len(vectors), vectors.shape[1])
        step = max(1, len(vectors) // plan.training_vectors)
        sample = np.ascontiguousarray(vectors[::step][: plan.training_vectors], np.float32)
        codec_path = folder / "codec.faiss"
        codec_path.write_bytes(codec_to_bytes(train_codec(sample, plan, threads=threads)))
        paths = []
        for first in range(0, len(vectors), plan.vectors_per_segment):
            path = folder / f"segment-{first}.faiss"
            end = min(len(vectors), first + plan.vectors_per_segment)
            build_segment(codec_path, self._batches(first, end), path, threads=threads)
            paths.append(path)
        self._segments = SegmentSet(paths, nprobe=plan.nprobe, threads=threads)
        self._nprobe = plan.nprobe

    def measure(self, images: VectorSets, *, most: int) -> CaptionRecall:
        """Double the lists to look at until the nearest captions are found, or more lists find no more.

        Args:
            images: One vector each, or none; `NUM_ASKED` of them are asked for.
            most: Captions of an image.
        """
        num_vectors = len(images.vectors)
        places = np.linspace(0, num_vectors - 1, min(num_vectors, NUM_ASKED)).astype(np.int64)
        queries = images.vectors[places].astype(np.float32)
        if not len(queries):
            return CaptionRecall(None, self._nprobe)
        right = list(exact_top_images(self._exact_batches(), queries, most)[0])
        before = -1.0
        while True:
            found = [self._rank(query, ids)[0][:most] for query, ids in self._candidates(queries, most)]
            recall = recall_at_k(found, right)
            is_enough = recall >= DEFAULT_TARGET_RECALL or recall - before < LEAST_GAIN
            if is_enough or self._nprobe >= self._segments.nlist:
                return CaptionRecall(recall, self._nprobe)
            before, self._nprobe = recall, min(2 * self._nprobe, self._segments.nlist)

    def close(self) -> None:
        """Give back the files' memory; not to be searched again."""
        self._segments.close()

    def _batches(self, first: int, end: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        for start in range(first, end, CHUNK_VECTORS):
            rows = np.arange(start, min(end, start + CHUNK_VECTORS))
            yield pack_vector_ids(rows, np.zeros_like(rows)), self._vectors[rows[0] : rows[-1] + 1]

    def _exact_batches(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16]]]:
        for vector_ids, vectors in self._batches(0, len(self._vectors)):
            yield image_ids_of(vector_ids), np.arange(len(vectors) + 1), vectors

    def _candidates(
        self, queries: NDArray[np.float32], most: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Each query with the captions that the codes find for it."""
        found = self._segments.search(queries, CANDIDATES * most, nprobe=self._nprobe).vector_ids
        for query, ids in zip(queries, found, strict=True):
            yield query, image_ids_of(ids[ids >= 0])

    def nearest(
        self, images: VectorSets, *, threshold: float, most: int, on_progress: Callable[[int], None]
    ) -> Nearest:
        """The captions nearest to each image; an image without a vector has none.

        Args:
            images: One vector each, or none.
            threshold: Cosines at least this high count.
            most: Captions of an image, at most.
            on_progress: Called with the number of images that were looked up.
        """
        rows: list[NDArray[np.int32]] = []
        cosines: list[NDArray[np.float32]] = []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            edges = images.offsets[start : start + IMAGES_AT_ONCE + 1]
            queries = images.vectors[edges[0] : edges[-1]].astype(np.float32)
            candidates = self._candidates(queries, most) if len(queries) else iter(())
            for has_vector in np.diff(edges) > 0:
                near, exact = self._rank(*next(candidates)) if has_vector else _NOTHING
                is_near = exact[:most] >= threshold
                rows.append(near[:most][is_near].astype(np.int32))
                cosines.append(exact[:most][is_near])
            on_progress(len(rows))
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in rows])]).astype(np.int64)
        return Nearest(
            Ragged(offsets, np.concatenate([np.empty(0, np.int32), *rows])),
            np.concatenate([np.empty(0, np.float32), *cosines]),
        )

    def _rank(
        self, query: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Captions by their exact cosines, ties by their rows."""
        rows = np.sort(rows)
        exact = self._vectors[rows].astype(np.float32) @ query
        order = np.argsort(-exact, kind="stable")
        return rows[order], exact[order]


_NOTHING = (np.empty(0, np.int64), np.empty(0, np.float32))
"""The captions of an image without a vector."""
