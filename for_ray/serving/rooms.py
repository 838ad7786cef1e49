"""Threads for what takes long, so that the event loop never waits; the queues before them have an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from for_ray.serving.refusals import Refusal

Done = TypeVar("Done")


class Room:
    """Threads for one kind of work, and a queue before them that has an end."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._limiter = CapacityLimiter(at_once)
        self._waiting = waiting

    @property
    def num_waiting(self) -> int:
        """For a thread."""
        return self._limiter.statistics().tasks_waiting

    async def run(self, work: Callable[[], Done]) -> Done:
        """What the work gives.

        Raises:
            Refusal: Too many wait.
        """
        if self.num_waiting >= self._waiting:
            raise Refusal(503, "busy", "too many requests wait: ask again in a moment", retry_after=1)
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)
