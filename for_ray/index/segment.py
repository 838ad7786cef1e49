"""Vectors → one immutable FAISS file.

Memory: the codec, the codes in FAISS's lists, which double as they grow (twice the segment's bytes at most),
24 bytes a vector while ids are compared, and a chunk of float32 vectors three times: as given, rotated, and
their lists' centroids. `plan_index` cuts segments so that half of a task's memory holds the codec and the
lists.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import DataError, StorageError
from for_ray.index.codec import read_codec, write_index
from for_ray.index.rabitq import add_encoded, encodes
from for_ray.schema import image_ids_of, slots_of

CHUNK_VECTORS = 1 << 14
"""Vectors that are turned into float32 and added at once: 64 MB at 1024 dimensions. With a table's batches of
4096, each added by itself, `benchmarks/scale.py` took 1.1 to 1.25 times as long to build."""

TRANSFORMED_AT_ONCE = 1 << 11
"""Vectors that are rotated at once, in float64: 16 MB at 1024 dimensions, and as much for what comes out."""

LENGTH_TOLERANCE = 0.01
"""A unit vector rounded to float16 is off by 2^-11 of each value, so by less than 0.001 in length."""


class SegmentFile(NamedTuple):
    """What was written. `num_vectors` may be 0; `imbalance` is as in `schema.Segment`, 1 without vectors."""

    path: Path
    num_vectors: int
    num_bytes: int
    sha256: str
    imbalance: float


def build_segment(
    codec_path: Path,
    batches: Iterable[tuple[NDArray[np.int64], NDArray[np.floating]]],
    path: Path,
    *,
    threads: int,
) -> SegmentFile:
    """Add all vectors to the codec and write them; the file appears only when it is whole.

    Args:
        codec_path: The trained codec, read only.
        batches: Vector ids [n] and their unit vectors [n, D], float16 or float32; any order, each id once.
        path: Where the segment goes; replaced when it exists.
        threads: For FAISS and for the code.

    Raises:
        DataError: A vector is not finite or not of length 1, or an id comes twice: names image and slot.
        StorageError: The disk refused to take the file.
        ValueError: The vectors' dimension is not the codec's, or ids and vectors differ in number.
    """
    faiss.omp_set_num_threads(threads)
    index = read_codec(codec_path)
    ids = [np.empty(0, np.int64)]
    for vector_ids, vectors in _chunks(batches, dim=index.d):
        _check_values(vector_ids, vectors)
        add_vectors(index, vectors, vector_ids, threads=threads)
        ids.append(vector_ids.copy())
    _check_unique(np.concatenate(ids))
    return write_segment(index, path)


def add_vectors(
    index: faiss.Index, vectors: NDArray[np.float32], vector_ids: NDArray[np.int64], *, threads: int
) -> None:
    """Add vectors to their lists, by our own encoder where there is one.

    Args:
        index: A codec, or one that holds vectors already.
        vectors: Unit vectors [n, D].
        vector_ids: [n].
        threads: That encode; FAISS's own are set elsewhere, and numpy's by the task's CPUs.
    """
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    if not encodes(ivf):
        index.add_with_ids(vectors, vector_ids)
        return
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            vectors = _transform(faiss.downcast_VectorTransform(index.chain.at(number)), vectors)
    add_encoded(ivf, vectors, vector_ids, threads=threads)
    index.ntotal = ivf.ntotal


def _transform(transform: faiss.VectorTransform, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same for a vector whatever stands beside it, but for one value in 10⁸.

    So merged segments are those built at once. BLAS sums a row of a matrix's product in another order where
    the row stands elsewhere; here it does so in float64, and the sum is rounded once. The Hadamard rotation
    has one order.
    """
    if not isinstance(transform, faiss.LinearTransform):
        return np.asarray(transform.apply(vectors))
    shape = (transform.d_out, transform.d_in)
    matrix = faiss.vector_to_array(transform.A).reshape(shape).T.astype(np.float64)
    bias = faiss.vector_to_array(transform.b).astype(np.float64) if transform.have_bias else 0.0
    transformed = np.empty((len(vectors), transform.d_out), np.float32)
    for start in range(0, len(vectors), TRANSFORMED_AT_ONCE):
        rows = slice(start, start + TRANSFORMED_AT_ONCE)
        transformed[rows] = vectors[rows].astype(np.float64) @ matrix + bias
    return transformed


