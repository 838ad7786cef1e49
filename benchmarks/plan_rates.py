"""The rates of one core that the plan of an index reckons with: k-means, codes, reading, merging, searching.

    python benchmarks/plan_rates.py [--vectors 65536] [--dim 256] [--runs 3] [--json]

One thread throughout, the package's own functions where it has them, medians of the runs. What is printed is
a constant of `index/rates.py`, and what it is on this machine; beside codes, what FAISS's own encoder takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.index import rates as planned
from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.merge import merge_segments
from for_ray.index.plan import plan_index
from for_ray.index.search import SegmentSet
from for_ray.index.segment import CHUNK_VECTORS, add_vectors, build_segment
from for_ray.index.table import append, create_table, read_vectors, write_fragments
from for_ray.schema import images_schema

BITS = (1, 2, 3, 4, 6, 8)
NUM_LISTS = 256
SLOTS = 8
NUM_DIRECTIONS, NOISE = 100, 0.7
FETCHED = 800
"""Hits that a search for 50 images fetches at first: four of each of 200 candidates."""

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """Of some runs of the same work, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def kmeans_flop_per_second(vectors: NDArray[np.float32], *, runs: int) -> float:
    """Comparisons of k-means are 2 · vectors · lists · D; its other work is counted as theirs."""
    num_lists, num_rounds = 4 * NUM_LISTS, 2
    quantizer = faiss.IndexFlatIP(vectors.shape[1])

    def work() -> None:
        quantizer.reset()
        clustering = faiss.Clustering(vectors.shape[1], num_lists)
        clustering.niter, clustering.spherical = num_rounds, True
        clustering.train(vectors, quantizer)

    return 2 * vectors.size * num_lists * num_rounds / median_seconds(work, runs)


def code_seconds_per_value(
    vectors: NDArray[np.float32], bits: int, *, runs: int, is_faiss: bool = False
) -> float:
    """To rotate and encode one value, with a single list, so that nothing is compared."""
    index = faiss.index_factory(vectors.shape[1], f"HR,IVF1,RaBitQ{bits}", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:1000])
    ids = np.arange(len(vectors))

    def work() -> None:
        index.reset()
        for start in range(0, len(vectors), CHUNK_VECTORS):
            part = slice(start, start + CHUNK_VECTORS)
            if is_faiss:
                index.add_with_ids(vectors[part], ids[part])
            else:
                add_vectors(index, vectors[part], ids[part], threads=1)

    return median_seconds(work, runs) / vectors.size


def hnsw_seconds_per_value(vectors: NDArray[np.float32], *, runs: int) -> float:
    """To find a vector's list through HNSW32, over as many centroids as there are vectors here."""
    quantizer = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    quantizer.add(vectors)
    asked = np.ascontiguousarray(vectors[:4096])
    return median_seconds(lambda: quantizer.search(asked, 1), runs) / asked.size


def coarse_seconds_per_value(vectors: NDArray[np.float32], *, runs: int) -> float:
    """To compare one query at a time with a value of each centroid."""
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    quantizer.add(vectors)

    def work() -> None:
        for query in vectors[:16]:
            quantizer.search(query[None], 256)

    return median_seconds(work, runs) / (16 * vectors.size)


def table_rates(vectors: NDArray[np.float32], folder: Path, *, runs: int) -> dict[str, float]:
    """Seconds to read and check a value from the table, and the table's bytes that are no vectors."""
    num_images = len(vectors) // SLOTS
    images = vectors[: num_images * SLOTS].astype(np.float16)
    table = create_table(str(folder / "images.lance"), images_schema(vectors.shape[1]))
    table = append(table, write_fragments(_rows(images, num_images), table.uri))

    def work() -> None:
        for batch in read_vectors(table, 0, num_images, batch_rows=4096):
            chunk = batch.vectors.astype(np.float32)
            np.einsum("nd,nd->n", chunk, chunk)

    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rest = num_bytes - images.nbytes - len(images) * planned.BOX_BYTES
    return {
        "READ_SECONDS_PER_VALUE": median_seconds(work, runs) / images.size,
        "TABLE_BYTES_PER_IMAGE": rest / num_images,
    }


