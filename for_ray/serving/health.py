"""Whether the service does what it is for: `/healthz`, for load balancers and for people."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.responses import JSONResponse

from for_ray.serving.current import Current

PROBE_SECONDS = 10.0
"""Between two questions that are asked to see whether the index answers; in between, the last one counts."""

WAIT_SECONDS = 2.0
"""For which a probe is waited for: who asks for the health wants to know soon."""

MOST_PROBE_SECONDS = 60.0
"""After which a probe that is not answered is a bad sign."""

STALE_SECONDS = 900.0
"""For which refreshes may fail: the snapshot that is open is worth more than none, for a while."""


class Health:
    """Asks the index now and then, in a thread of its own; for one event loop.

    Args:
        current: Whose snapshot is asked.
        clock: Seconds.
    """

    def __init__(self, current: Current, clock: Callable[[], float] = time.monotonic) -> None:
        self._current, self._clock = current, clock
        self._probe: Future[str | None] | None = None
        self._begun_at = -PROBE_SECONDS
        self._found: str | None = None

    async def response(self, *, is_known: bool) -> JSONResponse:
        """200, or 503 and why.

        Args:
            is_known: Whether who asks knows the token; others are not told reasons, which name places.
        """
        current = self._current
        reason, stale = await self._reason(), current.stale
        if not is_known:
            reason = None if reason is None else "the service is not well: its log says why"
            stale = None if stale is None else "the last refresh failed: the log says why"
        with current.lease() as index:
            snapshot = index.snapshot
        age = datetime.datetime.now(datetime.UTC) - snapshot.created_at
        body: dict[str, Any] = {
            "status": "ok" if reason is None else "unwell",
            "snapshot_id": snapshot.snapshot_id,
            "age_seconds": max(0, round(age.total_seconds())),
            "stale": stale,
        }
        if reason is None:
            return JSONResponse(body)
        return JSONResponse({**body, "error": reason, "code": "unwell", "position": None}, 503)

    async def _reason(self) -> str | None:
        await self._look()
        if self._probe is not None and self._clock() - self._begun_at > MOST_PROBE_SECONDS:
            return (
                f"the index has not answered for {MOST_PROBE_SECONDS:g} s: look at its store and its shards"
            )
        if self._found is not None:
            return f"the index cannot be read: {self._found}"
        seconds = self._current.seconds_stale
        if seconds > STALE_SECONDS:
            return f"no newer snapshot could be looked for in {seconds:.0f} s: {self._current.stale}"
        return None

    async def _look(self) -> None:
        """Take up a probe that is done; begin one where the last is old."""
        now = self._clock()
        if self._probe is None and now - self._begun_at >= PROBE_SECONDS:
            self._begun_at = now
            self._probe = self._begun()
        probe = self._probe
        if probe is None:
            return
        await asyncio.wait({asyncio.wrap_future(probe)}, timeout=WAIT_SECONDS)
        if probe.done() and self._probe is probe:
            self._probe, self._found = None, probe.result()

    def _begun(self) -> Future[str | None]:
        probe: Future[str | None] = Future()
        probe.set_running_or_notify_cancel()  # so that nobody who stops waiting cancels it for the others
        threading.Thread(target=lambda: probe.set_result(self._ask()), name="health", daemon=True).start()
        return probe

    def _ask(self) -> str | None:
        """Why the index does not answer; None where it does."""
        try:
            with self._current.lease() as index:
                index.warm()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what health is asked for
            return " ".join(str(error).split()) or type(error).__name__
        return None
