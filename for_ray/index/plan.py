"""From the number of vectors to the layout of the index: codec, lists, segments, bytes.

Pure arithmetic: nothing is read, trained or measured. The constants come from measurements on 300,000
clustered unit vectors of 128 dimensions, nlist 1024, nprobe 32, two threads (faiss 1.15.1), called "the
measured set" below: RaBitQ4 has recall@10 0.84 before the re-rank, 0.08 ms a query, 94 bytes a vector.
"""

from __future__ import annotations

import math
import re

import faiss
from pydantic import BaseModel, ConfigDict

from for_ray.errors import ConfigError

DEFAULT_MEMORY_BYTES = 4 << 30
"""What one build task may hold, where nothing else is said.

About 0.2 GB of it is the same for every size: the interpreter, the libraries, the chunk that is read. It has
room in the half that segments are not laid out for, from 0.5 GB on, the least that `--task-memory` takes;
tasks of 128 MB hold 259 to 264 MB (`benchmarks/scale.py`).
"""

DEFAULT_TARGET_RECALL = 0.95
"""Recall at 50 where nothing else is said."""

RECALL_BY_BITS = {1: 0.405, 2: 0.855, 3: 0.990, 4: 0.9996, 6: 0.9997, 8: 0.9997}
"""Recall@50 of RaBitQ's bits after the exact re-rank, all lists looked at: the least of the sets of
`benchmarks/codec_bits.py`, where 200,000 vectors scatter around a single direction."""

SHARE_OF_CODE = 0.1
"""Of the recall that may be lost, what the code may lose on these sets: the lists that a search does not look
at lose the rest, and an index of 10^9 has more vectors that are nearly alike."""

FLAT_BELOW = 10_000
"""Fewer vectors than this are kept whole: 522 against 94 bytes a vector are 4 MB, and recall is 1."""

MIN_TRAINING_PER_LIST = 39
"""FAISS's own `ClusteringParameters.min_points_per_centroid`; with fewer it warns on stderr."""

FEW_TRAINING_PER_LIST, MANY_TRAINING_PER_LIST, MANY_TRAINING = 64, 128, 1 << 20
"""128 vectors a list until they are a million, then 64 at least; FAISS uses 39 to 256 of a list. Of 400,000
clustered vectors in 1024 lists the nearest 64 lists hold 0.974 of the 50 nearest with 128, 0.969 with 64."""

KMEANS_ROUNDS = 6
"""FAISS's default is 10, which find nothing more on the same vectors."""

LISTS_PER_ROOT = 4
"""nlist = 4·√n: the lower end of FAISS's guideline (4·√n to 16·√n), for k-means is what training costs."""

FLAT_QUANTIZER_LISTS = 1 << 16
"""Above this a query's and a vector's list are found by HNSW: comparing with each centroid costs more than
scanning the lists. Not below: of 16,384 lists of 256 dimensions HNSW32 finds a vector's 1.4 times as fast,
but for 0.82 of the vectors the nearest (efSearch 16, FAISS's own); for 0.986 at 64, and then no faster."""

SCAN_AT_LEAST = 50_000
"""Vectors that a query may look at in any case: 0.4 ms by the measured 0.08 ms for 300,000 · 32 / 1024."""

ID_BYTES = 8


