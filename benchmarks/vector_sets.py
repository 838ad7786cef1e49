"""Vectors to build indexes of: made up like embeddings, or the picture book's; and the truth.

A set is a folder that a later run finds again: `vectors/vectors.npy` [n, D], float16, in no order;
`queries.npy` [Q, D], float32, none of them in the set; `exact.npy` [Q, 50], the rows that exact search ranks
first. All of unit length.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RANKED = 50
NUM_QUERIES = 500
CHUNK = 1 << 16

VECTORS_PER_DIRECTION = 100
SIZE_EXPONENT = 0.7
"""The i-th largest cluster has i^-0.7 of the largest one's vectors."""

RADIUS, RADIUS_SPREAD = 0.7, 0.3
"""Log-normal over the clusters: how far vectors lie from their direction, by how far directions lie apart."""

SPECTRUM_EXPONENT = 0.25
"""The i-th of D axes spreads by i^-0.25 of the first one: few axes say most."""

CONE = 0.5
"""How far the mean of all lies from the origin: embeddings of one model fill a cone."""


class VectorSet(NamedTuple):
    """A set on disk."""

    name: str
    folder: Path

    @property
    def path(self) -> Path:
        """Of the vectors."""
        return self.folder / "vectors" / "vectors.npy"

    @property
    def vectors(self) -> NDArray[np.float16]:
        """[n, D], mapped into memory."""
        mapped: NDArray[np.float16] = np.load(self.path, mmap_mode="r")
        return mapped

    @property
    def queries(self) -> NDArray[np.float32]:
        """[Q, D]."""
        loaded: NDArray[np.float32] = np.load(self.folder / "queries.npy")
        return loaded

    @property
    def exact(self) -> NDArray[np.int64]:
        """[Q, 50]."""
        loaded: NDArray[np.int64] = np.load(self.folder / "exact.npy")
        return loaded


