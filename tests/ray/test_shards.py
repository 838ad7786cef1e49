"""Shards answer as one process does, whatever is asked, and also when one of them dies."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray

from for_ray.errors import ConfigError, DataError, StageError
from for_ray.index.search import open_segments, search_images
from for_ray.index.similar import search_similar
from for_ray.index.table import open_table, take_vectors
from for_ray.retrieval import Question, open_index
from for_ray.schema import Segment
from for_ray.stages import shards
from for_ray.stages.shards import ShardSet, assign_segments
from tests.planted import Planted, PlantedIndex, make_tiny_bundle

DIM, NUM_IMAGES = 16, 300


def unit(random: np.random.Generator, count: int) -> np.ndarray:
    vectors = random.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def planted(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> PlantedIndex:
    """Five segments of unequal size."""
    folder = tmp_path_factory.mktemp("shards")
    planted = PlantedIndex.make(folder / "index", make_tiny_bundle(folder))
    random = np.random.default_rng(0)
    for first, end in itertools.pairwise([0, 120, 130, 200, 210, NUM_IMAGES]):
        rows = [Planted(f"/{number}.jpg", unit(random, 1 + number % 5)) for number in range(first, end)]
        planted.add(rows, codec="IVF8,RaBitQ4")
    planted.publish(deleted=[3, 125, 299], nprobe=2)
    return planted


@pytest.fixture(scope="module")
def searchers(planted: PlantedIndex):
    """The same segments in this process and in three actors."""
    given = (planted.layout, planted.bundle.fingerprint, planted.segments)
    many = ShardSet(*given, nprobe=2, num_shards=3)
    yield open_segments(*given, nprobe=2), many
    many.close()


FILTERS = {
    "no filter": {},
    "gone images": {"exclude_image_ids": np.array([3, 125, 299])},
    "some": {"only_image_ids": np.arange(0, NUM_IMAGES, 3)},
    "of one shard": {"only_image_ids": np.arange(205, 209)},
    "some, not the gone ones": {
        "only_image_ids": np.arange(100, 260),
        "exclude_image_ids": np.arange(90, 140),
    },
    "none": {"only_image_ids": np.empty(0, np.int64)},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_many_shards_find_what_one_process_finds(planted, searchers, filters):
    images, (one, many) = open_table(planted.images_uri), searchers
    random = np.random.default_rng(1)
    for k, nprobe in [(1, None), (10, 1), (1000, 8)]:
        queries = unit(random, 3)
        for mine, its in zip(
            many.search(queries, k, nprobe=nprobe, **filters),
            one.search(queries, k, nprobe=nprobe, **filters),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, its)

        def exact(ids):
            return take_vectors(images, ids)

        for search, query in ((search_images, queries[0]), (search_similar, queries)):
            mine, its = (search(each, query, k, exact=exact, **filters) for each in (many, one))
            for column, other in zip(mine, its, strict=True):
                np.testing.assert_array_equal(column, other)


def test_wrong_questions_are_refused_as_in_one_process(searchers):
    _, many = searchers
    for queries, k in [(np.zeros((1, 3)), 1), (np.full((1, DIM), np.nan), 1), (np.zeros((1, DIM)), 0)]:
        with pytest.raises(ValueError, match=r"expected|NaN"):
            many.search(queries, k)
    with pytest.raises(ValueError, match="ascending order"):
        many.search(np.eye(DIM)[:1], 3, only_image_ids=np.array([7, 7]))


def test_an_actor_that_dies_is_started_again(planted, searchers):
    one, many = searchers
    queries = unit(np.random.default_rng(2), 4)
    right = one.search(queries, 20)
    for actor in many._actors[:2]:
        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        found = many.search(queries, 20)
        np.testing.assert_array_equal(found.vector_ids, right.vector_ids)
        np.testing.assert_array_equal(found.scores, right.scores)


def test_questions_at_once_while_an_actor_dies(searchers):
    """Each thread has filters of its own, more of them than an actor keeps."""
    one, many = searchers
    queries = unit(np.random.default_rng(4), 3)
    victim = many._actors[1]
    pid = ray.get(victim.__ray_call__.remote(lambda _: os.getpid()))
    answered = threading.Event()

    def ask(thread):
        same = []
        for number in range(8):
            only = np.sort(np.random.default_rng([thread, number]).choice(NUM_IMAGES, 150, replace=False))
            for nprobe in (2, 8):
                found = many.search(queries, 40, only_image_ids=only, nprobe=nprobe)
                right = one.search(queries, 40, only_image_ids=only, nprobe=nprobe)
                same.append(all(map(np.array_equal, found, right)))
            answered.set()
        return same

    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ask, thread) for thread in range(6)]
        assert answered.wait(60)
        os.kill(pid, signal.SIGKILL)
        assert [all(each.result()) for each in asked] == [True] * 6
    assert ray.get(victim.__ray_call__.remote(lambda _: os.getpid())) != pid


def test_shards_that_are_gone_for_good_are_told(planted):
    many = ShardSet(planted.layout, planted.bundle.fingerprint, planted.segments, nprobe=2, num_shards=1)
    many.close()
    with pytest.raises(StageError, match="search: a shard of 1 is gone") as caught:
        many.search(np.eye(DIM)[:1], 3)
    assert "\n" not in str(caught.value)


def test_questions_are_asked_of_shards_as_of_one_process(planted):
    one, many = open_index(planted.uri), open_index(planted.uri, num_shards=1)
    like = one.search_vector(unit(np.random.default_rng(3), 1)[0], k=1)[0]
    question = Question(like=f"{like.image_id}:{like.slot}", k=30)
    assert [hit.to_json() for hit in many.ask(question).hits] == [
        hit.to_json() for hit in one.ask(question).hits
    ]
    assert not {3, 125, 299} & {hit.image_id for hit in many.ask(question).hits}
    many._segments.close()


def test_a_damaged_segment_is_told(planted):
    wrong = planted.segments[0].model_copy(update={"sha256": "0" * 64})
    given = (planted.layout, planted.bundle.fingerprint, [wrong])
    with pytest.raises(DataError, match=wrong.file_name):
        ShardSet(*given, nprobe=1, num_shards=1)


def test_more_shards_than_this_machine_has_room_for_are_refused_at_once(planted):
    given = (planted.layout, planted.bundle.fingerprint, planted.segments)
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(
        ConfigError, match=rf"5 shards reserve {5 * cpus:g} CPUs, this machine has {cpus:g}: "
    ):
        ShardSet(*given, nprobe=1, num_shards=5, num_cpus=cpus)


@pytest.mark.slow
def test_shards_that_a_cluster_has_no_room_for_are_told_soon(planted, monkeypatch, caplog):
    """They may be waited for: the cluster may grow."""
    monkeypatch.setattr(ray._private.worker._global_node, "head", False)  # as where a cluster was joined
    monkeypatch.setattr(shards, "ROOM_SECONDS", 0.5)
    monkeypatch.setattr(shards, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(shards, "START_SECONDS", 5.0)
    given = (planted.layout, planted.bundle.fingerprint, planted.segments)
    cpus = ray.cluster_resources()["CPU"]
    lack = (
        rf"\d of 5 shards have no place: each reserves {cpus:g} CPUs of a node, the cluster has {cpus:g}, of"
    )
    with pytest.raises(ConfigError, match=f"5 shards did not open within 5 s; {lack}") as caught:
        ShardSet(*given, nprobe=1, num_shards=5, num_cpus=cpus)
    assert "\n" not in str(caught.value)
    assert [re.match(lack, record.message) is not None for record in caplog.records] == [True]


@pytest.mark.slow
def test_an_actor_that_dies_whenever_it_opens_its_segments_is_told(planted, monkeypatch):
    class Dying(shards._Shard):
        def describe(self) -> None:
            os._exit(1)

    monkeypatch.setattr(shards, "_Shard", Dying)
    given = (planted.layout, planted.bundle.fingerprint, planted.segments)
    with pytest.raises(StageError, match=r"search: a shard of 2 is gone \(\w+\), and asking again") as caught:
        ShardSet(*given, nprobe=1, num_shards=2)
    assert "\n" not in str(caught.value)


def test_an_index_without_segments_finds_nothing(planted):
    many = ShardSet(planted.layout, planted.bundle.fingerprint, [], nprobe=0, num_shards=4)
    assert (many.dim, many.nlist, many.num_vectors) == (0, 0, 0)
    assert many.search(np.eye(DIM)[:2], 5).vector_ids.shape == (2, 0)


def segment(first: int, num_bytes: int) -> Segment:
    return Segment(
        segment_id=f"{first}",
        codec_id="c",
        file_name=f"{first}.faiss",
        sha256="0",
        num_bytes=num_bytes,
        num_vectors=1,
        first_image_id=first,
        end_image_id=first + 1,
    )


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sizes", [[5], [1] * 20, [100, 1, 1, 1, 1], [1, 1, 1, 100], [8, 3, 9, 2, 7, 7]])
def test_shards_are_neighbours_of_about_equal_bytes(sizes, num_shards):
    segments = [segment(number, size) for number, size in enumerate(sizes)]
    shards = assign_segments(segments[::-1], num_shards)
    assert [each for shard in shards for each in shard] == segments
    assert len(shards) == min(num_shards, len(segments))
    assert all(shards)
    largest = max(sum(each.num_bytes for each in shard) for shard in shards)
    assert largest <= sum(sizes) / len(shards) + max(sizes)


def test_no_shard_is_refused():
    with pytest.raises(ValueError, match="at least one shard"):
        assign_segments([segment(0, 1)], 0)