class IndexPlan(BaseModel):
    """How an index of `num_vectors` vectors is laid out.

    `factory` is the FAISS factory string; `training_vectors` is the size of the sample that the codec is
    trained on; `nprobe` is where measuring starts; `list_dim` is D of the lists, which the codec's transform
    may have changed; `codec_bytes` lie in each segment once more; `bytes_on_store` counts all segments and
    the codec, not `images.lance`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_vectors: int
    dim: int
    list_dim: int
    factory: str
    nlist: int
    nprobe: int
    training_vectors: int
    vectors_per_segment: int
    num_segments: int
    bytes_per_vector: int
    codec_bytes: int
    bytes_on_store: int


def plan_index(
    num_vectors: int,
    dim: int,
    *,
    codec: str | None = None,
    target_recall: float = DEFAULT_TARGET_RECALL,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> IndexPlan:
    """Lay out an index for so many vectors.

    The number of lists follows from √n, from the training sample that fits into a quarter of the memory,
    and from FAISS's 39 training vectors a list, whichever is least.

    Args:
        num_vectors: All vectors of the index; may be 0.
        dim: D.
        codec: A FAISS factory string with an inverted file: `IVF,SQ8` lets the plan choose the number of
            lists, in `IVF4096,SQ8` the number is an upper limit that a small index stays below.
        target_recall: Recall at 50 that the code's bits are chosen for where no codec is given.
        memory_bytes: What one build task may hold.

    Raises:
        ConfigError: The codec is not an inverted file that segments can be merged of, or the memory does
            not hold the codec.
        ValueError: `num_vectors` is negative or `dim` is not positive.
    """
    if num_vectors < 0 or dim < 1:
        raise ValueError(f"expected num_vectors >= 0 and dim >= 1, got {num_vectors} and {dim}")
    sample = _largest_sample(num_vectors, dim, memory_bytes=memory_bytes)
    wanted = codec if codec is not None else _default_codec(num_vectors, dim, target_recall=target_recall)
    nlist, factory = _choose_factory(wanted, num_vectors=num_vectors, sample=sample)
    index = _untrained(factory, dim, codec=codec)
    ivf = faiss.extract_index_ivf(index)
    list_dim = int(ivf.d)
    codec_bytes = _codec_bytes(factory, nlist, dim=dim, list_dim=list_dim)
    bytes_per_vector = int(ivf.code_size) + ID_BYTES
    per_segment = _vectors_per_segment(bytes_per_vector, codec_bytes, memory_bytes=memory_bytes)
    num_segments = math.ceil(num_vectors / per_segment)
    return IndexPlan(
        num_vectors=num_vectors,
        dim=dim,
        list_dim=list_dim,
        factory=factory,
        nlist=nlist,
        nprobe=_first_nprobe(num_vectors, nlist),
        training_vectors=min(sample, wanted_sample(nlist)),
        vectors_per_segment=per_segment,
        num_segments=num_segments,
        bytes_per_vector=bytes_per_vector,
        codec_bytes=codec_bytes,
        bytes_on_store=num_vectors * bytes_per_vector + (num_segments + 1) * codec_bytes,
    )


def wanted_lists(num_vectors: int) -> int:
    """The lists that so many vectors want, whatever memory there is to train them."""
    return _power_of_two(LISTS_PER_ROOT * math.sqrt(num_vectors))


def wanted_sample(nlist: int) -> int:
    """The training vectors that so many lists want."""
    return min(MANY_TRAINING_PER_LIST * nlist, max(FEW_TRAINING_PER_LIST * nlist, MANY_TRAINING))


def _largest_sample(num_vectors: int, dim: int, *, memory_bytes: int) -> int:
    return min(num_vectors, max(MIN_TRAINING_PER_LIST, memory_bytes // sample_memory(1, dim)))


def sample_memory(num_vectors: int, dim: int) -> int:
    """The memory of a task that trains on so many vectors.

    Four times theirs: the rotation makes a second copy, and k-means draws a third one.
    """
    return 4 * num_vectors * 4 * dim


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above `value`; 1 at least."""
    return 1 << max(0, int(value).bit_length() - 1)


def bits_for(target_recall: float) -> int:
    """RaBitQ's fewest bits with which a code loses `SHARE_OF_CODE` of what may be lost, or less."""
    least = 1.0 - SHARE_OF_CODE * (1.0 - target_recall)
    return next((bits for bits, recall in RECALL_BY_BITS.items() if recall >= least), max(RECALL_BY_BITS))


def bits_of(factory: str) -> int:
    """RaBitQ's bits a dimension of a factory string; 0 for other codes."""
    found = re.search(r",RaBitQ(\d*)$", factory)
    return int(found[1] or 1) if found else 0


def has_matrix(factory: str) -> bool:
    """Whether vectors are multiplied with a matrix before they are encoded; Hadamard rotations have none."""
    return not factory.startswith(("IVF", "HR"))


