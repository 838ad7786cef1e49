"""Whether an index grows as it should: 1 to 8 million vectors through the real build, merge and search.

    python benchmarks/scale.py [--sizes 1,2,4,8] [--dim 64] [--slots 10] [--task-memory 0.128] [--runs 3]
                               [--queries 200] [--work FOLDER] [--json]

Made-up vectors with the structure of embeddings (`vector_sets.py`) lie in one real table; each size is a
version of it. The stages build and merge it with Ray tasks as the index job does, on two kinds of codec:

- `fixed`: the lists that the plan gives tasks of `--task-memory`, the same codec for all sizes. Only the
  number of vectors differs, so a vector must cost the same. Small sizes are built several times, as long as
  that is no more work than the largest one, in turns; medians count.
- `planned`: the lists that the plan gives tasks of 4 GiB. They grow with the root of the number of vectors,
  and a vector is compared with each centroid; `reckoned` is what `index/rates.py` says of that.

The first size is also built by one task, which says what a task's memory takes for each vector of a segment.

Tasks that build get `--task-memory`: it sets the size of a segment, so that there are more of them the more
vectors there are. Then all are merged into one. Each stage has a Ray of its own, whose workers have imported
what they need before its clock starts. Their private memory (RssAnon) is read every 10 ms; what a merge maps
into memory is the kernel's to take back, and stands apart. Searches take one thread and one query at a time.

Prints what 10^9 vectors take by the plan, and by the plan times what was measured here against it. Exit
code 1 if on the same lists a vector costs over 15 % more CPU time to build, or a task over 15 % more
memory, from the first size to the last; the workers' CPU time, for what else runs on the machine stretches
the other. Below half a million vectors neither says much: a build's fixed costs outweigh the rest, and
copying the merged file takes as much memory as it has bytes, up to 32 MB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.search import (
    CODES,
    FINGERPRINT,
    RERANKED,
    ROWS_AT_ONCE,
    Built,
    images_of,
    recalls_of,
    table_of,
    take_turns,
)
from benchmarks.vector_sets import Scattered
from benchmarks.worker_watch import Watch
from for_ray.index.capacity import MOST_TASK_CPUS, Nodes, plan_capacity
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.plan import DEFAULT_TARGET_RECALL, IndexPlan, plan_index
from for_ray.index.rates import seconds_per_vector
from for_ray.index.search import open_segments
from for_ray.index.table import append, create_table, open_table, version_of, write_fragments
from for_ray.schema import Codec, Layout, Segment, Snapshot, images_schema
from for_ray.stages.build import draw_vectors, update_segments
from for_ray.stages.built import Built as BuiltStage
from for_ray.stages.cluster import Cluster
from for_ray.stages.merge import merge_small
from for_ray.stages.ranges import RangeJob
from for_ray.storage import write_bytes

MILLION, BILLION = 1_000_000, 1_000_000_000
MOST_GROWTH = 0.15
NODES = Nodes(memory_bytes=64 * BILLION, cpus=16)
"""As `jobs/index.py --plan-vectors` plans where nothing is said."""

ONE_TASK_MEMORY = 2.5
"""As many times `--task-memory`: the first size is then one segment, and the plan wants no other codec."""

FIXED, PLANNED, ONE_TASK = "fixed", "planned", "fixed, one task"


class Table(NamedTuple):
    """The table, and the version of it that has so many vectors."""

    layout: Layout
    versions: dict[int, int]
    source: Scattered

    def open(self, size: int) -> Any:
        """The version of a size."""
        return open_table(self.layout.images_uri(FINGERPRINT), version=self.versions[size])


class Trained(NamedTuple):
    """A codec, the plan that it is of, and how long it took."""

    codec: Codec
    plan: IndexPlan
    seconds: float


def fill(folder: Path, sizes: Sequence[int], *, dim: int, slots: int) -> Table:
    """Write the table, and remember its version whenever it has come to a size."""
    layout, source = Layout(str(folder)), Scattered(max(sizes), dim)
    images = create_table(layout.images_uri(FINGERPRINT), images_schema(dim))
    versions, first = {}, 0
    for size in sizes:
        while (count := min(ROWS_AT_ONCE, size // slots - first)) > 0:
            vectors = source.draw(count * slots, seed=1 + first).astype(np.float16)
            rows = _with_boxes(table_of(vectors.reshape(count, slots, dim), first), slots, seed=first)
            images = append(images, write_fragments(rows, images.uri))
            first += count
        versions[size] = version_of(images)
    return Table(layout, versions, source)


def _with_boxes(rows: pa.Table, slots: int, *, seed: int) -> pa.Table:
    """The rows with a box for each vector, by which the stages count vectors."""
    corners = np.random.default_rng(seed).integers(256, size=len(rows) * slots * 4, dtype=np.uint8)
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(corners), 4)
    edges = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * slots)
    number = rows.schema.get_field_index("boxes")
    return rows.set_column(number, "boxes", pa.ListArray.from_arrays(edges, boxes))


def train(table: Table, size: int, plan: IndexPlan, *, threads: int) -> Trained:
    """The plan's codec, on a sample of the table, written where the tasks look for it."""
    began = time.perf_counter()
    sample = draw_vectors(table.open(size), plan.training_vectors)
    content = codec_to_bytes(train_codec(sample, plan, threads=threads))
    codec = codec_record(content, plan, num_trained_on=len(sample))
    write_bytes(table.layout.segment_uri(FINGERPRINT, codec.file_name), content)
    return Trained(codec, plan, time.perf_counter() - began)


