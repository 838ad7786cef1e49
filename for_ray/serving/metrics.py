"""What the service did, as Prometheus reads it; each service counts for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from for_ray.serving.current import Current

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters of one service; threads share them.

    Args:
        current: Whose swaps are told.
        num_waiting: Questions that wait for their turn.
    """

    def __init__(self, current: Current, num_waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("for_ray_requests", "Requests", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "for_ray_question_seconds",
            "What a question took: encode, filter, search, total",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._thumbnails = Counter(
            "for_ray_thumbnails", "Thumbnails, from memory or made", ["source"], registry=self._registry
        )
        for name, help_, value in (
            ("for_ray_snapshot_id", "The snapshot that questions go to", lambda: current.snapshot_id),
            ("for_ray_questions_waiting", "Questions that wait for their turn", num_waiting),
            ("for_ray_swaps", "Snapshots that took another's place", lambda: current.num_swaps),
            ("for_ray_failed_refreshes", "Refreshes that failed", lambda: current.num_failed),
        ):
            Gauge(name, help_, registry=self._registry).set_function(value)

    def count_request(self, route: str, status: int) -> None:
        """One request; `route` is a path of the API, never what a client sent."""
        self._requests.labels(route, str(status)).inc()

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        """What one question took, by stage."""
        for stage, value in seconds.items():
            self._seconds.labels(stage).observe(value)

    def count_thumbnail(self, *, is_kept: bool) -> None:
        """One thumbnail."""
        self._thumbnails.labels("memory" if is_kept else "made").inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
