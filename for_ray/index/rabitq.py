"""RaBitQ's codes of several bits, computed for many vectors at once, in FAISS's layout.

A code is a vector's direction from its centroid: each value's sign, and the steps of its size on a scale of
the vector's own. FAISS looks for the scale one vector at a time, through a queue of all values' steps, 30 µs
of a core for 256 values at 4 bits (`benchmarks/plan_rates.py`), and begins above the best scale of every
second of these. Here some scales are tried for a block of vectors at once. FAISS searches the codes like its
own.

Source: Gao et al., "Practical and Asymptotically Optimal Quantization of High-Dimensional Vectors in
Euclidean Space for Approximate Nearest Neighbor Search", SIGMOD 2025; layout and factors are those of faiss
1.15's `RaBitQuantizer`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import faiss
import numpy as np
from numpy.typing import NDArray

BLOCK_VALUES = 1 << 17
"""That a thread works on at once: arrays of 512 KB."""

LEAST_SCALE, NUM_SCALES = 0.9, 8
"""The scales tried first are so many, by equal ratios. At 1 the largest value would just leave the last step:
where values are few the best scale is less; where they are many it is more, the fewer bits the more."""

NUM_NEARER = 4
"""Scales tried then, between the best one and its neighbours. Of the error 1 - cos of 256 normal values, in
the mean, both together leave at most 0.6 % more than the best scale at 4 bits and 3 % at 8; FAISS's queue
leaves over 10 % more than these at 4 bits (all asserted in the tests)."""

ERROR_FACTOR = 1.9
"""FAISS's ε₀: the bound on what the signs alone get wrong, which holds for nearly all vectors. Source: Gao,
Long, "RaBitQ", SIGMOD 2024."""

TINY = 1e-10
"""Instead of a length of 0: of a vector that is its centroid, which gets the centroid's score."""

SIGN_FACTORS, STEP_FACTORS = 3, 2
"""float32 behind the signs and behind the steps."""

NUM_PROBES, MOST_ERROR = 64, 2.0
"""Vectors that a FAISS is tried with, and how much worse than its own codes' our codes' scores may be: other
factors make them worse by far, other scales by a few hundredths."""


def encodes(ivf: faiss.IndexIVF) -> bool:
    """Whether `add_encoded` knows the code of this inverted file, downcast, and this FAISS reads it as it is.

    Its versions have given the factors other meanings under the same name and size (faiss pull request 4877),
    so it is tried.
    """
    if not isinstance(ivf, faiss.IndexIVFRaBitQ) or ivf.metric_type != faiss.METRIC_INNER_PRODUCT:
        return False
    dim, bits = int(ivf.d), int(ivf.rabitq.nb_bits)
    return bits > 1 and int(ivf.code_size) == _code_bytes(dim, bits) and _scores_right(dim, bits)


@cache
def _scores_right(dim: int, bits: int) -> bool:
    """Whether FAISS's scores of our codes are about as right as those of its own."""
    random = np.random.default_rng(0)
    centroid, vectors, queries = (
        random.standard_normal((num, dim), np.float32) / dim**0.5 for num in (1, NUM_PROBES, NUM_PROBES)
    )
    errors = []
    for adds_ours in (True, False):
        index = faiss.index_factory(dim, f"IVF1,RaBitQ{bits}", faiss.METRIC_INNER_PRODUCT)
        index.quantizer.add(centroid)
        index.is_trained = True
        if adds_ours:
            add_encoded(index, vectors, np.arange(NUM_PROBES), threads=1)
        else:
            index.add(vectors)
        scores, ids = index.search(queries, NUM_PROBES)
        right = np.take_along_axis(queries @ vectors.T, np.maximum(ids, 0), axis=1)
        errors.append(float(np.abs(scores - right)[ids >= 0].mean()))
    return errors[0] <= MOST_ERROR * errors[1]


def add_encoded(
    ivf: faiss.IndexIVFRaBitQ, vectors: NDArray[np.float32], vector_ids: NDArray[np.int64], *, threads: int
) -> None:
    """Add vectors to their nearest lists, as `ivf.add_with_ids` does.

    Args:
        ivf: A trained inverted file that `encodes`.
        vectors: [n, d], as the lists hold them: a transform before them is done.
        vector_ids: [n].
        threads: That encode; FAISS's own are set elsewhere.

    Raises:
        ValueError: A vector is nearest to no list: it is not finite.
    """
    lists = ivf.quantizer.assign(vectors, 1).ravel()  # [n]
    if lists.min(initial=0) < 0:
        raise ValueError("vectors that are not finite have no list")
    codes = encode(vectors, ivf.quantizer.reconstruct_batch(lists), bits=ivf.rabitq.nb_bits, threads=threads)
    # The list stands before the code, as many bytes as nlist takes, the least significant first.
    numbers = lists.astype("<i8")[:, None].view(np.uint8)[:, : ivf.coarse_code_size()]
    ivf.add_sa_codes(np.concatenate([numbers, codes], axis=1), vector_ids)