class Scale:
    """Builds and merges versions of the table; `measured` are the results, a line each.

    Args:
        table: All sizes.
        task_memory_bytes: Of a task that builds.
    """

    def __init__(self, table: Table, *, task_memory_bytes: int) -> None:
        self._table, self._memory = table, task_memory_bytes
        self.measured: list[dict[str, Any]] = []

    def run(
        self, kind: str, size: int, trained: Trained, *, memory_bytes: int | None = None
    ) -> list[Segment]:
        """Build one size, and merge it, each in a Ray of its own; the segments that it came to."""
        number = len(self.measured) + 1
        version = self._table.versions[size]
        job = RangeJob(self._table.layout.index_uri, FINGERPRINT, version, f"run{number}")
        base = _published(number, version, trained.codec)
        built, build = self._stage(
            lambda cluster: update_segments(
                job,
                base,
                cluster=cluster,
                wanted=None,
                floor=DEFAULT_TARGET_RECALL,
                memory_bytes=memory_bytes or self._memory,
                on_progress=lambda _: None,
            )
        )
        reckoned = seconds_per_vector(trained.plan)
        num_bytes = sum(segment.num_bytes for segment in built.segments)
        line = {
            "kind": kind,
            "vectors": size,
            "nlist": trained.plan.nlist,
            "tasks": len(built.segments),
            "bytes_a_vector": (num_bytes - len(built.segments) * trained.codec.num_bytes) / size,
            "build_seconds": build["seconds"],
            "build_core_us": 1e6 * build["busy"] / size,
            "reckoned_core_us": None if reckoned is None else 1e6 * reckoned,
            "build_mb": build["private"] / 1e6,
            "vectors_a_task": max(segment.num_vectors for segment in built.segments),
        }
        self.measured.append(line)
        if len(built.segments) == 1:
            return built.segments
        # As a run with the default's memory goes on from it.
        most = plan_index(size, trained.plan.dim).vectors_per_segment
        merged, more = self._merge(job, built._replace(vectors_per_segment=most))
        line |= more | {"merge_ns_a_byte": 1e9 * more["merge_seconds"] / num_bytes}
        _remove(self._table, built.segments)
        return merged

    def _merge(self, job: RangeJob, built: BuiltStage) -> tuple[list[Segment], dict[str, float]]:
        """The segments merged, and what it took."""
        merged, merge = self._stage(lambda cluster: merge_small(job, built, cluster=cluster))
        return merged.segments, {
            "merge_seconds": merge["seconds"],
            "merge_mb": merge["private"] / 1e6,
            "merge_mapped_mb": merge["resident"] / 1e6,
        }

    def _stage(self, work: Callable[[Cluster], BuiltStage]) -> tuple[BuiltStage, dict[str, float]]:
        """A stage on fresh workers that are ready to go; what it gives, its seconds and its memory."""
        with ExitStack() as stack:
            cluster = Cluster(stack, task_memory_bytes=self._memory)
            _warm(int(cluster.resources["CPU"]))
            with Watch() as watch:
                began = time.perf_counter()
                given = work(cluster)
                seconds = time.perf_counter() - began
        found = {"private": watch.private, "resident": watch.resident, "busy": watch.busy}
        return given, {"seconds": seconds, **found}


