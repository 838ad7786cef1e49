"""The plan: properties over all sizes, and a few sizes by hand."""

from __future__ import annotations

import math

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from for_ray.errors import ConfigError
from for_ray.index.plan import DEFAULT_MEMORY_BYTES, IndexPlan, plan_index

GB = 1 << 30
NUM_VECTORS = st.one_of(st.integers(0, 20_000), st.integers(0, 10**10))
DIMS = st.sampled_from([64, 128, 512, 1024])
CODECS = st.sampled_from([None, "IVF,SQ8", "IVF4096,Flat", "RR64,IVF,RaBitQ2", "IVF64_HNSW32,PQ16"])


def plan_of(num_vectors: int, dim: int, codec: str | None, memory: int) -> IndexPlan:
    return plan_index(num_vectors, dim, codec=codec, memory_bytes=memory)


@settings(deadline=None, max_examples=150)
@given(NUM_VECTORS, DIMS, CODECS, st.sampled_from([2 * GB, 16 * GB, 256 * GB]))
def test_what_holds_for_every_plan(num_vectors, dim, codec, memory):
    plan = plan_of(num_vectors, dim, codec, memory)
    # The segments hold all vectors, and none of them is superfluous.
    assert plan.num_segments * plan.vectors_per_segment >= num_vectors
    assert (plan.num_segments - 1) * plan.vectors_per_segment < max(1, num_vectors)
    # Training: enough for FAISS not to warn, no more than there are, in a quarter of the memory.
    assert plan.nlist == 1 or plan.training_vectors >= 39 * plan.nlist
    assert plan.training_vectors <= min(num_vectors, 128 * plan.nlist)
    assert plan.training_vectors * dim * 4 <= memory / 4
    assert 1 <= plan.nprobe <= plan.nlist
    # A task holds its lists, which may be twice their content, and the codec.
    assert 2 * plan.vectors_per_segment * plan.bytes_per_vector + plan.codec_bytes <= memory / 2 or (
        plan.vectors_per_segment == 1
    )
    assert plan.bytes_on_store >= num_vectors * plan.bytes_per_vector
    # FAISS agrees.
    index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    assert ivf.nlist == plan.nlist
    assert ivf.code_size + 8 == plan.bytes_per_vector


@settings(deadline=None, max_examples=60)
@given(NUM_VECTORS, NUM_VECTORS, DIMS)
def test_more_vectors_never_need_less(one, other, dim):
    small, large = (plan_of(size, dim, "IVF,SQ8", 8 * GB) for size in sorted([one, other]))
    assert small.nlist <= large.nlist
    assert small.num_segments <= large.num_segments
    assert small.bytes_on_store <= large.bytes_on_store
    assert small.training_vectors <= large.training_vectors


@settings(deadline=None, max_examples=60)
@given(NUM_VECTORS, DIMS)
def test_more_memory_never_makes_more_segments_of_the_same_codec(num_vectors, dim):
    few, many = (plan_of(num_vectors, dim, "IVF64,SQ8", memory) for memory in (64 * GB, 2 * GB))
    assert few.num_segments <= many.num_segments


@pytest.mark.parametrize(
    ("num_vectors", "dim", "factory"),
    [
        (0, 128, "IVF1,Flat"),
        (1, 128, "IVF1,Flat"),
        (77, 128, "IVF1,Flat"),
        (78, 128, "IVF2,Flat"),
        (9_999, 128, "IVF256,Flat"),
        (10_000, 128, "HR,IVF256,RaBitQ4"),
        (50_000, 1024, "HR,IVF512,RaBitQ4"),
        (10**6, 1024, "HR,IVF2048,RaBitQ4"),
        (10**6, 640, "RR640,IVF2048,RaBitQ4"),
    ],
)
def test_the_codec_by_the_number_of_vectors(num_vectors, dim, factory):
    assert plan_index(num_vectors, dim).factory == factory


def test_a_billion_vectors():
    plan = plan_index(10**9, 1024, memory_bytes=64 * GB)
    assert plan.factory == "HR,IVF65536,RaBitQ4"
    assert plan.bytes_per_vector == 1024 * 4 // 8 + 20 + 8  # RaBitQ4: bits, 20 bytes of factors; the id
    assert 0.5e12 < plan.bytes_on_store < 0.6e12
    assert plan.training_vectors == 64 * 65536


