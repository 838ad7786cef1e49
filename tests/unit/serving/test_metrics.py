"""What `/metrics` says of a service, and what a replica tells its Ray node besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from for_ray.serving.app import make_app
from tests.unit.serving.conftest import Served, browser


def test_metrics_count_by_route_stage_and_snapshot(served: Served) -> None:
    client = served.client()
    for _ in range(3):
        client.post("/search", json={"text": "a dog", "k": 1})
    client.post("/search", json={"text": "("})
    client.get("/nothing/of/this/name")
    client.get("/thumbnails/0")
    client.get("/thumbnails/0")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'for_ray_requests_total{route="/search",status="200"} 3.0',
        'for_ray_requests_total{route="/search",status="400"} 1.0',
        'for_ray_requests_total{route="other",status="404"} 1.0',
        'for_ray_question_seconds_count{stage="total"} 3.0',
        'for_ray_question_seconds_count{stage="encode"} 3.0',
        'for_ray_thumbnails_total{source="memory"} 1.0',
        'for_ray_thumbnails_total{source="made"} 1.0',
        "for_ray_snapshot_id 1.0",
        "for_ray_swaps 0.0",
        "for_ray_failed_refreshes 0.0",
    ):
        assert line in lines
    assert not any("of/this/name" in line for line in lines)


class Meters:
    """Remembers what it was told."""

    replica = "a1b2"

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def count_request(self, route: str, status: int) -> None:
        self.told.append((route, status))

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        self.told.append(tuple(seconds))

    def count_thumbnail(self, source: str) -> None:
        self.told.append((source,))


def test_a_replica_says_which_it_is_and_tells_its_node(served: Served) -> None:
    meters = Meters()
    client = browser(make_app(served.service, meters))
    client.post("/search", json={"text": "a dog", "k": 1})
    client.get("/thumbnails/0")
    assert meters.told == [
        ("encode", "filter", "faiss", "rank", "search", "total"), ("/search", 200),
        ("made",), ("/thumbnails/{image_id}", 200),
    ]  # fmt: skip
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'for_ray_requests_total{replica="a1b2",route="/search",status="200"} 1.0',
        'for_ray_question_seconds_count{replica="a1b2",stage="total"} 1.0',
        'for_ray_thumbnails_total{replica="a1b2",source="made"} 1.0',
        'for_ray_snapshot_id{replica="a1b2"} 1.0',
        'for_ray_questions_waiting{replica="a1b2"} 0.0',
    ):
        assert line in lines
