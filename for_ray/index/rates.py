"""What one core does in a second: the rates that `capacity` reckons with.

All by `benchmarks/plan_rates.py`, which prints them beside what it measures: one thread on an AMD EPYC with
AVX-512, faiss 1.15.1. Another machine takes these times its own ratio.
"""

from __future__ import annotations

from for_ray.index.plan import IndexPlan, bits_of, has_matrix

KMEANS_FLOP_PER_SECOND = 1.1e11
"""2 · vectors · lists · D for each round of k-means, and for finding a vector's list by a flat quantizer."""

CODE_SECONDS_PER_VALUE = {1: 1.5e-8, 2: 1.6e-8, 3: 2.3e-8, 4: 2.3e-8, 6: 2.4e-8, 8: 2.5e-8}
"""To rotate a value and encode it, by RaBitQ's bits."""

HNSW_SECONDS_PER_VALUE = 1.7e-7
"""To find a vector's list by HNSW32, efSearch 16, for each of its values."""

HNSW_SEARCH = 16
"""FAISS's default efSearch; a query's is twice its `nprobe`, see `probe`."""

READ_SECONDS_PER_VALUE = 7.0e-9
"""To read a float16 value from the table on a disk, to make it float32 and to check it."""

MERGE_SECONDS_PER_BYTE = 2.4e-9
"""To copy a byte of a segment into another one, and to hash it."""

SCAN_SECONDS_PER_VALUE = 1.7e-10
"""To compare a query with a value of a code, when 800 hits are fetched."""

COARSE_SECONDS_PER_VALUE = 1.5e-10
"""To compare a query with a value of a centroid, flat."""

NETWORK_BYTES_PER_SECOND = 6.25e8
"""Of a node, from the store and to it: 5 Gbit/s, which Amazon's instances of fewer than 32 vCPUs have through
an internet gateway (docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-network-bandwidth.html); the CPU
nodes of `cluster.yaml` have 16. A gateway endpoint of S3 in the nodes' network allows more."""

MEASURED_TIMES = {"train": 1.7, "build": 1.6, "query": 2.0}
"""What `benchmarks/scale.py` measured over what is reckoned here for its 8 million vectors of 64 dimensions:
with both threads at work, and in queries of 2 ms, where what any query costs at any size weighs most."""

BOX_BYTES = 4
"""Of the table: a vector's box."""

TABLE_BYTES_PER_IMAGE = 43
"""Uri, etag, sizes, time and offsets, as Lance compresses them."""


def seconds_per_vector(plan: IndexPlan) -> float | None:
    """Of one core, to read a vector, find its list and encode it; None where the code was not measured."""
    code = 0.0 if plan.factory.endswith(",Flat") else CODE_SECONDS_PER_VALUE.get(bits_of(plan.factory))
    if code is None:
        return None
    # In float64, at half the rate: 2.2 times at 768 dimensions.
    rotation = 2 * 2 * plan.dim / KMEANS_FLOP_PER_SECOND if has_matrix(plan.factory) else 0.0
    lists = HNSW_SECONDS_PER_VALUE if has_graph(plan) else 2 * plan.nlist / KMEANS_FLOP_PER_SECOND
    return plan.dim * READ_SECONDS_PER_VALUE + plan.list_dim * (rotation + lists + code)


def coarse_seconds(plan: IndexPlan) -> float:
    """Of one core, to find the lists of a query, once for all segments of a shard."""
    if has_graph(plan):
        return HNSW_SECONDS_PER_VALUE * plan.list_dim * max(1.0, 2 * plan.nprobe / HNSW_SEARCH)
    return COARSE_SECONDS_PER_VALUE * plan.list_dim * plan.nlist


def has_graph(plan: IndexPlan) -> bool:
    """Whether lists are found by HNSW."""
    return "_HNSW" in plan.factory
