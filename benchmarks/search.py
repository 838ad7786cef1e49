"""What a search for 50 images takes beside bare `faiss.search`, and what the exact re-rank finds.

    python benchmarks/search.py [--vectors 1000000] [--dim 256] [--slots 10] [--segments 4]
                                [--codec HR,IVF,RaBitQ2] [--queries 200] [--runs 5] [--shards 0] [--json]

Made-up vectors with the structure of embeddings (`vector_sets.py`), in segments and a table of images that
the package's own functions write. Bare FAISS searches the same files, mapped in the same way, in as many
lists, one after the other; its hits are not merged, nor are they images. One query at a time on one thread.
All ways take turns at every query, in an order that changes, each at another query than the one before it, so
that none finds its lists in the cache because the last one read them; the first round does not count.
`against FAISS` divides the medians by that of 50 hits.

The floor is what the codes of the lists take to be read once, at the speed at which one thread reads memory.
Recall@50 is against the comparison with every vector. Filtered searches allow images drawn at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.vector_sets import Scattered
from for_ray.evaluation.exact import exact_top_images, recall_at_k
from for_ray.index.codec import codec_record, codec_to_bytes, open_index, train_codec
from for_ray.index.plan import IndexPlan, plan_index
from for_ray.index.probe import Searchable
from for_ray.index.search import HITS_PER_IMAGE, Exact, open_segments, search_images
from for_ray.index.segment import build_segment
from for_ray.index.table import append, create_table, read_vectors, take_vectors, write_fragments
from for_ray.schema import Layout, Segment, images_schema

RANKED = 50
FINGERPRINT = "benchmark"
SHARES = (0.5, 0.1, 0.01)
"""Of the images that a filter allows."""

ROWS_AT_ONCE = 5000
READ_BYTES = 1 << 29

Work = Callable[[int], object]


class Built(NamedTuple):
    """An index on disk, without a snapshot."""

    layout: Layout
    plan: IndexPlan
    segments: list[Segment]
    images: Any
    queries: NDArray[np.float32]

    def paths(self) -> list[Path]:
        """Of the segments."""
        return [Path(self.layout.segment_uri(FINGERPRINT, each.file_name)) for each in self.segments]

    def exact(self, image_ids: NDArray[np.int64]) -> Any:
        """Stored vectors by row id, as a search takes them."""
        return take_vectors(self.images, image_ids)


def build(folder: Path, options: argparse.Namespace) -> Built:
    """Draw the vectors and write them as a table and as segments."""
    layout, source = Layout(str(folder)), Scattered(options.vectors, options.dim)
    Path(layout.segment_uri(FINGERPRINT, "")).mkdir(parents=True)
    num_images = options.vectors // options.slots
    images = create_table(layout.images_uri(FINGERPRINT), images_schema(options.dim))
    for first in range(0, num_images, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, num_images - first)
        vectors = source.draw(count * options.slots, seed=1 + first).astype(np.float16)
        rows = table_of(vectors.reshape(count, options.slots, options.dim), first)
        images = append(images, write_fragments(rows, layout.images_uri(FINGERPRINT)))
    plan = plan_index(num_images * options.slots, options.dim, codec=options.codec)
    codec_path, segments = train(layout, plan, images, options), []
    edges = np.linspace(0, num_images, options.segments + 1).astype(int).tolist()
    for first, end in itertools.pairwise(edges):
        segments.append(build_range(layout, codec_path, images, first, end, threads=options.threads))
    return Built(layout, plan, segments, images, source.draw(options.queries, seed=0))


def table_of(vectors: NDArray[np.float16], first: int) -> pa.Table:
    """Rows of `images.lance` from [B, N, D]."""
    count, slots, dim = vectors.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
    columns = {
        "uri": pa.array([f"/{first + row}.jpg" for row in range(count)]),
        "vectors": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * slots), values),
    }
    schema = images_schema(dim)
    nothing = {name: pa.nulls(count, schema.field(name).type) for name in schema.names if name not in columns}
    return pa.table({**nothing, **columns}).select(schema.names).cast(schema)


def train(layout: Layout, plan: IndexPlan, images: Any, options: argparse.Namespace) -> Path:
    """Train the codec on images drawn evenly."""
    num_rows = max(1, plan.training_vectors // options.slots)
    ids = np.linspace(0, images.count_rows() - 1, num_rows).astype(np.int64)
    parts = np.array_split(np.unique(ids), max(1, num_rows // ROWS_AT_ONCE))
    sample = np.concatenate([take_vectors(images, part).vectors.astype(np.float32) for part in parts])
    content = codec_to_bytes(train_codec(sample, plan, threads=options.threads))
    record = codec_record(content, plan, num_trained_on=len(sample))
    path = Path(layout.segment_uri(FINGERPRINT, record.file_name))
    path.write_bytes(content)
    return path


def build_range(
    layout: Layout, codec_path: Path, images: Any, first: int, end: int, *, threads: int
) -> Segment:
    """One segment of the images with `first` <= id < `end`."""
    name = f"segment-{first}.faiss"
    parts = read_vectors(images, first, end, batch_rows=ROWS_AT_ONCE)
    built = build_segment(
        codec_path,
        ((part.vector_ids, part.vectors) for part in parts),
        Path(layout.segment_uri(FINGERPRINT, name)),
        threads=threads,
    )
    return Segment(
        segment_id=str(first),
        codec_id="benchmark",
        file_name=name,
        sha256=built.sha256,
        num_bytes=built.num_bytes,
        num_vectors=built.num_vectors,
        first_image_id=first,
        end_image_id=end,
    )


def bare_faiss(built: Built, k: int) -> Work:
    """FAISS's own search of each segment."""
    opened = [open_index(path, io_flags=faiss.IO_FLAG_MMAP_IFC) for path in built.paths()]
    for segment in opened:
        faiss.extract_index_ivf(segment).nprobe = built.plan.nprobe

    def work(query: int) -> None:
        for segment in opened:
            segment.search(built.queries[query : query + 1], k)

    return work


