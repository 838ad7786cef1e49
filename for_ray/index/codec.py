"""The codec: a trained, empty FAISS index that all segments of an encoder share.

One codec for all segments makes merging a concatenation of inverted lists, and scores comparable.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError, DataError
from for_ray.index.plan import KMEANS_ROUNDS, IndexPlan
from for_ray.schema import Codec


def train_codec(sample: NDArray[np.float32], plan: IndexPlan, *, threads: int) -> faiss.Index:
    """Train the plan's codec: spherical k-means for the lists, then the code; the same sample gives the same.

    On the GPU where FAISS finds one (k-means alone, which is what takes long), else on the CPU.

    Args:
        sample: Unit vectors [n, D], n at least `plan.nlist`; drawn evenly over images and slots.
        plan: Of the same D.
        threads: For FAISS's k-means.

    Returns:
        A trained index without vectors, metric inner product.

    Raises:
        ConfigError: The codec needs more training vectors than there are.
        DataError: A value is not finite.
        ValueError: The sample's shape is wrong.
    """
    sample = np.ascontiguousarray(sample, np.float32)
    if sample.ndim != 2 or sample.shape[1] != plan.dim:
        raise ValueError(f"expected a sample of shape [n, {plan.dim}], got {list(sample.shape)}")
    if not np.isfinite(sample).all():
        raise DataError("the codec's training sample has NaN or infinite values; encode these images again")
    if len(sample) < plan.nlist:
        raise ConfigError(
            f"codec {plan.factory!r} needs at least {plan.nlist} training vectors, got {len(sample)}; "
            "plan the index for the vectors that there are"
        )
    faiss.omp_set_num_threads(threads)
    index = faiss.index_factory(plan.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    ivf.cp.spherical, ivf.cp.niter = True, KMEANS_ROUNDS
    ivf.cp.min_points_per_centroid = 1  # the plan sees to enough; else FAISS warns on stderr, unasked
    on_gpu = _cluster_on_gpu(ivf)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ConfigError(
            f"codec {plan.factory!r} cannot be trained on {len(sample)} vectors: {_faiss_reason(error)}; "
            "take a codec without a codebook, such as 'IVF,SQ8' or 'IVF,RaBitQ4'"
        ) from error
    finally:
        if on_gpu is not None:
            ivf.clustering_index = None
    return index


def _cluster_on_gpu(ivf: faiss.IndexIVF) -> faiss.Index | None:
    """Let k-means assign on all GPUs; the caller keeps the returned index alive while training."""
    if not faiss.get_num_gpus():
        return None
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # of the centroids' table: half the memory, and the tensor cores
    on_gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d), co=options)
    ivf.clustering_index = on_gpu
    return on_gpu


def codec_to_bytes(index: faiss.Index) -> bytes:
    """The codec as a file's content; equal codecs give equal bytes."""
    return bytes(faiss.serialize_index(index).tobytes())


def codec_record(content: bytes, plan: IndexPlan, *, num_trained_on: int, wanted: str | None = None) -> Codec:
    """What a snapshot says of a codec; its id is the hash of its bytes, so equal codecs are one."""
    digest = hashlib.sha256(content).hexdigest()
    return Codec(
        codec_id=digest[:16],
        file_name=f"codec-{digest[:16]}.faiss",
        sha256=digest,
        num_bytes=len(content),
        factory=plan.factory,
        dim=plan.dim,
        nlist=plan.nlist,
        num_trained_on=num_trained_on,
        wanted=wanted,
    )


def read_codec(path: Path) -> faiss.Index:
    """A trained, empty index from its file; its checksum has been checked by who brought the file.

    Raises:
        DataError: The file is no FAISS inverted file, is not trained, or holds vectors.
    """
    index = open_index(path)
    if not index.is_trained or index.ntotal:
        state = f"holds {index.ntotal} vectors" if index.ntotal else "is not trained"
        raise DataError(f"{path} {state}; expected a trained, empty codec")
    return index


def open_index(path: Path, *, io_flags: int = 0) -> faiss.Index:
    """An inverted file from disk.

    Raises:
        DataError: There is no such file, it is cut short, or FAISS finds something else in it.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a FAISS index")
    try:
        index = faiss.read_index(str(path), io_flags)
        ivf = faiss.extract_index_ivf(index)
    except RuntimeError as error:
        reason = f"{path} is not a whole FAISS inverted file: {_faiss_reason(error)}"
        raise DataError(f"{reason}; fetch or build it again") from error
    if ivf.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DataError(f"{path} does not compare by inner product; it is not one of this index's files")
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index to disk, or say that it could not be.

    FAISS's own writer closes a file without looking at what the disk says of its last bytes.

    Raises:
        OSError: The disk refused to take the file; a part of it may stay.
    """
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _faiss_reason(error: RuntimeError) -> str:
    """FAISS's message without its C++ signature and line breaks."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())