def test_small_indexes_are_searched_whole():
    for num_vectors in (1, 500, 20_000, 50_000):
        plan = plan_index(num_vectors, 128)
        assert plan.nprobe == plan.nlist
    assert plan_index(300_000, 128, codec="IVF1024,RaBitQ4").nprobe == math.ceil(1024 / 6)
    assert plan_index(10**9, 128, memory_bytes=64 * GB).nprobe == math.ceil(math.sqrt(1 << 16))


@pytest.mark.parametrize(
    ("codec", "factory"),
    [
        ("IVF,Flat", "IVF1024,Flat"),
        ("IVF7,SQ8", "IVF7,SQ8"),
        ("RR64,IVF3,RaBitQ4", "RR64,IVF3,RaBitQ4"),
        ("OPQ8,IVF,PQ8", "OPQ8,IVF1024,PQ8"),
        ("PCA32,IVF,Flat", "PCA32,IVF1024,Flat"),
        ("IVF_HNSW32,SQ8", "IVF1024_HNSW32,SQ8"),
    ],
)
def test_the_number_of_lists_may_be_given_or_left_to_the_plan(codec, factory):
    plan = plan_index(100_000, 64, codec=codec)
    assert plan.factory == factory
    assert f"IVF{plan.nlist}" in factory


def test_a_given_number_of_lists_is_an_upper_limit():
    assert plan_index(1000, 64, codec="IVF4096,Flat").factory == "IVF25,Flat"


@pytest.mark.parametrize(
    ("codec", "why"),
    [
        ("Flat", "no FAISS inverted file"),
        ("HNSW32", "no FAISS inverted file"),
        ("", "no FAISS inverted file"),
        ("IDMap,IVF8,Flat", "no FAISS inverted file"),
        ("IVF256,PQ16x4fs", "FastScan"),
        ("IVF256,PQ16x4fsr", "FastScan"),
        ("IVF256,RaBitQfs", "FastScan"),
        ("IVF256,RaBitQfs4", "FastScan"),
        ("IVF256,FlatPanorama8", "lists cannot be merged"),
        ("IVF256,PQ16,RFlat", "re-ranked exactly anyway"),
        ("IVF256,PQ16,Refine(SQ8)", "re-ranked exactly anyway"),
        ("IVF256,Nonsense", "refused by FAISS"),
        ("IVF256,PQ7", "refused by FAISS for 64 dimensions"),
    ],
)
def test_codecs_that_cannot_be_merged_or_made_are_refused(codec, why):
    with pytest.raises(ConfigError, match=why) as caught:
        plan_index(1000, 64, codec=codec)
    assert "\n" not in str(caught.value)
    assert repr(codec) in str(caught.value)


def test_a_memory_that_does_not_hold_the_codec_is_refused():
    with pytest.raises(
        ConfigError, match=r"too small for a codec of \d+ bytes; give it at least (\d+) bytes"
    ):
        plan_index(10**9, 1024, codec="RR1024,IVF,SQ8", memory_bytes=8_000_000)


@pytest.mark.parametrize(("num_vectors", "dim"), [(-1, 8), (5, 0)])
def test_impossible_sizes_are_refused(num_vectors, dim):
    with pytest.raises(ValueError, match="expected num_vectors >= 0 and dim >= 1"):
        plan_index(num_vectors, dim)


def test_bytes_on_store_are_those_of_the_files(make_images, build):
    images = make_images(3000)
    for codec in ("IVF16,SQ8", "RR16,IVF16,RaBitQ4", "HR,IVF16,RaBitQ4", "IVF16,Flat"):
        built = build(images, codec, cuts=[900], name=codec.replace(",", "-"))
        on_disk = sum(path.stat().st_size for path in [built.codec_path, *built.paths])
        planned = built.plan.bytes_on_store + built.plan.codec_bytes  # cut in two here, one in the plan
        assert on_disk == pytest.approx(planned, rel=0.03)
    assert built.plan.num_segments == 1
    assert np.isclose(DEFAULT_MEMORY_BYTES, 4 * GB)
