"""Small indexes of clustered unit vectors, with image ids above 2^40."""

from __future__ import annotations

import contextlib
import itertools
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.plan import IndexPlan, plan_index
from for_ray.index.segment import build_segment
from for_ray.schema import pack_vector_ids

FIRST_ID = 1 << 40


class Images(NamedTuple):
    """Image ids [B], offsets [B + 1], vectors [n, D] float16: what `images.lance` holds."""

    image_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    vectors: NDArray[np.float16]

    @property
    def vector_ids(self) -> NDArray[np.int64]:
        counts = np.diff(self.offsets)
        slots = np.arange(len(self.vectors)) - np.repeat(self.offsets[:-1], counts)
        return pack_vector_ids(np.repeat(self.image_ids, counts), slots)

    def take(self, image_ids: NDArray[np.int64]) -> Images:
        rows = np.searchsorted(self.image_ids, image_ids)
        assert (self.image_ids[rows] == image_ids).all()
        vectors = [self.vectors[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        offsets = np.cumsum([0, *map(len, vectors)])
        return Images(image_ids, offsets, np.concatenate([self.vectors[:0], *vectors]))


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def make_images() -> Callable[..., Images]:
    """Images with 0 to `max_slots` slots each, around 20 centres."""

    def make(num_images: int, *, dim: int = 16, max_slots: int = 8, seed: int = 0) -> Images:
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, max_slots + 1, num_images)
        centres = rng.normal(size=(20, dim))
        vectors = centres[rng.integers(0, 20, counts.sum())] + 0.5 * rng.normal(size=(counts.sum(), dim))
        ids = FIRST_ID + np.sort(rng.choice(10 * num_images, num_images, replace=False))
        return Images(ids, np.cumsum([0, *counts]), unit(vectors).astype(np.float16))

    return make


@pytest.fixture
def make_queries() -> Callable[..., NDArray[np.float32]]:
    def make(num_queries: int, *, dim: int = 16, seed: int = 1) -> NDArray[np.float32]:
        return unit(np.random.default_rng(seed).normal(size=(num_queries, dim)))

    return make


class Built(NamedTuple):
    plan: IndexPlan
    codec_path: Path
    paths: list[Path]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Built]:
    """Train a codec on the images' vectors and write them as segments, split by image."""

    def make(images: Images, codec: str = "IVF8,Flat", *, cuts: Sequence[int] = (), name: str = "a") -> Built:
        plan = plan_index(len(images.vectors), images.vectors.shape[1], codec=codec)
        codec_path = tmp_path / f"{name}-codec.faiss"
        sample = images.vectors.astype(np.float32)
        codec_path.write_bytes(codec_to_bytes(train_codec(sample, plan, threads=1)))
        paths = []
        edges = [0, *cuts, len(images.image_ids)]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            rows = slice(int(images.offsets[start]), int(images.offsets[end]))
            paths.append(tmp_path / f"{name}-{number}.faiss")
            batches = [(images.vector_ids[rows], images.vectors[rows])]
            build_segment(codec_path, batches, paths[-1], threads=1)
        return Built(plan, codec_path, paths)

    return make


@pytest.fixture
def little_space() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Inside, this process can write no file with more bytes, as on a disk that gets full."""

    @contextlib.contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
