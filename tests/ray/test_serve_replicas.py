"""Two replicas of the service, as `jobs/serve.py` starts them: an answer goes on in either of them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from for_ray.index import snapshots
from for_ray.retrieval import OpenIndex, Question, open_index
from for_ray.serving.client import Client, ServiceError
from tests.planted import PlantedIndex
from tests.ray.test_serving import SECONDS, WORDS, Service, actors, plain, planted, served, wait_until

__all__ = ["planted"]

K, NUM_SWAPS, NUM_CLIENTS = 12, 20, 4
NUM_PAGES = 3


@pytest.fixture(scope="module")
def service(planted: PlantedIndex, ray_address: str) -> Iterator[Service]:
    """On the cluster with two GPUs in its books: each replica reserves one."""
    flags = ("--device", "auto", "--replicas", 2, "--refresh-seconds", 2)
    with served(planted.uri, ray_address, *flags) as found:
        yield found


def replicas(service: Service, num_asked: int = 40) -> dict[str, int]:
    """The snapshot that each replica last said it serves, in so many answers."""
    told = {}
    for _ in range(num_asked):
        lines = requests.get(f"{service.url}/metrics", timeout=SECONDS).text
        (found,) = re.findall(r'^for_ray_snapshot_id\{replica="(\w+)"\} (\d+)', lines, re.MULTILINE)
        told[found[0]] = int(found[1])
    return told


def pages(index: OpenIndex, words: str) -> list[tuple]:
    """The first pages of an answer, as one process gives them."""
    found: list[Any] = []
    for _ in range(NUM_PAGES):
        page = found[-1].next_page if found else None
        found.append(index.ask(Question(words, k=K, page=page)))
    return [plain(each) for each in found]


def expected(planted: PlantedIndex, snapshot_id: int) -> dict[str, list[tuple]]:
    index = open_index(planted.uri, snapshot_id=snapshot_id)
    return {words: pages(index, words) for words in WORDS}


class Reader:
    """A client that reads one answer after the other to its third page, until it is told to end."""

    def __init__(self, url: str, number: int, is_over: threading.Event) -> None:
        self._url, self._number, self._is_over = url, number, is_over
        self.answers: list[tuple[str, list[tuple]]] = []
        self.done = threading.Semaphore(0)

    def read(self) -> None:
        with Client(self._url) as client:
            while not self._is_over.is_set():
                words = WORDS[(self._number + len(self.answers)) % len(WORDS)]
                found: list[Any] = []
                for _ in range(NUM_PAGES):
                    page = found[-1].next_page if found else None
                    found.append(client.search(words, k=K, page=page))
                self.answers.append((words, [plain(each) for each in found]))
                self.done.release()

    def read_one_more(self) -> None:
        """Wait until an answer that was begun after this call is read."""
        while self.done.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.done.acquire(timeout=SECONDS)


@pytest.mark.slow
def test_answers_go_on_in_any_replica_across_switches(planted: PlantedIndex, service: Service) -> None:
    """Each snapshot lacks other images; replicas take it up to two seconds apart."""
    assert len(replicas(service)) == len(actors("ServeReplica")) == 2
    first_id = snapshots.latest(planted.layout).snapshot_id
    right = {first_id: expected(planted, first_id)}
    is_over = threading.Event()
    readers = [Reader(service.url, number, is_over) for number in range(NUM_CLIENTS)]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        reading = [pool.submit(reader.read) for reader in readers]
        try:
            for _ in range(NUM_SWAPS):
                last = right[max(right)]
                deleted = sorted({hit[2][0] for words in WORDS for hit in last[words][1][0][:4]})
                published = planted.publish(deleted=deleted, nprobe=2).snapshot_id
                right[published] = expected(planted, published)
                wait_until(lambda id_=published: set(replicas(service).values()) == {id_})
                for reader in readers:  # so that no answer is read across two switches
                    reader.read_one_more()
        finally:
            is_over.set()
        assert [each.result() for each in reading] == [None] * NUM_CLIENTS  # none was refused
    answers = [answer for reader in readers for answer in reader.answers]
    for words, found in answers:
        assert found == right[found[0][1][1]][words]
    assert {found[0][1][1] for _, found in answers} == right.keys()


@pytest.mark.slow
def test_each_replica_keeps_the_snapshot_before_and_no_other(planted: PlantedIndex, service: Service) -> None:
    client = service.client()
    tokens = {}
    for _ in range(3):
        answer = client.search("a dog", k=K)
        tokens[answer.snapshot_id] = answer.next_page
        published = planted.publish(deleted=[len(tokens)], nprobe=2).snapshot_id
        wait_until(lambda id_=published: set(replicas(service).values()) == {id_})
    *older, before = sorted(tokens)
    right = pages(open_index(planted.uri, snapshot_id=before), "a dog")[1]
    for _ in range(20):
        assert plain(client.search("a dog", k=K, page=tokens[before])) == right
        for snapshot_id in older:
            with pytest.raises(ServiceError, match="begin with the first page") as refused:
                client.search("a dog", k=K, page=tokens[snapshot_id])
            assert refused.value.code == "snapshot_changed"


@pytest.mark.slow
def test_a_snapshot_that_one_replica_told_of_is_open_in_the_other(
    planted: PlantedIndex, service: Service
) -> None:
    """Asked for as soon as it is published: whichever answers has looked for it."""
    for _ in range(5):
        published = planted.publish(deleted=[3], nprobe=2).snapshot_id
        for _ in range(8):
            assert service.client().search("a dog", k=K, snapshot_id=published).snapshot_id == published


@pytest.mark.slow
def test_each_replica_has_a_gpu_and_its_own_metrics(service: Service, ray_address: str) -> None:
    import ray

    assert ray.available_resources().get("GPU", 0) == 0
    node = ray.nodes()[0]
    where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def counted() -> dict[str, float]:
        lines = requests.get(where, timeout=SECONDS).text
        found: dict[str, float] = {}
        for tags, value in re.findall(
            r"^ray_for_ray_requests_total\{(.*)\} ([0-9.e+]+)$", lines, re.MULTILINE
        ):
            if 'path="/search"' in tags and 'status="200"' in tags:
                (replica,) = re.findall(r'replica="(\w+)"', tags)
                found[replica] = float(value)
        return found

    client = service.client()
    for _ in range(20):
        client.search("a dog", k=K)
    assert wait_until(lambda: len(counted()) == 2)
    assert counted().keys() == replicas(service).keys()