def _warm(num_workers: int) -> None:
    """Have workers import the stages."""
    import ray

    def load() -> int:  # local, hence sent as it is
        import for_ray.stages.build
        import for_ray.stages.merge  # noqa: F401

        time.sleep(0.5)  # so that none of them gets two
        return os.getpid()

    ray.get([ray.remote(load).options(num_cpus=1).remote() for _ in range(num_workers)])


def _published(number: int, version: int, codec: Codec) -> Snapshot:
    """A snapshot with a codec alone: what is built on it is all of the table, and the codec is kept."""
    return Snapshot(
        snapshot_id=number,
        created_at=datetime.datetime.now(datetime.UTC),
        fingerprint=FINGERPRINT,
        images_version=version,
        codec=codec,
        segments=[],
        deleted_image_ids=[],
        nprobe=1,
        listed=0,
        indexed=0,
        quarantined=0,
        num_vectors=0,
        recall_at_50=None,
    )


def search(
    table: Table, size: int, segments: list[Segment], plan: IndexPlan, options: argparse.Namespace
) -> dict[str, float]:
    """Median milliseconds of a query for 50 images and their recall, by the codes alone and re-ranked."""
    queries = table.source.draw(options.queries, seed=0)
    built = Built(table.layout, plan, segments, table.open(size), queries)
    opened = open_segments(built.layout, FINGERPRINT, segments, nprobe=plan.nprobe, threads=1)
    ways = {CODES: images_of(opened, built, None), RERANKED: images_of(opened, built, built.exact)}
    recalls = recalls_of(built, opened)
    taken = take_turns(ways, num_queries=len(queries), runs=options.runs)
    return {
        "codes_ms": 1e3 * statistics.median(taken[CODES]),
        "reranked_ms": 1e3 * statistics.median(taken[RERANKED]),
        "recall_at_50": recalls[RERANKED],
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, merge and search all sizes."""
    sizes = options.sizes
    threads = os.cpu_count() or 1
    table = fill(folder, sizes, dim=options.dim, slots=options.slots)
    scale = Scale(table, task_memory_bytes=options.task_memory)
    fixed_plan = plan_index(sizes[-1], options.dim, memory_bytes=options.task_memory)
    fixed = train(table, sizes[-1], fixed_plan, threads=threads)
    for size in _turns(sizes, runs=options.runs):
        _remove(table, scale.run(FIXED, size, fixed))
    _remove(
        table, scale.run(ONE_TASK, sizes[0], fixed, memory_bytes=round(ONE_TASK_MEMORY * options.task_memory))
    )
    for size in sizes:
        trained = train(table, size, plan_index(size, options.dim), threads=threads)
        segments = scale.run(PLANNED, size, trained)
        scale.measured[-1] |= {"train_seconds": trained.seconds}
        scale.measured[-1] |= search(table, size, segments, trained.plan, options)
        _remove(table, segments)
    lines = [_median([each for each in scale.measured if _key(each) == key]) for key in _keys(scale.measured)]
    table_bytes = sum(path.stat().st_size for path in folder.rglob("images.lance/**/*") if path.is_file())
    return {
        "dim": options.dim,
        "task_memory": options.task_memory,
        "results": lines,
        "billion": extrapolate(lines, table_bytes / sizes[-1], options, threads=threads),
    }


def _turns(sizes: Sequence[int], *, runs: int) -> Iterator[int]:
    """Sizes to build: each so often that it is no more work than the largest one, in turns."""
    for turn in range(runs):
        yield from (size for size in sizes if turn < max(1, sizes[-1] // size))


def _remove(table: Table, segments: Sequence[Segment]) -> None:
    for segment in segments:
        Path(table.layout.segment_uri(FINGERPRINT, segment.file_name)).unlink()


def _key(line: dict[str, Any]) -> tuple[str, int]:
    return line["kind"], line["vectors"]


def _keys(lines: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    order = (FIXED, ONE_TASK, PLANNED)
    return sorted({_key(line) for line in lines}, key=lambda key: (order.index(key[0]), key[1]))


def _median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one size as one line; times also with how far they lie apart, memory at its worst."""
    line = dict(runs[0]) | {"runs": len(runs)}
    for name in {"build_seconds", "build_core_us", "merge_seconds", "merge_ns_a_byte"} & set(line):
        line[name] = statistics.median(run[name] for run in runs)
    for name in {"build_mb", "merge_mb", "merge_mapped_mb"} & set(line):
        line[name] = max(run[name] for run in runs)
    times = [run["build_core_us"] for run in runs]
    return line | {"spread": (max(times) - min(times)) / line["build_core_us"]}


def extrapolate(
    lines: Sequence[dict[str, Any]], table_bytes: float, options: argparse.Namespace, *, threads: int
) -> list[dict[str, Any]]:
    """What 10^9 vectors take: by the plan, and by it times what the largest size took here against it.

    Args:
        lines: All; the last one is that of the largest size, on the planned lists.
        table_bytes: Of a vector.
        options: Say D and the slots.
        threads: That the codec was trained with.
    """
    line = lines[-1]
    there = plan_capacity(BILLION, options.dim, vectors_per_image=options.slots, nodes=NODES)
    here = plan_capacity(line["vectors"], options.dim, vectors_per_image=options.slots, nodes=NODES)
    plan = there.plan
    build = line["build_core_us"] / line["reckoned_core_us"]
    # The plan reckons with as many CPUs as a task has at most.
    train = line["train_seconds"] * threads / (3600 * MOST_TASK_CPUS * here.train_hours)
    query = line["codes_ms"] / (1e3 * here.query_seconds)
    core_hours = (seconds_per_vector(plan) or 0.0) * BILLION / 3600
    index_bytes = BILLION * line["bytes_a_vector"] + (plan.num_segments + 1) * plan.codec_bytes
    served = there.num_shards * there.shard_bytes
    rows = {
        f"train {plan.nlist:,} lists, hours": (there.train_hours, train * there.train_hours),
        "build, core hours": (core_hours, build * core_hours),
        f"build on {there.build_cores:,} cores, hours": (
            there.build_hours,
            max(there.build_network_hours, build * core_hours / there.build_cores),
        ),
        "memory of a task with a full segment, GB": (
            there.task_memory_bytes / 1e9,
            _task_bytes(lines, plan) / 1e9,
        ),
        f"memory of all {there.num_shards} shards, GB": (
            served / 1e9,
            (served - plan.bytes_on_store + index_bytes) / 1e9,
        ),
        "segments on the store, GB": (plan.bytes_on_store / 1e9, index_bytes / 1e9),
        "table on the store, GB": (there.table_bytes / 1e9, table_bytes * BILLION / 1e9),
        "a query by its codes, core ms of a shard": (
            1e3 * there.query_seconds,
            1e3 * query * there.query_seconds,
        ),
    }
    return [{"figure": name, "plan": planned, "measured": found} for name, (planned, found) in rows.items()]


def _task_bytes(lines: Sequence[dict[str, Any]], plan: IndexPlan) -> float:
    """Private memory of a task that builds a full segment of the plan."""
    less = next(line for line in lines if line["kind"] == FIXED)
    more = next(line for line in lines if line["kind"] == ONE_TASK)
    num_more = more["vectors_a_task"] - less["vectors_a_task"]
    grown: float = 1e6 * (more["build_mb"] - less["build_mb"]) / max(1, num_more)
    rest = plan.vectors_per_segment - more["vectors_a_task"]
    there: float = 1e6 * more["build_mb"] + rest * grown + plan.codec_bytes
    return there


def growth(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From the first size to the last, on the same lists: how much more a vector, or a task's memory, is."""
    fixed = [line for line in lines if line["kind"] == FIXED]
    names = [name for name in ("build_core_us", "build_mb", "merge_mb") if name in fixed[0]]
    return {name: fixed[-1][name] / fixed[0][name] - 1 for name in names}


COLUMNS = {
    "kind": ("lists", "{}"),
    "vectors": ("vectors", "{:,}"),
    "runs": ("runs", "{}"),
    "nlist": ("nlist", "{:,}"),
    "tasks": ("build tasks", "{}"),
    "build_seconds": ("build, s", "{:.1f}"),
    "build_core_us": ("CPU µs a vector", "{:.2f}"),
    "spread": ("apart", "{:.0%}"),
    "reckoned_core_us": ("reckoned", "{:.2f}"),
    "build_mb": ("build task, MB", "{:.0f}"),
    "merge_seconds": ("merge, s", "{:.2f}"),
    "merge_ns_a_byte": ("ns a byte", "{:.2f}"),
    "merge_mb": ("merge task, MB", "{:.0f}"),
    "merge_mapped_mb": ("with mapped files", "{:.0f}"),
    "train_seconds": ("train, s", "{:.1f}"),
    "codes_ms": ("query p50, ms", "{:.2f}"),
    "reranked_ms": ("re-ranked", "{:.2f}"),
    "recall_at_50": ("recall@50", "{:.3f}"),
}
"""Of the printed table: what they are called, and how they are written."""


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print("| " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("| --- " * len(COLUMNS) + "|")
    for line in found["results"]:
        cells = [form.format(line[name]) if name in line else "" for name, (_, form) in COLUMNS.items()]
        print("| " + " | ".join(cells) + " |")
    print("\n| 10⁹ vectors | by the plan | as measured here |\n| --- | --- | --- |")
    for row in found["billion"]:
        print(f"| {row['figure']} | {row['plan']:,.3g} | {row['measured']:,.3g} |")
    grown = ", ".join(f"{name} {share:+.0%}" for name, share in found["growth"].items())
    print(f"\nFrom the first size to the last, on the same lists: {grown}")


def main() -> int:
    """Measure, print; the exit code says whether it grows as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="1,2,4,8", help="millions of vectors (default 1,2,4,8)")
    parser.add_argument("--dim", type=int, default=64, help="of a vector (default 64)")
    parser.add_argument("--slots", type=int, default=10, help="vectors of an image (default 10)")
    parser.add_argument(
        "--task-memory", type=float, help="GB; default 0.128 for each million of the first size"
    )
    parser.add_argument("--runs", type=int, default=3, help="at most, of each size (default 3)")
    parser.add_argument("--queries", type=int, default=200, help="(default 200)")
    parser.add_argument(
        "--work", type=Path, help="where the index is written, and removed (default: a temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the tables")
    options = parser.parse_args()
    options.sizes = sorted(round(float(size) * MILLION) for size in options.sizes.split(","))
    gigabytes = options.task_memory or 0.128 * options.sizes[0] / MILLION
    options.task_memory = round(gigabytes * BILLION)
    with tempfile.TemporaryDirectory(prefix="for_ray-scale-", dir=options.work) as folder:
        found = measure(options, Path(folder))
    found["growth"] = growth(found["results"])
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return int(any(share > MOST_GROWTH for share in found["growth"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