class Scattered:
    """Where vectors of a made-up set come from: clusters of many sizes, wide along few axes, within a cone.

    Args:
        num_vectors: For how many; there is a cluster for each hundred.
        dim: D.
        seed: Of the clusters.
    """

    def __init__(self, num_vectors: int, dim: int, *, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        num_directions = max(1, num_vectors // VECTORS_PER_DIRECTION)
        spread = (1.0 + np.arange(dim)) ** -SPECTRUM_EXPONENT
        self._spread = random.permutation(spread / np.linalg.norm(spread)).astype(np.float32)
        mean = CONE * unit(random.standard_normal((1, dim), np.float32))
        self._directions = mean + self._spread * random.standard_normal((num_directions, dim), np.float32)
        self._radii = (RADIUS * np.exp(RADIUS_SPREAD * random.standard_normal(num_directions))).astype(
            np.float32
        )
        sizes = (1.0 + np.arange(num_directions)) ** -SIZE_EXPONENT
        self._ends = np.cumsum(sizes / sizes.sum())
        self._ends[-1] = 1.0

    def draw(self, count: int, *, seed: int) -> NDArray[np.float32]:
        """Vectors [n, D] of unit length, in no order; the same seed gives the same."""
        random = np.random.default_rng(seed)
        which = np.searchsorted(self._ends, random.random(count), side="right")
        vectors = random.standard_normal((count, len(self._spread)), np.float32)
        vectors *= self._radii[which, None] * self._spread
        vectors += self._directions[which]
        return unit(vectors)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors [n, D] with length 1."""
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def scattered_set(folder: Path, num_vectors: int, dim: int) -> VectorSet:
    """The made-up set of this size, from the folder if it is there."""

    def write(path: Path) -> NDArray[np.float32]:
        source = Scattered(num_vectors, dim)
        vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_vectors, dim))
        for start in range(0, num_vectors, CHUNK):
            vectors[start : start + CHUNK] = source.draw(min(CHUNK, num_vectors - start), seed=1 + start)
        vectors.flush()
        return source.draw(NUM_QUERIES, seed=num_vectors + 1)

    return _kept(VectorSet("clustered", folder / f"clustered-{num_vectors}-{dim}"), write)


def picture_book_set(folder: Path, num_images: int) -> VectorSet:
    """The picture book's val split by the package's encoder, from the folder if it is there.

    Queries are names of ImageNet-21K and slots of another split's images, as many of each.
    """

    def write(path: Path) -> NDArray[np.float32]:
        from for_ray.datasets.picturebook import write_picturebook
        from for_ray.datasets.vocabulary import imagenet21k_names
        from for_ray.model.bundle import open_bundle
        from for_ray.model.encoder import load_encoder

        encoder, half = load_encoder(open_bundle("picturebook"), "cpu"), NUM_QUERIES // 2
        names = imagenet21k_names()
        said = encoder.embed_text(names[:: len(names) // half][:half])
        with tempfile.TemporaryDirectory() as pages:
            stored = _embed(encoder, write_picturebook(Path(pages) / "val", images=num_images, split="val"))
            others = write_picturebook(Path(pages) / "train", images=half, split="train")
            seen = _embed(encoder, others).astype(np.float32)
        order = np.random.default_rng(0)
        np.save(path, order.permutation(stored))
        return unit(np.concatenate([np.asarray(said, np.float32), order.permutation(seen)[:half]]))

    return _kept(VectorSet("picture book", folder / f"picturebook-{num_images}"), write)


def _embed(encoder: object, annotations: Path) -> NDArray[np.float16]:
    """The stored slots [n, D] of all images of a drawn set."""
    from benchmarks.codec_bits import read
    from for_ray.model.encoder import Encoder

    assert isinstance(encoder, Encoder)
    parts = []
    for pixels in read(encoder, sorted((annotations.parent / "images").iterdir())):
        encoded = encoder.encode(pixels)
        parts.append(encoded.vectors[encoded.keep].half().numpy())
    return np.concatenate(parts)


def _kept(made: VectorSet, write: Callable[[Path], NDArray[np.float32]]) -> VectorSet:
    """The set, written unless it is there whole: the exact answers come last."""
    if not (made.folder / "exact.npy").exists():
        shutil.rmtree(made.folder, ignore_errors=True)
        made.path.parent.mkdir(parents=True)
        queries = write(made.path)
        np.save(made.folder / "queries.npy", queries)
        exact = exact_rows(read_rows(made.path), queries, RANKED)
        part = made.folder / "part.npy"
        np.save(part, exact)
        part.rename(made.folder / "exact.npy")
    return made


def read_rows(path: Path, *, chunk: int = CHUNK) -> Iterator[NDArray[np.float16]]:
    """The rows of a float16 `.npy` [n, D], a chunk at a time, without mapping the file."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (count, dim), _, dtype = np.lib.format.read_array_header_1_0(file)
        for start in range(0, count, chunk):
            yield np.fromfile(file, dtype, min(chunk, count - start) * dim).reshape(-1, dim)


def exact_rows(
    chunks: Iterator[NDArray[np.float16]], queries: NDArray[np.float32], count: int
) -> NDArray[np.int64]:
    """The rows [Q, count] with the highest cosines, best first; -1 where there are fewer rows."""
    best = np.full((len(queries), count), -np.inf, np.float32)
    rows = np.full((len(queries), count), -1, np.int64)
    first = 0
    for chunk in chunks:
        scores = np.concatenate([best, queries @ chunk.astype(np.float32).T], axis=1)
        numbers = np.broadcast_to(np.arange(first, first + len(chunk)), (len(queries), len(chunk)))
        numbers = np.concatenate([rows, numbers], axis=1)
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best, rows = (np.take_along_axis(each, top, axis=1) for each in (scores, numbers))
        first += len(chunk)
    return np.take_along_axis(rows, np.argsort(-best, axis=1, kind="stable"), axis=1)


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Of the rows that exact search ranks first, the share that was found [Q, any]; mean over the queries."""
    shares = [np.isin(right[right >= 0], rows).mean() for rows, right in zip(found, exact, strict=True)]
    return float(np.mean(shares))