def images_of(segments: Searchable, built: Built, exact: Exact | None, **filters: Any) -> Work:
    """The search for images."""
    return lambda query: search_images(segments, built.queries[query], RANKED, exact=exact, **filters)


def take_turns(ways: dict[str, Work], *, num_queries: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each way, for each query and run."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for run in range(runs + 1):
        for step in range(num_queries):
            shift = (run + step) % len(names)
            for place, name in enumerate(names[shift:] + names[:shift]):
                query = (step + place * num_queries // len(names)) % num_queries
                began = time.perf_counter()
                ways[name](query)
                took = time.perf_counter() - began
                if run:
                    seconds[name].append(took)
    return seconds


def floor(built: Built) -> tuple[float, float]:
    """Bytes of codes that a query scans, on average, and the bytes that one thread reads in a second."""
    num_bytes = 0
    for path in built.paths():
        segment = open_index(path, io_flags=faiss.IO_FLAG_MMAP_IFC)
        ivf, queries = faiss.extract_index_ivf(segment), built.queries
        for position in range(segment.chain.size() if isinstance(segment, faiss.IndexPreTransform) else 0):
            queries = faiss.downcast_VectorTransform(segment.chain.at(position)).apply(queries)
        _, lists = ivf.quantizer.search(queries, built.plan.nprobe)
        sizes = np.array([ivf.get_list_size(number) for number in range(ivf.nlist)])
        num_bytes += int(sizes[lists].sum()) * ivf.code_size
    memory = np.ones(READ_BYTES // 8)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        memory.max()
        took.append(time.perf_counter() - began)
    return num_bytes / len(built.queries), READ_BYTES / min(took)


CODES, RERANKED = f"{RANKED} images by their codes", f"{RANKED} images re-ranked"


def ways_of(
    built: Built, segments: Searchable, shards: Searchable | None, *, num_shards: int
) -> dict[str, Work]:
    """All ways to search, the one that the others are divided by first."""
    ways = {f"faiss.search, {k} hits": bare_faiss(built, k) for k in (RANKED, HITS_PER_IMAGE * RANKED)}
    ways |= {CODES: images_of(segments, built, None), RERANKED: images_of(segments, built, built.exact)}
    draws = np.random.default_rng(0).random(built.images.count_rows())
    for share in SHARES:
        allowed = np.flatnonzero(draws < share)
        ways[f"re-ranked, {share:.0%} of the images allowed"] = images_of(
            segments, built, built.exact, only_image_ids=allowed
        )
    if shards is not None:
        ways[f"by their codes, {num_shards} shards"] = images_of(shards, built, None)
        ways[f"re-ranked, {num_shards} shards"] = images_of(shards, built, built.exact)
    return ways


def recalls_of(built: Built, segments: Searchable) -> dict[str, float]:
    """Recall@50 of the images that a search ranks first."""
    batches: Any = read_vectors(built.images, 0, built.images.count_rows(), batch_rows=ROWS_AT_ONCE)
    right = list(exact_top_images(batches, built.queries, RANKED)[0])
    recalls = {}
    for name, exact in ((CODES, None), (RERANKED, built.exact)):
        found = [search_images(segments, query, RANKED, exact=exact).image_ids for query in built.queries]
        recalls[name] = round(float(recall_at_k(found, right)), 3)
    return recalls


def measure(built: Built, shards: Searchable | None, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each way to search."""
    segments = open_segments(built.layout, FINGERPRINT, built.segments, nprobe=built.plan.nprobe)
    recalls = recalls_of(built, segments)
    ways = ways_of(built, segments, shards, num_shards=options.shards)
    seconds = take_turns(ways, num_queries=len(built.queries), runs=options.runs)
    base = statistics.median(next(iter(seconds.values())))
    for name, taken in seconds.items():
        yield {
            "way": name,
            "p50_ms": round(1e3 * statistics.median(taken), 2),
            "p95_ms": round(1e3 * float(np.percentile(taken, 95)), 2),
            "against_faiss": round(statistics.median(taken) / base, 2),
            "recall_at_50": recalls.get(name),
        }


def open_shards(built: Built, num_shards: int, stack: ExitStack) -> Searchable:
    """The same segments in Ray actors; the stack ends them."""
    from for_ray.stages.cluster import connect
    from for_ray.stages.shards import ShardSet

    stack.enter_context(connect())
    given = (built.layout, FINGERPRINT, built.segments)
    shards = ShardSet(*given, nprobe=built.plan.nprobe, num_shards=num_shards)
    stack.callback(shards.close)
    return shards


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, measure, and say what was built."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        built = build(Path(folder), options)
        shards = open_shards(built, options.shards, stack) if options.shards else None
        lines = list(measure(built, shards, options))
        scanned, speed = floor(built)
        return {
            "vectors": sum(each.num_vectors for each in built.segments),
            "segments": len(built.segments),
            "codec": built.plan.factory,
            "nprobe": built.plan.nprobe,
            "scanned_mb": round(scanned / 1e6, 2),
            "floor_ms": round(1e3 * scanned / speed, 2),
            "read_gb_per_second": round(speed / 1e9, 1),
            "results": lines,
        }


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="in all segments (default 1000000)")
    parser.add_argument("--dim", type=int, default=256, help="of a vector (default 256)")
    parser.add_argument("--slots", type=int, default=10, help="vectors of an image (default 10)")
    parser.add_argument("--segments", type=int, default=4, help="(default 4)")
    parser.add_argument("--codec", default="HR,IVF,RaBitQ2", help="(default HR,IVF,RaBitQ2)")
    parser.add_argument("--queries", type=int, default=200, help="(default 200)")
    parser.add_argument("--runs", type=int, default=5, help="that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="to train and build with (default 2)")
    parser.add_argument("--shards", type=int, default=0, help="also in so many Ray actors (default 0: not)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options = parser.parse_args()
    found = run(options)
    if options.json:
        print(json.dumps(found))
        return 0
    print(
        f"{found['vectors']:,} vectors, {found['segments']} segments, {found['codec']}, "
        f"nprobe {found['nprobe']}; floor {found['floor_ms']} ms: {found['scanned_mb']} MB of codes a query "
        f"at {found['read_gb_per_second']} GB/s"
    )
    print("| way | p50 ms | p95 ms | against FAISS | recall@50 |")
    print("| --- | --- | --- | --- | --- |")
    for line in found["results"]:
        print("| " + " | ".join("" if value is None else str(value) for value in line.values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
