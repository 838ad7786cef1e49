"""What an index takes: identities over all sizes, a billion by hand, and what does not fit."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from for_ray.errors import ConfigError
from for_ray.index import rates
from for_ray.index.capacity import (
    MAX_IMAGES,
    PROCESS_BYTES,
    SERVED_SHARE,
    TABLE_CACHE_BYTES,
    TASK_SHARE,
    Capacity,
    Nodes,
    plan_capacity,
)
from for_ray.index.plan import RECALL_BY_BITS, bits_for, bits_of, plan_index, wanted_lists
from for_ray.schema import MAX_SLOTS, image_ids_of

GB = 10**9
NODES = Nodes(64 * GB, 16)
SIZES = st.one_of(st.integers(0, 20_000), st.integers(0, 10**11))
DIMS = st.sampled_from([64, 128, 640, 1024])
MACHINES = st.builds(
    Nodes,
    st.sampled_from([16 * GB, 64 * GB, 512 * GB]),
    st.sampled_from([1, 3, 16, 128]),
    st.one_of(st.none(), st.integers(1, 200)),
)


def capacity_of(num_vectors: int, dim: int = 128, *, nodes: Nodes = NODES, **wanted: object) -> Capacity:
    return plan_capacity(num_vectors, dim, vectors_per_image=8, nodes=nodes, **wanted)


@settings(deadline=None, max_examples=120)
@given(SIZES, DIMS, MACHINES, st.sampled_from([None, "IVF,SQ8", "HR,IVF,RaBitQ1"]), st.floats(0.5, 1.0))
def test_what_holds_for_every_size(num_vectors, dim, nodes, codec, target):
    found = capacity_of(num_vectors, dim, nodes=nodes, codec=codec, target_recall=target)
    plan = found.plan
    # Bytes add up.
    assert found.bytes_on_store == found.table_bytes + plan.bytes_on_store
    codes = num_vectors * plan.bytes_per_vector
    assert plan.bytes_on_store == codes + (plan.num_segments + 1) * plan.codec_bytes
    assert found.table_bytes >= num_vectors * dim * 2
    # The shards hold every segment, and none takes more than its node has for it.
    assert found.num_shards * found.segments_per_shard >= plan.num_segments
    assert found.shard_bytes <= SERVED_SHARE * nodes.memory_bytes
    served = found.num_shards * (found.shard_bytes - TABLE_CACHE_BYTES - PROCESS_BYTES)
    assert served >= codes
    # One shard fewer would not do.
    room = SERVED_SHARE * nodes.memory_bytes - TABLE_CACHE_BYTES - PROCESS_BYTES
    most = int(room // found.segment_bytes)
    assert (found.num_shards - 1) * most < max(1, plan.num_segments)
    # Nodes: those given or those needed, and it says whether they do.
    assert found.nodes == (nodes.num or found.num_shards)
    assert found.fits == (found.nodes >= found.num_shards) == (found.replicas >= 1)
    assert found.fits != any("does not fit" in line for line in found.advice)
    # A task's memory holds the training sample, FAISS has 39 to 256 vectors for a list.
    assert 4 * plan.training_vectors * dim <= found.task_memory_bytes / 4
    assert plan.nlist == 1 or 39 <= plan.training_vectors / plan.nlist <= 256
    # Every image has an id, and a vector's id is an int64.
    assert found.num_images * 8 >= num_vectors
    assert (found.num_images - 1) * MAX_SLOTS + MAX_SLOTS - 1 < 2**63
    assert found.vectors_per_query <= num_vectors
    assert min(found.train_hours, found.merge_hours, found.query_seconds) >= 0
    assert (found.build_hours is None) == (found.expected_recall is None) == plan.factory.endswith("SQ8")


@settings(deadline=None, max_examples=80)
@given(SIZES, SIZES, DIMS, st.sampled_from(["IVF,SQ8", "HR,IVF,RaBitQ4"]))
def test_more_vectors_never_take_less(one, other, dim, codec):
    small, large = (capacity_of(size, dim, codec=codec) for size in sorted([one, other]))
    for name in ("num_images", "table_bytes", "bytes_on_store", "num_shards", "train_hours"):
        assert getattr(small, name) <= getattr(large, name), name


@settings(deadline=None, max_examples=60)
@given(SIZES, DIMS, st.integers(1, 50))
def test_more_nodes_build_faster_and_larger_ones_are_fewer(num_vectors, dim, num):
    few, many = (capacity_of(num_vectors, dim, nodes=Nodes(64 * GB, 16, count)) for count in (num, 2 * num))
    if few.build_hours is not None:
        assert few.build_hours / 2 <= many.build_hours * (1 + 1e-9)
        assert many.build_hours <= few.build_hours
    assert few.build_cores <= many.build_cores <= 2 * few.build_cores
    assert many.replicas >= few.replicas
    larger = capacity_of(num_vectors, dim, nodes=Nodes(256 * GB, 16))
    assert larger.num_shards <= few.num_shards


@settings(deadline=None, max_examples=80)
@given(
    st.one_of(st.integers(0, 40_000), st.integers(0, 10**11)),
    DIMS,
    MACHINES,
    st.sampled_from([None, "IVF,SQ8", "HR,IVF64,RaBitQ4", "HR,IVF20000,RaBitQ4", "PCA8,IVF,RaBitQ2"]),
)
@example(67108864, 640, Nodes(64 * GB, 1, None), "HR,IVF20000,RaBitQ4")
def test_advised_memory_is_taken_and_trains_what_it_says(num_vectors, dim, nodes, codec):
    found = capacity_of(num_vectors, dim, nodes=nodes, codec=codec)
    for line in found.advice:
        for memory, trained, larger in re.findall(
            r"--task-memory ([\d.]+) trains (all|[\d,]+)(?: with --plan-node-memory ([\d.]+))?", line
        ):
            machines = nodes._replace(memory_bytes=int(float(larger) * GB)) if larger else nodes
            task = int(float(memory) * GB)
            again = capacity_of(num_vectors, dim, nodes=machines, codec=codec, task_memory_bytes=task)
            assert again.plan.nlist > found.plan.nlist
            if trained == "all":
                assert not any("the vectors want" in each for each in again.advice)
            else:
                assert again.plan.nlist == int(trained.replace(",", ""))


def test_a_billion_vectors_by_hand():
    found = capacity_of(10**9, nodes=Nodes(64 * GB, 16, 4))
    assert found.plan.factory == "HR,IVF32768,RaBitQ4"
    assert found.num_images == 125_000_000
    assert found.table_bytes == 10**9 * (256 + 4) + 125_000_000 * rates.TABLE_BYTES_PER_IMAGE
    codec = 4 * 32768 * 128
    assert found.plan.bytes_on_store == 10**9 * 92 + (found.plan.num_segments + 1) * codec
    # 64 GB · 0.9 - 3.2 GB hold 50 segments of 1.08 GB; there are 87.
    assert (found.plan.num_segments, found.num_shards, found.segments_per_shard) == (87, 2, 44)
    assert found.replicas == 2
    per_vector = 128 * (
        rates.READ_SECONDS_PER_VALUE
        + rates.CODE_SECONDS_PER_VALUE[4]
        + 2 * 32768 / rates.KMEANS_FLOP_PER_SECOND
    )
    # 9 tasks of 4.3 GB have room in 65 % of 64 GB, and 4 of 4 cores: 16 tasks take 87 segments in 6 turns.
    assert found.build_cores == 4 * 16
    turns = 6 * found.plan.vectors_per_segment
    assert found.build_hours == pytest.approx(turns * per_vector / 4 / 3600)
    # Four nodes of 0.625 GB/s read float16 vectors and write the segments; a merge reads and writes these.
    a_second = 4 * rates.NETWORK_BYTES_PER_SECOND
    written = found.plan.bytes_on_store
    assert found.build_network_hours == pytest.approx((10**9 * 256 + written) / a_second / 3600)
    assert found.merge_hours == pytest.approx(2 * written / a_second / 3600)
    # The fuller shard has 44 segments; its lists are found once for all of them.
    scanned = 44 * found.plan.vectors_per_segment * 182 / 32768
    coarse = rates.COARSE_SECONDS_PER_VALUE * 32768 * 128
    assert found.query_seconds == pytest.approx(coarse + scanned * 128 * rates.SCAN_SECONDS_PER_VALUE)
    rounds = 2 * 2_097_152 * 32768 * 128 * 6
    assert found.train_hours == pytest.approx(rounds / (4 * rates.KMEANS_FLOP_PER_SECOND) / 3600)
    assert found.vectors_per_query == math.ceil(10**9 * 182 / 32768)


def test_many_cores_wait_for_the_network():
    # 128 cores a node encode 1.7 GB of vectors a second, which 0.625 GB/s cannot bring.
    nodes = Nodes(2000 * GB, 128, 2)
    found = capacity_of(10**9, 1024, codec="HR,IVF1024,RaBitQ4", nodes=nodes)
    bytes_of_both = 10**9 * 2048 + found.plan.bytes_on_store
    seconds = bytes_of_both / (2 * rates.NETWORK_BYTES_PER_SECOND)
    assert found.build_hours == found.build_network_hours == pytest.approx(seconds / 3600)


@pytest.mark.parametrize("front", ["", "HR,", "RR128,", "RR256,"])
def test_the_recall_of_vectors_as_they_are_and_of_rotated_ones_is_known(front):
    assert capacity_of(10**6, codec=f"{front}IVF,RaBitQ4").expected_recall == RECALL_BY_BITS[4]
    assert capacity_of(10**6, codec=f"{front}IVF,Flat").expected_recall == 1.0


@pytest.mark.parametrize("front", ["PCA8,", "RR64,", "PCAR128,", "OPQ16_64,"])
def test_the_recall_behind_other_transforms_was_not_measured(front):
    assert capacity_of(10**6, codec=f"{front}IVF,RaBitQ4").expected_recall is None
    assert capacity_of(10**6, codec=f"{front}IVF,Flat").expected_recall is None


def test_lists_of_fewer_dimensions_cost_by_these():
    whole, part = (plan_index(10**8, 128, codec=f"RR{dim},IVF8192,RaBitQ4") for dim in (128, 32))
    assert (whole.list_dim, part.list_dim) == (128, 32)
    read = 128 * rates.READ_SECONDS_PER_VALUE
    costs = [rates.seconds_per_vector(plan) - read for plan in (whole, part)]
    assert costs[0] == pytest.approx(4 * costs[1])
    assert rates.coarse_seconds(whole) == pytest.approx(4 * rates.coarse_seconds(part))
    whole, part = (capacity_of(10**8, codec=f"RR{dim},IVF8192,RaBitQ4") for dim in (128, 32))
    assert whole.query_seconds == pytest.approx(4 * part.query_seconds)
    assert whole.train_hours == pytest.approx(4 * part.train_hours)


@pytest.mark.parametrize(
    ("target", "bits"), [(0.0, 3), (0.9, 3), (0.95, 4), (0.99, 4), (0.9965, 6), (0.999, 8), (1.0, 8)]
)
def test_bits_follow_the_target(target, bits):
    assert bits_for(target) == bits
    assert plan_index(10**6, 128, target_recall=target).factory == f"HR,IVF2048,RaBitQ{bits}"
    assert plan_index(10**6, 128, codec="IVF,SQ8", target_recall=target).factory == "IVF2048,SQ8"


def test_more_bits_find_no_less_and_are_all_reckoned_with():
    recalls = [RECALL_BY_BITS[bits] for bits in sorted(RECALL_BY_BITS)]
    assert recalls == sorted(recalls)
    assert RECALL_BY_BITS.keys() == rates.CODE_SECONDS_PER_VALUE.keys()
    targets = [step / 1000 for step in range(1001)]
    chosen = [bits_for(target) for target in targets]
    assert chosen == sorted(chosen)


def test_what_does_not_fit_says_what_to_change():
    found = capacity_of(10**10, 1024, nodes=Nodes(64 * GB, 16, 10))
    assert not found.fits
    assert found.num_shards == 102
    line = found.advice[0]
    assert line.startswith("does not fit: 10 nodes of 64 GB hold 10% of it; take 102 of them, or 10 of ")
    assert "--codec HR,IVF,RaBitQ3" in line
    # What it advises does fit.
    assert capacity_of(10**10, 1024, nodes=Nodes(64 * GB, 16, 102)).fits
    memory = float(line.split("or 10 of ")[1].split(" GB")[0])
    assert capacity_of(10**10, 1024, nodes=Nodes(int(1.01 * memory * GB), 16, 10)).fits


def test_a_task_that_trains_too_few_lists_is_told():
    found = capacity_of(10**9, 1024)
    assert found.plan.nlist == 4096
    (line,) = found.advice
    assert line.endswith(
        "trains 4,096 lists, the vectors want 65,536: a list is 16 times as long; --task-memory 68.8 trains "
        "all with --plan-node-memory 211.7; --task-memory 17.2 trains 16,384 on these nodes"
    )
    large = Nodes(512 * GB, 16)
    (line,) = capacity_of(10**9, 1024, nodes=large).advice
    assert line.endswith("a list is 16 times as long; --task-memory 68.8 trains all")
    enough = capacity_of(10**9, 1024, nodes=large, task_memory_bytes=int(68.8 * GB))
    assert enough.plan.nlist == 65_536
    assert not any("lists" in line for line in enough.advice)


@pytest.mark.parametrize(("num_vectors", "codec"), [(10**9, "IVF64,RaBitQ4"), (16_384, "HR,IVF,RaBitQ4")])
def test_what_memory_does_not_limit_is_not_told_to_take_more(num_vectors, codec):
    found = capacity_of(num_vectors, codec=codec)
    assert found.plan.nlist < wanted_lists(num_vectors)
    assert found.advice == ()


def test_tasks_that_leave_cores_idle_are_told():
    (line,) = capacity_of(10**9, nodes=Nodes(256 * GB, 64), task_memory_bytes=69 * GB).advice
    assert line.startswith("a node has memory for 2 tasks of 69 GB, so that 8 of its 64 cores build")
    assert capacity_of(10**9, nodes=Nodes(64 * GB, 16), task_memory_bytes=9 * GB).advice == ()


def test_graphs_find_lists_and_rotations_cost():
    flat, graph = (
        plan_index(10**8, 640, codec=f"RR640,IVF16384{coarse},RaBitQ4") for coarse in ("", "_HNSW32")
    )
    rotation = 2 * 2 * 640 / rates.KMEANS_FLOP_PER_SECOND  # in float64
    shared = rates.READ_SECONDS_PER_VALUE + rates.CODE_SECONDS_PER_VALUE[4] + rotation
    compared = 2 * flat.nlist / rates.KMEANS_FLOP_PER_SECOND
    assert rates.seconds_per_vector(flat) == pytest.approx(640 * (shared + compared))
    assert rates.seconds_per_vector(graph) == pytest.approx(640 * (shared + rates.HNSW_SECONDS_PER_VALUE))
    assert rates.coarse_seconds(flat) == pytest.approx(640 * flat.nlist * rates.COARSE_SECONDS_PER_VALUE)
    assert rates.coarse_seconds(graph) < 20 * rates.coarse_seconds(flat)


@pytest.mark.parametrize(("factory", "bits"), [("HR,IVF8,RaBitQ4", 4), ("IVF8,RaBitQ", 1), ("IVF8,SQ8", 0)])
def test_the_bits_of_a_factory_string(factory, bits):
    assert bits_of(factory) == bits


def test_ids_have_room_for_so_many_images_and_no_more():
    assert image_ids_of(((MAX_IMAGES - 1) << 8) + 255) == MAX_IMAGES - 1
    with pytest.raises(ConfigError, match=r"ids have room for 36,028,797,018,963,968; plan several"):
        plan_capacity(2 * MAX_IMAGES, 128, vectors_per_image=1, nodes=NODES)


def test_nodes_that_hold_no_task_or_no_segment_are_refused_in_a_line():
    complaint = r"a task's memory of 4.29 GB is more than one may reserve on a node of 8 GB: 2.6 GB, half of"
    with pytest.raises(ConfigError, match=complaint):
        capacity_of(10**9, nodes=Nodes(8 * GB, 4))
    most = int(TASK_SHARE * 64 * GB / 2)
    assert capacity_of(10**9, task_memory_bytes=most).task_memory_bytes == most
    with pytest.raises(ConfigError, match=r"a task's memory of 20.8 GB is more than one may reserve"):
        capacity_of(10**9, task_memory_bytes=most + 1)
    with pytest.raises(ConfigError, match=r"does not hold one segment of .* plan for .* at least") as caught:
        capacity_of(10**9, nodes=Nodes(3 * GB, 4), task_memory_bytes=int(0.9 * GB))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("per_image", [0, -1, 257])
def test_impossible_images_are_refused(per_image):
    with pytest.raises(ValueError, match="expected 0 < vectors_per_image <= 256"):
        plan_capacity(100, 128, vectors_per_image=per_image, nodes=NODES)
