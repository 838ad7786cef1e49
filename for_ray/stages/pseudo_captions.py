"""Pseudo-captions: captions → vectors, by Ray Data → an index of our own → the nearest of each image.

embed_captions   an actor pool: texts → unit vectors, which the driver keeps on its disk, 2 bytes a number
CaptionIndex     the driver: codec and segments as for images, on its disk; the codes find candidates, the
                 vectors rank them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation.similarity import VectorSets
from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.search import SegmentSet
from for_ray.index.segment import build_segment
from for_ray.model.bundle import Bundle
from for_ray.schema import image_ids_of, pack_vector_ids
from for_ray.stages.encode import Pool, actor_options, data_context, quiet_options

CAPTIONS_A_BLOCK = 2048

CANDIDATES = 4
"""Captions that the codes find, for each one that is wanted."""

IMAGES_AT_ONCE = 256

CHUNK_VECTORS = 1 << 16


def embed_captions(
    texts: Sequence[str],
    bundle: Bundle,
    pool: Pool,
    path: Path,
    *,
    device: str,
    on_progress: Callable[[int], None],
) -> NDArray[np.float16]:
    """Unit vectors of captions [C, D], in a file that is mapped.

    Args:
        texts: C captions, at least one.
        bundle: The encoder; files that it names must be where all workers reach them.
        pool: The actors.
        path: The file; the caller removes it.
        device: Where an actor computes.
        on_progress: Called with the number of captions that came through.
    """
    rows = pa.table({"row": np.arange(len(texts)), "text": pa.array(texts, pa.large_string())})
    vectors = np.memmap(path, np.float16, "w+", shape=(len(texts), bundle.dim))
    with DataContext.current(data_context()), quiet_options():
        found = (
            ray.data.from_arrow(rows)
            .repartition(target_num_rows_per_block=CAPTIONS_A_BLOCK)
            .map_batches(
                EmbedTexts,
                fn_constructor_args=(bundle, "cpu" if device == "cpu" else "auto"),
                batch_size=CAPTIONS_A_BLOCK,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
                num_gpus=pool.num_gpus,
                num_cpus=pool.num_cpus,
                ray_remote_args_fn=actor_options,
            )
        )
    num_done = 0
    for block in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        flat = block["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors[block["row"].to_numpy()] = flat.reshape(-1, bundle.dim)
        num_done += block.num_rows
        on_progress(num_done)
    return vectors


class EmbedTexts:
    """An encoder on its device: captions become unit vectors.

    Args:
        bundle: The encoder.
        device: Where it runs.
    """

    def __init__(self, bundle: Bundle, device: str) -> None:
        import torch

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(1)  # a CPU has an actor
        self._encoder = load_encoder(bundle, device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """`row` and `vector`, float16 [D], of a block of `row` and `text`."""
        vectors = self._encoder.embed_captions(block["text"].to_pylist()).astype(np.float16)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.table({"row": block["row"], "vector": values})


@dataclass(frozen=True)
class Nearest:
    """The nearest captions of B images, the nearest first.

    Attributes:
        of_image: Rows of captions; may be empty.
        cosines: Of these, exact, float32.
    """

    of_image: Ragged
    cosines: NDArray[np.float32]


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

    def close(self) -> None:
        """Give back the files' memory; not to be searched again."""
        self._segments.close()

    def _batches(self, first: int, end: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        for start in range(first, end, CHUNK_VECTORS):
            rows = np.arange(start, min(end, start + CHUNK_VECTORS))
            yield pack_vector_ids(rows, np.zeros_like(rows)), self._vectors[rows[0] : rows[-1] + 1]

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
            found = self._segments.search(queries, CANDIDATES * most) if len(queries) else None
            for place, has_vector in enumerate(np.diff(edges) > 0):
                query = int(edges[place] - edges[0])
                ids = found.vector_ids[query] if found is not None and has_vector else np.empty(0, np.int64)
                near, exact = self._rank(queries[query] if has_vector else None, image_ids_of(ids[ids >= 0]))
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
        self, query: NDArray[np.float32] | None, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Captions by their exact cosines, ties by their rows."""
        if query is None or not len(rows):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        rows = np.sort(rows)
        exact = self._vectors[rows].astype(np.float32) @ query
        order = np.argsort(-exact, kind="stable")
        return rows[order], exact[order]