def encode(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], *, bits: int, threads: int
) -> NDArray[np.uint8]:
    """Codes for the inner product with vectors, given the centroids of their lists.

    Each vector's code is the same whatever vectors stand beside it.

    Args:
        vectors: [n, d], row by row in memory like the next.
        centroids: Of the vectors' lists [n, d].
        bits: Of a value, 2 to 9.
        threads: That work on blocks of vectors.

    Returns:
        [n, bytes]: signs, three float32, steps of `bits` - 1 bits, two float32.
    """
    dim = vectors.shape[1]
    codes = np.empty((len(vectors), _code_bytes(dim, bits)), np.uint8)
    rows = max(1, BLOCK_VALUES // dim)
    blocks = [slice(start, start + rows) for start in range(0, len(vectors), rows)]
    with ThreadPoolExecutor(threads) as pool:
        encode_one = partial(_encode_block, vectors, centroids, codes=codes, bits=bits)
        list(pool.map(encode_one, blocks))
    return codes


def _code_bytes(dim: int, bits: int) -> int:
    return -(-dim // 8) + 4 * SIGN_FACTORS + -(-dim * (bits - 1) // 8) + 4 * STEP_FACTORS


def _encode_block(
    vectors: NDArray[np.float32],
    centroids: NDArray[np.float32],
    block: slice,
    *,
    codes: NDArray[np.uint8],
    bits: int,
) -> None:
    """Write the codes of a block of vectors."""
    x, centroid = vectors[block], centroids[block]
    residual = x - centroid
    norm = np.sqrt(_dot(residual, residual))
    size = np.abs(residual)
    size /= np.maximum(norm, TINY)[:, None]
    steps = _steps(size, bits)
    is_positive = residual > 0
    along = _dot(steps + np.float32(0.5), size)  # ⟨code, residual⟩ / |residual|
    # Of a negative value all bits are turned round, the sign's too: codes are in the order of the values.
    steps ^= (~is_positive).view(np.uint8) * np.uint8((1 << (bits - 1)) - 1)
    factors = np.stack([_dot(centroid, residual), norm / np.maximum(along, TINY)], axis=1)
    parts = [
        np.packbits(is_positive, axis=1, bitorder="little"),
        _sign_factors(x, size, norm).view(np.uint8),
        _pack(steps, bits - 1),
        factors.view(np.uint8),
    ]
    np.concatenate(parts, axis=1, out=codes[block])


def _steps(size: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """The steps of each value [n, d] on the scale that turns a vector least; `size` has length 1."""
    last = (1 << (bits - 1)) - 1
    unit = (last + 1) / np.maximum(size.max(axis=1), TINY)
    scales = np.geomspace(LEAST_SCALE, 1 + 8 / (last + 1), NUM_SCALES, dtype=np.float32)
    buffer = np.empty_like(size)
    best, cosine = unit, np.full(len(size), -1, np.float32)

    def try_scales(around: NDArray[np.float32], factors: NDArray[np.float32]) -> None:
        """Take each vector's scale [n] times the factors; the one that turned it least so far is kept."""
        nonlocal best, cosine
        for factor in factors:
            scale = around * factor
            np.multiply(size, scale[:, None], out=buffer)
            np.clip(np.floor(buffer, out=buffer), 0, last, out=buffer)
            np.add(buffer, 0.5, out=buffer)
            tried = _dot(buffer, size) / np.sqrt(_dot(buffer, buffer))
            best = np.where(tried > cosine, scale, best)
            cosine = np.maximum(tried, cosine)

    try_scales(unit, scales)
    ratio = scales[1] / scales[0]
    apart = np.linspace(-1, 1, NUM_NEARER + 2, dtype=np.float32)[1:-1]
    try_scales(best, ratio**apart)
    chosen: NDArray[np.uint8] = np.minimum(size * best[:, None], last).astype(np.uint8)
    return chosen


def _sign_factors(
    x: NDArray[np.float32], size: NDArray[np.float32], norm: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What FAISS reckons a first score and its bound with, by the signs alone [n, 3]."""
    dim = x.shape[1]
    along = np.maximum(size.sum(axis=1), 1)  # √d · cosine of the signs with the residual, 1 to √d
    wide = np.sqrt(np.maximum(dim / (along * along) - 1, 0) / max(dim - 1, 1))
    return np.stack(
        [norm * norm - _dot(x, x), norm * np.float32(dim**0.5) / along, ERROR_FACTOR * norm * wide], axis=1
    )


def _pack(steps: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The lowest bits of each value [n, d], one value after the other."""
    each = (steps[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(each.reshape(len(steps), -1), axis=1, bitorder="little")


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = np.einsum("nd,nd->n", a, b)
    return product
