"""RaBitQ's codes of several bits, computed for many vectors at once, in FAISS's layout.

A code is a vector's direction from its centroid: each value's sign, and the steps of its size on a scale of
the vector's own. FAISS looks for the scale one vector at a time, through a queue of all values' steps, 30 µs
of a core for 256 values at 4 bits, and begins above the best scale of every second vector. Here some scales
are tried for a block of vectors at once: the code is as near to the vector or nearer, FAISS searches it like
its own.

Source: Gao et al., "Practical and Asymptotically Optimal Quantization of High-Dimensional Vectors in
Euclidean Space for Approximate Nearest Neighbor Search", SIGMOD 2025; the layout is that of faiss 1.15's
`RaBitQuantizer`, in whose files it lies on disk.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray

BLOCK_VALUES = 1 << 17
"""That a thread works on at once: 512 KB, so that they stay in its cache."""

LEAST_SCALE, MOST_SCALE, NUM_SCALES = 0.9, 3.0, 8
"""The scales tried first, by equal ratios. At 1 the largest value takes the last step, just so: the best one
is less where there are few values, and more where there are many and few bits."""

NUM_NEARER = 4
"""Scales tried then, between the best one and its neighbours. Of 32, 256 and 1024 values, normal, Laplace and
t(4), both together leave 0.01 of the error 1 - cos that is more than the best scale's at 2 to 4 bits, 0.06 at
6 and 8; FAISS's queue leaves 0.17 at 4 bits."""

ERROR_FACTOR = 1.9
"""ε₀ of the paper: a bound on the error by the signs alone holds for all but a few of the vectors."""

TINY = 1e-10
"""Instead of a length of 0: of a vector that is its centroid, whose factors are 0 then."""

SIGN_FACTORS, STEP_FACTORS = 3, 2
"""float32 behind the signs and behind the steps."""


def encodes(ivf: faiss.IndexIVF) -> bool:
    """Whether `add_encoded` knows the code of this inverted file."""
    if not isinstance(ivf, faiss.IndexIVFRaBitQ) or ivf.rabitq.nb_bits < 2:
        return False
    # FAISS gives another layout another size, or a class of its own.
    return int(ivf.code_size) == _code_bytes(int(ivf.d), int(ivf.rabitq.nb_bits))


def add_encoded(
    ivf: faiss.IndexIVFRaBitQ, vectors: NDArray[np.float32], vector_ids: NDArray[np.int64], *, threads: int
) -> None:
    """Add vectors to their nearest lists, as `ivf.add_with_ids` does.

    Args:
        ivf: A trained inverted file that `encodes`, metric inner product.
        vectors: [n, d], as the lists hold them: a transform before them is done.
        vector_ids: [n].
        threads: That encode; FAISS's own are set elsewhere.
    """
    lists = ivf.quantizer.assign(vectors, 1).ravel()  # [n]
    codes = encode(vectors, ivf.quantizer.reconstruct_batch(lists), bits=ivf.rabitq.nb_bits, threads=threads)
    # The list stands before the code, as many bytes as nlist takes, the least significant first.
    numbers = lists[:, None].view(np.uint8)[:, : ivf.coarse_code_size()]
    ivf.add_sa_codes(np.concatenate([numbers, codes], axis=1), vector_ids)


def encode(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], *, bits: int, threads: int
) -> NDArray[np.uint8]:
    """Codes for the inner product with vectors, given the centroids of their lists.

    Each vector's code is the same whatever vectors stand beside it.

    Args:
        vectors: [n, d].
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
        encode_one = partial(_encode_block, vectors, centroids, codes, bits)
        list(pool.map(encode_one, blocks))
    return codes


def _code_bytes(dim: int, bits: int) -> int:
    return -(-dim // 8) + 4 * SIGN_FACTORS + -(-dim * (bits - 1) // 8) + 4 * STEP_FACTORS


def _encode_block(
    vectors: NDArray[np.float32],
    centroids: NDArray[np.float32],
    codes: NDArray[np.uint8],
    bits: int,
    block: slice,
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
    scales = np.geomspace(LEAST_SCALE, MOST_SCALE, NUM_SCALES, dtype=np.float32)
    buffer = np.empty_like(size)
    best, cosine = unit, np.full(len(size), -1, np.float32)

    def try_scales(around: NDArray[np.float32], factors: NDArray[np.float32]) -> None:
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
    """What FAISS reckons a first distance and its bound with, by the signs alone [n, 3]."""
    dim = x.shape[1]
    along = np.maximum(size.sum(axis=1), 1)  # √d · cosine of the signs with the residual, 1 to √d
    wide = np.sqrt(np.maximum(dim / (along * along) - 1, 0) / max(dim - 1, 1))
    return np.stack(
        [norm * norm - _dot(x, x), norm * np.float32(dim**0.5) / along, ERROR_FACTOR * norm * wide], axis=1
    )


def _pack(steps: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The lowest bits of each value [n, d], one value after the other."""
    each = np.unpackbits(steps[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(steps), -1), axis=1, bitorder="little")


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = np.einsum("nd,nd->n", a, b)
    return product
