"""A plan as a table that people read before they order machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from for_ray.index.capacity import MOST_TASK_CPUS, PROCESS_BYTES, TABLE_CACHE_BYTES, Capacity
from for_ray.index.plan import KMEANS_ROUNDS
from for_ray.index.rates import MEASURED_TIMES, NETWORK_BYTES_PER_SECOND
from for_ray.reports.page import shown_bytes


class _Row(NamedTuple):
    """One line: what it is called, what it is of a plan, and what that means."""

    name: str
    show: Callable[[Capacity], str]
    meaning: str


_PARTS: tuple[tuple[str, tuple[_Row, ...]], ...] = (
    (
        "what there is",
        (
            _Row(
                "vectors", lambda each: f"{each.plan.num_vectors:,}", "slots that are stored, of all images"
            ),
            _Row("images", lambda each: f"{each.num_images:,}", "at that many vectors each"),
            _Row("dimensions", lambda each: f"{each.plan.dim:,}", "D, of the encoder"),
        ),
    ),
    (
        "the codec",
        (
            _Row("codec", lambda each: each.plan.factory, "FAISS factory string"),
            _Row(
                "lists",
                lambda each: f"{each.plan.nlist:,}",
                "nlist, by the vectors and the training's memory",
            ),
            _Row(
                "lists looked at",
                lambda each: f"{each.plan.nprobe:,}",
                "nprobe to begin with; doubled until the recall is there",
            ),
            _Row(
                "training sample",
                lambda each: f"{each.plan.training_vectors:,}",
                "vectors, drawn evenly over the images",
            ),
            _Row(
                "sample in memory",
                lambda each: shown_bytes(4 * each.plan.training_vectors * each.plan.dim),
                "float32, at most a quarter of a task's memory",
            ),
            _Row(
                "bytes a vector",
                lambda each: f"{each.plan.bytes_per_vector:,}",
                "in a segment: code, and 8 of the id",
            ),
            _Row(
                "recall@50 of the code",
                lambda each: _recall(each),
                "re-ranked, all lists looked at; by sets of 200,000 vectors",
            ),
        ),
    ),
    (
        "the store",
        (
            _Row(
                "table",
                lambda each: shown_bytes(each.table_bytes),
                "images.lance: float16 vectors, boxes, a row an image",
            ),
            _Row(
                "segments",
                lambda each: shown_bytes(each.plan.bytes_on_store),
                "codes and ids; the codec in each of them, and once by itself",
            ),
            _Row(
                "in all", lambda each: shown_bytes(each.bytes_on_store), "table and segments of one snapshot"
            ),
            _Row(
                "more for merges",
                lambda each: shown_bytes(each.bytes_while_merging),
                "at most, until the sweep: segments old and new",
            ),
        ),
    ),
    (
        "to build",
        (
            _Row(
                "a task's memory",
                lambda each: shown_bytes(each.task_memory_bytes),
                "that trains, builds or merges; 0.2 GB of it whatever the size",
            ),
            _Row("segments", lambda each: f"{each.plan.num_segments:,}", "one task each"),
            _Row(
                "vectors a segment",
                lambda each: f"{each.plan.vectors_per_segment:,}",
                "at most, by a task's memory",
            ),
            _Row("bytes of a segment", lambda each: shown_bytes(each.segment_bytes), "a full one's file"),
            _Row(
                "to train",
                lambda each: _hours(each.train_hours),
                f"one task of {MOST_TASK_CPUS} cores at most, {KMEANS_ROUNDS} rounds of k-means",
            ),
            _Row("cores that build", lambda each: f"{each.build_cores:,}", "of all nodes, by tasks' memory"),
            _Row(
                "to build",
                lambda each: _hours(each.build_hours),
                "the slower of cores and network; without encoding the images",
            ),
            _Row(
                "by the network alone",
                lambda each: _hours(each.build_network_hours),
                f"vectors read, segments written; {NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s a node",
            ),
            _Row(
                "to merge once",
                lambda each: _hours(each.merge_hours),
                "each segment rewritten once; likewise the slower of both",
            ),
            _Row(
                "measured over this",
                lambda _: f"{MEASURED_TIMES['train']:g}, {MEASURED_TIMES['build']:g}",
                "cores to train, to build; by 8 million vectors, as measured",
            ),
        ),
    ),
    (
        "to serve",
        (
            _Row("memory of a node", lambda each: shown_bytes(each.node_memory_bytes), "as given"),
            _Row("cores of a node", lambda each: f"{each.node_cpus:,}", "as given"),
            _Row("shards", lambda each: f"{each.num_shards:,}", "a node each"),
            _Row("segments a shard", lambda each: f"{each.segments_per_shard:,}", "the fullest one"),
            _Row(
                "memory of a shard",
                lambda each: shown_bytes(each.shard_bytes),
                f"its segments, and {shown_bytes(TABLE_CACHE_BYTES + PROCESS_BYTES)} of process and caches",
            ),
            _Row("nodes", lambda each: f"{each.nodes:,}", "as given, else one a shard"),
            _Row(
                "copies served",
                lambda each: f"{each.replicas:,}" if each.fits else "0: does not fit",
                "nodes by shards",
            ),
            _Row(
                "codes a query",
                lambda each: f"{each.vectors_per_query:,}",
                "vectors it is compared with, over all shards",
            ),
            _Row(
                "time of a query",
                lambda each: _seconds(each.query_seconds),
                "one core of each shard, all at once; without network and re-rank",
            ),
            _Row(
                "measured over this",
                lambda _: f"{MEASURED_TIMES['query']:g}",
                "by 8 million vectors, where a query's fixed costs weigh most",
            ),
        ),
    ),
)


def print_plan(capacity: Capacity, *, json: bool, stream: TextIO | None = None) -> None:
    """Print a plan, a line a figure, and below it what to change; as JSON, one line.

    Args:
        capacity: The plan.
        json: Nothing but JSON.
        stream: Where to; stdout if None.
    """
    stream = stream or sys.stdout
    if json:
        print(capacity.model_dump_json(), file=stream)
    else:
        print_plans({"": capacity}, stream)


def print_plans(capacities: Mapping[str, Capacity], stream: TextIO) -> None:
    """Print plans beside each other, and below them what to change.

    Args:
        capacities: Plans by the names of their columns.
        stream: Where to.
    """
    from rich.console import Console

    width = None if stream.isatty() else WIDTH
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
    console.print(_plan_table(capacities))
    for name, capacity in capacities.items():
        for line in capacity.advice:
            console.print(f"{name}: {line}" if name else line, soft_wrap=True)


WIDTH = 160
"""A file or a pipe has none of its own; two plans take less."""


def _plan_table(capacities: Mapping[str, Capacity]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("plan", no_wrap=True)
    for name in capacities:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it means")
    for part, rows in _PARTS:
        table.add_row(f"— {part}", *([""] * (len(capacities) + 1)))
        for row in rows:
            table.add_row(row.name, *(row.show(each) for each in capacities.values()), row.meaning)
    return table


def _recall(capacity: Capacity) -> str:
    recall = capacity.expected_recall
    return "not measured" if recall is None else f"{recall:.4g}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "not measured"
    if hours < 1 / 60:
        return "under 1 min"
    if hours < 2:
        return f"{60 * hours:,.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _seconds(seconds: float) -> str:
    if seconds < 0.001:
        return "under 1 ms"
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:,.0f} s"
