"""What a replica did, for the metrics port of its Ray node, where all replicas' metrics are.

Ray adds the prefix `ray_`, and the tags `replica`, `deployment` and `application`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray import serve
from ray.serve import metrics

from for_ray.serving.current import Current
from for_ray.serving.metrics import SECONDS


class RayMeters:
    """Metrics of this replica; to be made in one."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("for_ray_requests", "Requests.", ("path", "status"))
        self._seconds = metrics.Histogram(
            "for_ray_question_seconds",
            "What a question took: encode, filter, search, total.",
            list(SECONDS),
            ("stage",),
        )
        self._thumbnails = metrics.Counter(
            "for_ray_thumbnails", "Thumbnails, from memory or made.", ("source",)
        )
        self._snapshot = metrics.Gauge("for_ray_snapshot_id", "The snapshot that questions go to.")
        self._swaps = metrics.Gauge("for_ray_swaps", "Snapshots that took another's place.")
        self._failed = metrics.Gauge("for_ray_failed_refreshes", "Refreshes that failed.")

    @property
    def replica(self) -> str:
        """Which of the replicas this is, as Ray Serve calls it."""
        return str(serve.get_replica_context().replica_tag)

    def count_request(self, route: str, status: int) -> None:
        """One request; Ray keeps the tag `route` for the application's own."""
        self._requests.inc(tags={"path": route, "status": str(status)})

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        """What one question took, by stage."""
        for stage, value in seconds.items():
            self._seconds.observe(value, tags={"stage": stage})

    def count_thumbnail(self, source: str) -> None:
        """One thumbnail, from `memory` or `made`."""
        self._thumbnails.inc(tags={"source": source})

    def show(self, current: Current) -> None:
        """Where the replica stands; to be told again and again."""
        self._snapshot.set(current.snapshot_id)
        self._swaps.set(current.num_swaps)
        self._failed.set(current.num_failed)
