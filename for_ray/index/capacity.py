"""From the layout of an index and the machines to what it takes: bytes on the store, shards, nodes, hours.

Pure arithmetic like `plan`; what a core does in a second stands in `rates`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from for_ray.errors import ConfigError
from for_ray.index.plan import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_TARGET_RECALL,
    KMEANS_ROUNDS,
    RECALL_BY_BITS,
    IndexPlan,
    bits_of,
    plan_index,
    sample_memory,
    wanted_lists,
    wanted_sample,
)
from for_ray.index.rates import (
    BOX_BYTES,
    KMEANS_FLOP_PER_SECOND,
    MERGE_SECONDS_PER_BYTE,
    NETWORK_BYTES_PER_SECOND,
    SCAN_SECONDS_PER_VALUE,
    TABLE_BYTES_PER_IMAGE,
    coarse_seconds,
    seconds_per_vector,
)
from for_ray.schema import MAX_SLOTS

TABLE_CACHE_BYTES = 1 << 30
"""Lance's cache of a table's metadata may grow to this (pylance: 1 GiB by default)."""

PROCESS_BYTES = 2 << 30
"""A search process before it has an index: the interpreter, torch and a text tower."""

SERVED_SHARE = 0.9
"""Of a node's memory, for what a shard keeps resident; the rest is the system's."""

TASK_SHARE = 0.65
"""Of a node's memory, what Ray leaves to tasks: a third is its object store's, see `cluster.yaml`."""

MOST_TASK_CPUS = 4
"""Of a task that trains or builds: `Cluster.task_cpus`."""

MAX_IMAGES = 1 << 55
"""A vector id is 63 bits, eight of them the slot: `schema.pack_vector_ids`."""


class Nodes(NamedTuple):
    """The machines, all alike; `num` is None where the plan says how many it takes."""

    memory_bytes: int
    cpus: int
    num: int | None = None


class Capacity(BaseModel):
    """What an index takes.

    Attributes:
        plan: Its layout.
        num_images: With as many vectors each as was said.
        table_bytes: Of `images.lance`: float16 vectors, boxes and the rest of the rows.
        bytes_on_store: The table and all segments.
        bytes_while_merging: What merges add until the sweep: each segment twice.
        task_memory_bytes: Of a task that trains, builds or merges; also the sample's limit.
        segment_bytes: Of a full segment's file.
        num_shards: Each is served by one node; at least 1.
        segments_per_shard: Of the fullest shard.
        shard_bytes: Memory of the fullest shard: its segments resident, the table's cache, the process.
        node_memory_bytes: Of each node; likewise `node_cpus`.
        nodes: Given, else one a shard.
        replicas: Whole copies that these nodes serve; 0 where not even one fits.
        expected_recall: At 50, of the code after the exact re-rank, all lists looked at; None where it was
            not measured, as behind a transform that loses dimensions.
        vectors_per_query: Codes that one query is compared with, over all shards, at the first `nprobe`.
        query_seconds: On one core of each shard, without the way there and the exact re-rank.
        train_hours: In one task, on the CPU.
        build_cores: Of all nodes, those that build at once: as many tasks as have memory and a segment each.
        build_hours: By these, or by the network where that is slower; None where the code's rate was not
            measured. `merge_hours` likewise, for rewriting each segment once.
        build_network_hours: Of the nodes that build, to read the vectors and to write the segments.
        advice: What does not fit and what to change, or what holds the index back; a line each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: IndexPlan
    num_images: int
    table_bytes: int
    bytes_on_store: int
    bytes_while_merging: int
    task_memory_bytes: int
    segment_bytes: int
    num_shards: int
    segments_per_shard: int
    shard_bytes: int
    node_memory_bytes: int
    node_cpus: int
    nodes: int
    replicas: int
    expected_recall: float | None
    vectors_per_query: int
    query_seconds: float
    train_hours: float
    build_cores: int
    build_hours: float | None
    build_network_hours: float
    merge_hours: float
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the nodes hold every shard."""
        return self.replicas > 0


def plan_capacity(
    num_vectors: int,
    dim: int,
    *,
    vectors_per_image: float,
    nodes: Nodes,
    codec: str | None = None,
    target_recall: float = DEFAULT_TARGET_RECALL,
    task_memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Capacity:
    """Lay out an index for so many vectors, and say what it takes.

    Args:
        num_vectors: All vectors of the index; may be 0.
        dim: D.
        vectors_per_image: On average, above 0, at most 256.
        nodes: The machines that build and serve it.
        codec: See `plan_index`.
        target_recall: See `plan_index`.
        task_memory_bytes: What a task that trains, builds or merges may hold.

    Raises:
        ConfigError: Ids have no room for so many images, what Ray leaves to tasks of a node's memory does not
            hold two such tasks, a node does not hold one segment, or `plan_index` refuses.
        ValueError: A size is negative, or a number of vectors an image outside of its range.
    """
    if not 0 < vectors_per_image <= MAX_SLOTS:
        raise ValueError(f"expected 0 < vectors_per_image <= {MAX_SLOTS}, got {vectors_per_image}")
    num_images = math.ceil(num_vectors / vectors_per_image)
    if num_images > MAX_IMAGES:
        raise ConfigError(
            f"{num_vectors:,} vectors are {num_images:,} images, and ids have room for {MAX_IMAGES:,}; plan "
            "several indexes"
        )
    _check_task(task_memory_bytes, nodes)
    plan_with = partial(plan_index, num_vectors, dim, codec=codec, target_recall=target_recall)
    plan = plan_with(memory_bytes=task_memory_bytes)
    shards = _spread(plan, nodes)
    num_nodes = nodes.num or shards.num
    table_bytes = num_vectors * (2 * dim + BOX_BYTES) + num_images * TABLE_BYTES_PER_IMAGE
    work = _work(plan, nodes, num_nodes, task_memory_bytes)
    return Capacity(
        plan=plan,
        num_images=num_images,
        table_bytes=table_bytes,
        bytes_on_store=table_bytes + plan.bytes_on_store,
        bytes_while_merging=plan.bytes_on_store - plan.codec_bytes,
        task_memory_bytes=task_memory_bytes,
        segment_bytes=_segment_bytes(plan),
        num_shards=shards.num,
        segments_per_shard=shards.num_segments,
        shard_bytes=shards.num_bytes,
        node_memory_bytes=nodes.memory_bytes,
        node_cpus=nodes.cpus,
        nodes=num_nodes,
        replicas=num_nodes // shards.num,
        expected_recall=_recall(plan),
        vectors_per_query=math.ceil(num_vectors * plan.nprobe / plan.nlist),
        query_seconds=_query_seconds(plan, shards),
        train_hours=work.train,
        build_cores=work.build_cores,
        build_hours=work.build,
        build_network_hours=work.build_network,
        merge_hours=work.merge,
        advice=tuple(_advice(plan, shards, nodes, task_memory_bytes, plan_with)),
    )


def _most_task(nodes: Nodes) -> int:
    """What a task may reserve: half of what Ray leaves to tasks, see `Cluster.task_memory_bytes`."""
    return int(TASK_SHARE * nodes.memory_bytes / 2)


def _check_task(task_memory_bytes: int, nodes: Nodes) -> None:
    if task_memory_bytes > _most_task(nodes):
        raise ConfigError(
            f"a task's memory of {_gb(task_memory_bytes)} is more than one may reserve on a node of "
            f"{_gb(nodes.memory_bytes)}: {_gb(_most_task(nodes))}, half of what Ray leaves to tasks; lower "
            "--task-memory, or plan for larger nodes (--plan-node-memory)"
        )


class _Shards(NamedTuple):
    """How segments are shared out: the fullest shard has `num_segments` and takes `num_bytes`."""

    num: int
    num_segments: int
    num_bytes: int


def _segment_bytes(plan: IndexPlan) -> int:
    return min(plan.num_vectors, plan.vectors_per_segment) * plan.bytes_per_vector + plan.codec_bytes


def _spread(plan: IndexPlan, nodes: Nodes) -> _Shards:
    """As few shards as the nodes' memory allows, of as many segments each."""
    fixed, segment = TABLE_CACHE_BYTES + PROCESS_BYTES, _segment_bytes(plan)
    most = int((SERVED_SHARE * nodes.memory_bytes - fixed) // segment)
    if most < 1:
        least = math.ceil((fixed + segment) / SERVED_SHARE)
        raise ConfigError(
            f"a node's memory of {_gb(nodes.memory_bytes)} does not hold one segment of {_gb(segment)} and a "
            f"search process of {_gb(fixed)}; plan for {_gb(least)} at least (--plan-node-memory)"
        )
    num = max(1, math.ceil(plan.num_segments / most))
    per_shard = math.ceil(plan.num_segments / num)
    return _Shards(num, per_shard, fixed + min(per_shard * segment, plan.bytes_on_store))


def _query_seconds(plan: IndexPlan, shards: _Shards) -> float:
    """The shard finds the lists once, and scans them in each of its segments."""
    num_vectors = min(plan.num_vectors, shards.num_segments * plan.vectors_per_segment)
    scanned = num_vectors * plan.nprobe / plan.nlist
    return coarse_seconds(plan) + scanned * plan.list_dim * SCAN_SECONDS_PER_VALUE


class _Work(NamedTuple):
    """Hours to train, to build, and to rewrite each segment once; cores of all nodes that build at once."""

    train: float
    build: float | None
    build_network: float
    merge: float
    build_cores: int


def _work(plan: IndexPlan, nodes: Nodes, num_nodes: int, task_memory_bytes: int) -> _Work:
    task_cpus = min(MOST_TASK_CPUS, nodes.cpus)
    by_memory = max(1, int(TASK_SHARE * nodes.memory_bytes // task_memory_bytes))
    builders = min(num_nodes * min(nodes.cpus // task_cpus, by_memory), max(1, plan.num_segments))
    mergers = min(num_nodes * min(nodes.cpus, by_memory), max(1, plan.num_segments))
    rounds = 2.0 * plan.training_vectors * plan.nlist * plan.list_dim * KMEANS_ROUNDS
    per_vector = seconds_per_vector(plan)
    in_turn = math.ceil(plan.num_segments / builders) * min(plan.num_vectors, plan.vectors_per_segment)
    read = 2 * plan.num_vectors * plan.dim
    network = _network_hours(read + plan.bytes_on_store, min(num_nodes, builders))
    merge = plan.bytes_on_store * MERGE_SECONDS_PER_BYTE / mergers / 3600
    return _Work(
        train=rounds / (KMEANS_FLOP_PER_SECOND * task_cpus) / 3600,
        build=None if per_vector is None else max(network, in_turn * per_vector / task_cpus / 3600),
        build_network=network,
        merge=max(merge, _network_hours(2 * plan.bytes_on_store, min(num_nodes, mergers))),
        build_cores=builders * task_cpus,
    )


def _network_hours(num_bytes: int, num_nodes: int) -> float:
    """As if what is read and what is written had to wait for each other, which is at most twice too long."""
    return num_bytes / (num_nodes * NETWORK_BYTES_PER_SECOND) / 3600


def _recall(plan: IndexPlan) -> float | None:
    """Measured were vectors as they are, or rotated: other transforms may lose what tells them apart."""
    if plan.list_dim < plan.dim or not re.match(r"((HR|RR\d+),)?IVF", plan.factory):
        return None
    return 1.0 if plan.factory.endswith(",Flat") else RECALL_BY_BITS.get(bits_of(plan.factory))


def _advice(
    plan: IndexPlan,
    shards: _Shards,
    nodes: Nodes,
    task_memory_bytes: int,
    plan_with: Callable[..., IndexPlan],
) -> list[str]:
    lines = []
    if nodes.num is not None and nodes.num < shards.num:
        bytes_of_one = math.ceil(shards.num * shards.num_bytes / nodes.num / SERVED_SHARE)
        lines.append(
            f"does not fit: {nodes.num:,} nodes of {_gb(nodes.memory_bytes)} hold "
            f"{nodes.num / shards.num:.0%} of it; take {shards.num:,} of them, or {nodes.num:,} of "
            f"{_gb(bytes_of_one)} each, or fewer bits a dimension (--codec {_fewer_bits(plan)})"
        )
    if more := list(_more_lists(plan, nodes, plan_with)):
        wanted = wanted_lists(plan.num_vectors)
        lines.append(
            f"a task of {_gb(task_memory_bytes)} trains {plan.nlist:,} lists, the vectors want {wanted:,}: a "
            f"list is {wanted / plan.nlist:.0f} times as long; {'; '.join(more)}"
        )
    room = int(TASK_SHARE * nodes.memory_bytes // task_memory_bytes)
    if plan.num_segments > room and 2 * MOST_TASK_CPUS * room < nodes.cpus:
        lines.append(
            f"a node has memory for {room:,} tasks of {_gb(task_memory_bytes)}, so that "
            f"{MOST_TASK_CPUS * room:,} of its {nodes.cpus:,} cores build; give the nodes more memory a core"
        )
    return lines


def _more_lists(plan: IndexPlan, nodes: Nodes, plan_with: Callable[..., IndexPlan]) -> Iterator[str]:
    """Which memory of a task trains how many more lists, as planning again with it says.

    All that the vectors want; where that takes other nodes, these, and the most that the given ones train.
    None where memory is not what holds them back: the codec names a number, or there are too few vectors.
    """
    wanted = lists = wanted_lists(plan.num_vectors)
    while lists > plan.nlist:
        gigabytes = _gigabytes(sample_memory(wanted_sample(lists), plan.dim))
        memory_bytes = int(float(gigabytes) * 1e9)
        trained = _trained(memory_bytes, nodes, plan_with)
        if trained >= lists:
            rest = "all" if lists == wanted else f"{trained:,} on these nodes"
            yield f"--task-memory {gigabytes} trains {rest}"
            return
        larger = _gigabytes(2 * memory_bytes / TASK_SHARE)
        larger_nodes = nodes._replace(memory_bytes=int(float(larger) * 1e9))
        if lists == wanted and _trained(memory_bytes, larger_nodes, plan_with) >= lists:
            yield f"--task-memory {gigabytes} trains all with --plan-node-memory {larger}"
        lists //= 2


def _trained(memory_bytes: int, nodes: Nodes, plan_with: Callable[..., IndexPlan]) -> int:
    """How many lists a task of so much memory trains; 0 where the plan with it is refused."""
    try:
        _check_task(memory_bytes, nodes)
        plan = plan_with(memory_bytes=memory_bytes)
        _spread(plan, nodes)
    except ConfigError:
        return 0
    return plan.nlist


def _fewer_bits(plan: IndexPlan) -> str:
    fewer = max((bits for bits in RECALL_BY_BITS if bits < bits_of(plan.factory)), default=1)
    return f"{plan.factory.split(',')[0]},IVF,RaBitQ{fewer}"


def _gigabytes(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / 1e8) / 10:g}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3g} GB" if num_bytes < 1e12 else f"{num_bytes / 1e9:,.0f} GB"