def _default_codec(num_vectors: int, dim: int, *, target_recall: float) -> str:
    if num_vectors < FLAT_BELOW:
        return "IVF,Flat"
    return f"{_rotation(dim)},IVF,RaBitQ{bits_for(target_recall)}"


def _choose_factory(codec: str, *, num_vectors: int, sample: int) -> tuple[int, str]:
    """The number of lists, and the factory string with it."""
    most = max(1, sample // MIN_TRAINING_PER_LIST)
    nlist = min(wanted_lists(num_vectors), _power_of_two(most))
    found = re.fullmatch(r"((?:[^,]+,)?)IVF(\d*)(_[^,]+)?,([^,]+)", codec)
    if found is None or re.search(r"fsr?\b|fs\d|Refine|RFlat|IMI|IDMap|Panorama", codec):
        raise ConfigError(_refusal(codec))
    before, wanted, coarse, code = found.groups()
    if wanted:
        nlist = max(1, min(int(wanted), most))
    if coarse is None:
        coarse = "_HNSW32" if nlist > FLAT_QUANTIZER_LISTS else ""
    return nlist, f"{before}IVF{nlist}{coarse},{code}"


def _rotation(dim: int) -> str:
    """RaBitQ wants the dimensions' variances alike, so vectors are rotated at random first.

    Recall@10 of RaBitQ4 with it and without: 0.93 and 0.79 where four of 256 dimensions outweigh the rest
    (40,000 vectors, IVF256, nprobe 64), 0.92 and 0.84 with log-normal scales, the same with equal ones.
    Hadamard rotations go by powers of two (others would be padded to the next) and give a vector the same
    bits in every batch; a matrix product does not.
    """
    return "HR" if dim & (dim - 1) == 0 else f"RR{dim}"


def _refusal(codec: str) -> str:
    why = "is no FAISS inverted file"
    if re.search(r"fsr?\b|fs\d", codec):
        why = "is a FastScan type, whose merging corrupts memory (faiss 1.15.1)"
    elif re.search(r"Refine|RFlat", codec):
        why = "refines by itself, and candidates are re-ranked exactly anyway"
    elif "Panorama" in codec:
        why = "interleaves the values of several vectors, so that its lists cannot be merged"
    return f"codec {codec!r} {why}; use a factory string like 'HR,IVF,RaBitQ4', 'IVF,SQ8' or 'IVF4096,Flat'"


def _untrained(factory: str, dim: int, *, codec: str | None) -> faiss.Index:
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(index)
    except RuntimeError as error:
        reason = str(error).rsplit("Error: ", 1)[-1].splitlines()[0]
        message = f"codec {codec or factory!r} is refused by FAISS for {dim} dimensions: {reason}"
        raise ConfigError(f"{message}; use a factory string like 'IVF,SQ8'") from error
    return index


def _codec_bytes(factory: str, nlist: int, *, dim: int, list_dim: int) -> int:
    """Centroids, HNSW's links (2·32 on the ground level, 4 bytes each), a rotation's matrix."""
    links = 4 * 64 * nlist if "_HNSW" in factory else 0
    return 4 * nlist * list_dim + links + (4 * dim * list_dim if has_matrix(factory) else 0)


def _vectors_per_segment(bytes_per_vector: int, codec_bytes: int, *, memory_bytes: int) -> int:
    # Half is for the codec and for FAISS's lists, which double as they grow (up to twice their content); the
    # other half for the batch that is read, its float32 chunk and the interpreter.
    room = memory_bytes // 2 - codec_bytes
    if room < memory_bytes // 8:
        raise ConfigError(
            f"a build task's memory of {memory_bytes} bytes is too small for a codec of {codec_bytes} bytes; "
            f"give it at least {math.ceil(codec_bytes * 8 / 3)} bytes, or a codec with fewer lists"
        )
    return max(1, room // (2 * bytes_per_vector))


def _first_nprobe(num_vectors: int, nlist: int) -> int:
    """√nlist, which is the measured set's 32 of 1024; more where that looks at less than it may."""
    share = min(1.0, SCAN_AT_LEAST / max(1, num_vectors))
    return min(nlist, max(math.ceil(math.sqrt(nlist)), math.ceil(nlist * share)))