def write_segment(index: faiss.Index, path: Path) -> SegmentFile:
    """Write an index; the file appears only when it is whole.

    Raises:
        StorageError: The disk refused to take the file.
    """
    lists = faiss.extract_index_ivf(index).invlists
    sizes = np.fromiter(map(lists.list_size, range(lists.nlist)), np.int64, lists.nlist)
    return write_whole(path, sizes, lambda part: write_index(index, part))


def write_whole(path: Path, sizes: NDArray[np.int64], write: Callable[[Path], None]) -> SegmentFile:
    """Have a segment written beside its place, which it takes when it is whole.

    Args:
        path: The place; replaced when it exists.
        sizes: Of the segment's inverted lists [nlist].
        write: Writes a file with this name.

    Raises:
        StorageError: The disk refused to take the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        num_bytes = part.stat().st_size
        part.replace(path)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).rsplit("Error: ", 1)[-1].split())
        raise StorageError(
            f"cannot write segment {path}: {reason}; free space there, or set TMPDIR to a folder on another "
            "disk"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    num_vectors = int(sizes.sum())
    # FAISS's imbalance factor: nlist·Σ(n_i/n)².
    imbalance = len(sizes) * float(np.square(sizes, dtype=np.float64).sum()) / max(1, num_vectors) ** 2
    return SegmentFile(path, num_vectors, num_bytes, digest, imbalance if num_vectors else 1.0)


def _chunks(
    batches: Iterable[tuple[NDArray[np.int64], NDArray[np.floating]]], *, dim: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The vectors by `CHUNK_VECTORS`, however few a batch has; a chunk is overwritten by the next."""
    ids, vectors = np.empty(CHUNK_VECTORS, np.int64), np.empty((CHUNK_VECTORS, dim), np.float32)
    end = 0
    for batch_ids, batch in batches:
        _check_shapes(batch_ids, batch, dim=dim)
        for start in range(0, len(batch_ids), CHUNK_VECTORS):
            coming_ids, coming = (part[start : start + CHUNK_VECTORS] for part in (batch_ids, batch))
            if end + len(coming) > CHUNK_VECTORS:
                yield ids[:end], vectors[:end]
                end = 0
            new = slice(end, end + len(coming))
            ids[new], vectors[new] = coming_ids, coming
            end += len(coming)
    yield ids[:end], vectors[:end]


def _check_shapes(vector_ids: NDArray[np.int64], vectors: NDArray[np.floating], *, dim: int) -> None:
    if vectors.ndim != 2 or vectors.shape != (len(vector_ids), dim):
        expected = f"[{len(vector_ids)}, {dim}]"
        raise ValueError(f"expected vectors of shape {expected} for the codec, got {list(vectors.shape)}")
    if len(vector_ids) and vector_ids.min() < 0:
        raise ValueError(f"vector ids must not be negative, got {vector_ids.min()}")


def _check_values(vector_ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    # Written so that NaN fails too.
    bad = np.flatnonzero(~(np.abs(length - 1.0) <= LENGTH_TOLERANCE))
    if len(bad):
        name = _name(vector_ids[bad[0]])
        raise DataError(
            f"the vector of {name} has length {length[bad[0]]:.4g}, expected 1 "
            f"({len(bad)} of {len(vectors)} are wrong); encode these images again"
        )


def _check_unique(vector_ids: NDArray[np.int64]) -> None:
    vector_ids = np.sort(vector_ids)
    twice = np.flatnonzero(vector_ids[1:] == vector_ids[:-1])
    if len(twice):
        raise DataError(f"{_name(vector_ids[twice[0]])} comes twice; each vector belongs in one segment once")


def _name(vector_id: np.int64) -> str:
    one = np.asarray(vector_id)
    return f"image {int(image_ids_of(one))}, slot {int(slots_of(one))}"