def _rows(images: NDArray[np.float16], num_images: int) -> pa.Table:
    schema = images_schema(images.shape[1])
    offsets = pa.array(np.arange(0, len(images) + 1, SLOTS, dtype=np.int32))
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(images) * 4, np.uint8)), 4)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), images.shape[1])
    columns = {
        "uri": [
            f"s3://a-bucket/images/2026/{number * 7919 % 4096:04x}/{number}.jpg"
            for number in range(num_images)
        ],
        "etag": [f"{number:032x}" for number in range(num_images)],
        "size_bytes": np.arange(num_images) + 100_000,
        "width": np.full(num_images, 1024),
        "height": np.full(num_images, 768),
        "error": pa.nulls(num_images, pa.string()),
        "vectors": pa.ListArray.from_arrays(offsets, vectors).cast(schema.field("vectors").type),
        "boxes": pa.ListArray.from_arrays(offsets, boxes).cast(schema.field("boxes").type),
        "encoded_at": pa.array([NOW] * num_images, schema.field("encoded_at").type),
    }
    return pa.table({name: pa.array(column) for name, column in columns.items()}).cast(schema)


def segment_rates(vectors: NDArray[np.float32], folder: Path, *, runs: int) -> dict[str, float]:
    """Of segments of the default codec: to merge a byte, and to compare a query with a value."""
    dim = vectors.shape[1]
    plan = plan_index(len(vectors), dim, codec=f"HR,IVF{NUM_LISTS},RaBitQ4")
    codec_path = folder / "codec.faiss"
    codec_path.write_bytes(codec_to_bytes(train_codec(vectors[: plan.training_vectors], plan, threads=1)))
    ids, half = np.arange(len(vectors)) * 256, len(vectors) // 2
    parts = [
        build_segment(codec_path, [(ids[part], vectors[part])], folder / f"{number}.faiss", threads=1).path
        for number, part in enumerate((slice(half), slice(half, None)))
    ]
    merged, nobody = folder / "merged.faiss", np.empty(0, np.int64)
    merging = median_seconds(lambda: merge_segments(parts, merged, dead_image_ids=nobody), runs)
    index, queries = SegmentSet([merged], nprobe=NUM_LISTS), vectors[:16]

    def search() -> None:
        for query in queries:
            index.search(query[None], FETCHED)

    return {
        "MERGE_SECONDS_PER_BYTE": merging / merged.stat().st_size,
        "SCAN_SECONDS_PER_VALUE": median_seconds(search, runs) / (len(queries) * vectors.size),
    }


def clustered_vectors(num_vectors: int, dim: int) -> NDArray[np.float32]:
    """Unit vectors [n, D] that scatter around directions, as those of objects do."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((NUM_DIRECTIONS, dim), np.float32)
    vectors = directions[rng.integers(NUM_DIRECTIONS, size=num_vectors)]
    vectors += NOISE * rng.standard_normal(vectors.shape, np.float32)
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def measure(num_vectors: int, dim: int, *, runs: int) -> dict[str, float]:
    """All rates, by the names of the constants."""
    faiss.omp_set_num_threads(1)
    vectors = clustered_vectors(num_vectors, dim)
    rates = {"KMEANS_FLOP_PER_SECOND": kmeans_flop_per_second(vectors, runs=runs)}
    for bits in BITS:
        rates[f"CODE_SECONDS_PER_VALUE[{bits}]"] = code_seconds_per_value(vectors, bits, runs=runs)
    rates["HNSW_SECONDS_PER_VALUE"] = hnsw_seconds_per_value(vectors, runs=runs)
    rates["COARSE_SECONDS_PER_VALUE"] = coarse_seconds_per_value(vectors, runs=runs)
    with tempfile.TemporaryDirectory() as folder:
        rates |= table_rates(vectors, Path(folder), runs=runs)
    with tempfile.TemporaryDirectory() as folder:
        rates |= segment_rates(vectors, Path(folder), runs=runs)
    return rates


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1 << 16, help="vectors at hand (default 65536)")
    parser.add_argument("--dim", type=int, default=256, help="their dimensions (default 256)")
    parser.add_argument("--runs", type=int, default=3, help="of each, after one that does not count")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options = parser.parse_args()
    rates = measure(options.vectors, options.dim, runs=options.runs)
    vectors = clustered_vectors(options.vectors, options.dim)
    of_faiss = {
        f"CODE_SECONDS_PER_VALUE[{bits}]": code_seconds_per_value(
            vectors, bits, runs=options.runs, is_faiss=True
        )
        for bits in BITS
    }
    if options.json:
        print(json.dumps({"dim": options.dim, "rates": rates, "of_faiss": of_faiss}))
        return 0
    print("| rate | measured | in the plan | FAISS's own encoder |\n| --- | --- | --- | --- |")
    for name, rate in rates.items():
        other = f"{of_faiss[name]:.3g}, {of_faiss[name] / rate:.1f} times" if name in of_faiss else ""
        print(f"| {name} | {rate:.3g} | {_planned(name):.3g} | {other} |")
    return 0


def _planned(name: str) -> float:
    found = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
    constant = getattr(planned, found[1] if found else name)
    return float(constant[int(found[2])] if found and found[2] else constant)


if __name__ == "__main__":
    raise SystemExit(main())
