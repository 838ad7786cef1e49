"""The service on Ray, as `jobs/serve.py` starts it: its answers, its switches, and what dies in it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from for_ray.model.bundle import open_bundle
from for_ray.retrieval import Filters, OpenIndex, Question, open_index
from for_ray.serving.client import Client, ServiceError
from tests.planted import Planted, PlantedIndex

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
NUM_IMAGES, SLOTS, NUM_SHARDS = 240, 3, 2
SECONDS = 90
WORDS = ["a dog", "a dog AND a violin", "a cat NOT a car", "a bicycle", "(a bus OR a truck) AND a dog"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedIndex:
    """Four segments; the images' files lie on the disk for the first ones."""
    folder = tmp_path_factory.mktemp("serving")
    planted = PlantedIndex.make(folder / "index", open_bundle("picturebook"))
    random = np.random.default_rng(0)
    for first in range(0, NUM_IMAGES, NUM_IMAGES // 4):
        vectors = random.normal(size=(NUM_IMAGES // 4, SLOTS, planted.bundle.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        boxes = np.sort(random.random((NUM_IMAGES // 4, SLOTS, 2, 2)), axis=2).reshape(-1, SLOTS, 4)
        rows = zip(vectors, boxes.tolist(), strict=True)
        planted.add(
            [Planted(f"/images/{first + row}.jpg", *each) for row, each in enumerate(rows)],
            codec="IVF4,RaBitQ4",
        )
    planted.publish(deleted=[1], nprobe=2)
    return planted


class Service(NamedTuple):
    process: subprocess.Popen
    url: str

    def client(self) -> Client:
        return Client(self.url)


@contextlib.contextmanager
def served(index_uri: str, ray_address: str, *flags: object) -> Iterator[Service]:
    """The command with these flags, on a cluster that is there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ["--index", index_uri, "--port", port, "--requests-per-second", 0, *flags]
    process = subprocess.Popen(
        [sys.executable, str(JOB), *map(str, given)],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stderr.readline()
        assert said == f"serving http://127.0.0.1:{port}\n", said + process.stderr.read()
        yield Service(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(SECONDS)


@pytest.fixture(scope="module")
def service(planted: PlantedIndex, ray_address: str) -> Iterator[Service]:
    """The command, on the cluster that this process has joined too."""
    flags = ("--shards", NUM_SHARDS, "--refresh-seconds", 0.1, "--grace-seconds", 1)
    with served(planted.uri, ray_address, *flags) as found:
        yield found


def actors(name: str) -> dict[str, int]:
    """The living actors of a class by their ids, with their processes."""
    from ray._private import state

    return {
        actor_id: actor["Pid"]
        for actor_id, actor in state.actors().items()
        if actor["State"] == "ALIVE" and name in actor["ActorClassName"]
    }


def wait_until(is_so: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


def plain(answer: Any) -> tuple:
    """All of an answer but the times; the boxes as JSON rounds them."""
    hits = tuple(
        (
            hit.uri,
            float(hit.score),
            (hit.image_id, hit.slot, hit.folded, hit.width, hit.height),
            tuple((each.name, float(each.score), each.slot, rounded(each.box)) for each in hit.found),
            rounded(hit.box),
        )
        for hit in answer.hits
    )
    facts = (answer.names, answer.snapshot_id, answer.num_looked_at, answer.reason, answer.next_page)
    return hits, facts, (answer.is_complete, answer.is_exhaustive, answer.is_proven)


def rounded(box: tuple) -> tuple:
    return tuple(round(side, 4) for side in box)


def picture() -> bytes:
    fields = np.random.default_rng(3).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(fields).resize((120, 100)).save(file, "PNG")
    return file.getvalue()


def test_answers_are_those_of_one_process(planted: PlantedIndex, service: Service) -> None:
    index, client = open_index(planted.uri), service.client()
    for words in WORDS:
        assert plain(client.search(words, k=30)) == plain(index.ask(Question(words, k=30)))
    region = (0.1, 0.1, 0.6, 0.9)
    for given in ({"image": picture()}, {"image": picture(), "region": region}):
        # The backbone's sums depend on how many threads torch has in a process.
        hits = client.search(**given, k=25).hits
        right = index.ask(Question(**given, k=25)).hits
        assert [hit.uri for hit in hits] == [hit.uri for hit in right], given
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in right], abs=1e-4)
    for given in (
        {"like": "7"},
        {"like": "7:2"},
        {"text": "a dog", "min_score": 0.05},
        {"text": "a dog", "fold_at": 0.5},
        {"text": "a cat NOT a dog", "unwanted_above": 0.1},
    ):
        assert plain(client.search(**given, k=25)) == plain(index.ask(Question(**given, k=25))), given
    for filters in ({"under": "/images/1"}, {"image_ids": (3, 5, 200)}, {"glob": "*7.jpg"}):
        asked = Question("a dog", k=9, filters=Filters(**filters))
        assert plain(client.search("a dog", k=9, **filters)) == plain(index.ask(asked))
    page = client.search("a dog", k=9).next_page
    right = index.ask(Question("a dog", k=9, page=page))
    assert plain(client.search("a dog", k=9, page=page)) == plain(right)
    assert plain(client.similar(7, 2, k=5)) == plain(index.ask(Question(like="7:2", k=5)))
    assert client.objects(7).slots[2].box == rounded(index.ask(Question(like="7:2", k=1)).hits[0].box)
    health = client.health()
    assert (health["status"], health["stale"]) == ("ok", None)
    assert health["snapshot_id"] == index.snapshot.snapshot_id


def expected(planted: PlantedIndex, snapshot_id: int) -> dict[str, tuple]:
    index: OpenIndex = open_index(planted.uri, snapshot_id=snapshot_id)
    return {words: plain(index.ask(Question(words, k=12))) for words in WORDS}


@pytest.mark.parametrize("num_swaps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_switches_under_load(planted: PlantedIndex, service: Service, num_swaps: int) -> None:
    """Each snapshot lacks other images: what the best hits of the one before are is deleted."""
    right = {}
    is_over = threading.Event()

    def ask(thread: int) -> list[tuple[str, Any]]:
        answers = []
        with service.client() as client:
            while not is_over.is_set():
                words = WORDS[(thread + len(answers)) % len(WORDS)]
                answers.append((words, plain(client.search(words, k=12))))
        return answers

    first_id = service.client().health()["snapshot_id"]
    right[first_id] = expected(planted, first_id)
    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(ask, thread) for thread in range(4)]
        try:
            for _ in range(num_swaps):
                last = right[max(right)]
                deleted = sorted({each[2][0] for words in WORDS for each in last[words][0][:4]})
                published = planted.publish(deleted=deleted, nprobe=2).snapshot_id
                right[published] = expected(planted, published)
                wait_until(lambda id_=published: service.client().health()["snapshot_id"] == id_)
        finally:
            is_over.set()
        answers = [answer for thread in threads for answer in thread.result()]
    assert len(right) == num_swaps + 1
    for words, answer in answers:
        assert answer == right[answer[1][1]][words]
    asked = {answer[1][1] for _, answer in answers}
    assert len(asked) > num_swaps // 2  # a slow machine may miss some, never all
    wait_until(lambda: len(actors("_Shard")) == NUM_SHARDS)


def test_a_shard_that_is_killed_comes_back(planted: PlantedIndex, service: Service) -> None:
    client = service.client()
    right = plain(client.search("a dog", k=30))
    before = actors("_Shard")
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
        assert plain(client.search("a dog", k=30)) == right
    assert wait_until(lambda: actors("_Shard").keys() == before.keys())
    assert not set(actors("_Shard").values()) & set(before.values())


@pytest.mark.slow
def test_a_replica_that_is_killed_comes_back(planted: PlantedIndex, service: Service) -> None:
    right = plain(service.client().search("a dog", k=30))
    (before,) = actors("ServeReplica").values()
    old_shards = actors("_Shard")
    os.kill(before, signal.SIGKILL)

    def asked_again() -> tuple | None:
        try:
            return plain(service.client().search("a dog", k=30))
        except ServiceError:
            return None

    wait_until(lambda: before not in actors("ServeReplica").values())
    assert wait_until(asked_again) == right
    wait_until(lambda: len(actors("_Shard")) == NUM_SHARDS)
    assert not actors("_Shard").keys() & old_shards.keys()


def test_sigterm_ends_it_all(service: Service) -> None:
    assert actors("ServeController")
    service.process.send_signal(signal.SIGTERM)
    _, said = service.process.communicate(timeout=SECONDS)
    assert (service.process.returncode, said) == (0, "")
    with pytest.raises(ServiceError, match="cannot be reached"):
        service.client().health()
    for name in ("ServeController", "ServeReplica", "ProxyActor", "_Shard"):
        wait_until(lambda name=name: not actors(name))
