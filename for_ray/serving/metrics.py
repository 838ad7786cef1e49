"""What the service did, as Prometheus reads it; each service, and each replica, counts for itself.

`/metrics` tells it of the replica that answers. All replicas together are at the metrics ports of Ray's
nodes, to which `meters.RayMeters` sends the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from for_ray.serving.current import Current

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Meters(Protocol):
    """What else is told what `Metrics` is told."""

    @property
    def replica(self) -> str:
        """Which of several services this is."""

    def count_request(self, route: str, status: int) -> None:
        """One request."""

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        """What one question took, by stage."""

    def count_thumbnail(self, source: str) -> None:
        """One thumbnail, from `memory` or `made`."""


class Metrics:
    """Counters of one service; threads share them.

    Args:
        current: Whose swaps are told.
        num_waiting: Questions that wait for their turn.
        meters: Are told the same; all metrics have their `replica` as a label then.
    """

    def __init__(
        self, current: Current, num_waiting: Callable[[], int], *, meters: Meters | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._meters = meters
        self._own = {} if meters is None else {"replica": meters.replica}
        self._requests = Counter(
            "for_ray_requests", "Requests", [*self._own, "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "for_ray_question_seconds",
            "What a question took: encode, filter, search, total",
            [*self._own, "stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._thumbnails = Counter(
            "for_ray_thumbnails",
            "Thumbnails, from memory or made",
            [*self._own, "source"],
            registry=self._registry,
        )
        for name, help_, value in (
            ("for_ray_snapshot_id", "The snapshot that questions go to", lambda: current.snapshot_id),
            ("for_ray_questions_waiting", "Questions that wait for their turn", num_waiting),
            ("for_ray_swaps", "Snapshots that took another's place", lambda: current.num_swaps),
            ("for_ray_failed_refreshes", "Refreshes that failed", lambda: current.num_failed),
        ):
            gauge = Gauge(name, help_, list(self._own), registry=self._registry)
            (gauge.labels(**self._own) if self._own else gauge).set_function(value)

    def count_request(self, route: str, status: int) -> None:
        """One request; `route` is a path of the API, never what a client sent."""
        self._requests.labels(**self._own, route=route, status=str(status)).inc()
        if self._meters is not None:
            self._meters.count_request(route, status)

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        """What one question took, by stage."""
        for stage, value in seconds.items():
            self._seconds.labels(**self._own, stage=stage).observe(value)
        if self._meters is not None:
            self._meters.count_seconds(seconds)

    def count_thumbnail(self, *, is_kept: bool) -> None:
        """One thumbnail."""
        source = "memory" if is_kept else "made"
        self._thumbnails.labels(**self._own, source=source).inc()
        if self._meters is not None:
            self._meters.count_thumbnail(source)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
