"""The snapshot that questions go to, and the switch to the next one between two of them.

A question leases the snapshot that is current when it begins, and ends on it. A new one is opened and warmed
beside the old one; then they are swapped. For a grace time, or until a next one begins to open, the old one
stays open for those who go on with an answer of it; then it is closed, or when its last lease ends. What goes
wrong on the way leaves the current one in its place.

Several services of one index (replicas) switch at different moments. One that is asked for a snapshot, or for
an image, that only another one can have told of looks for a newer snapshot first.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from for_ray.errors import ForRayError
from for_ray.retrieval import OpenIndex

_LOG = logging.getLogger(__name__)

MOST_WAIT_SECONDS = 300.0
"""While refreshes fail, they are tried more and more rarely, but so often at least."""

MOST_DOUBLINGS = 16
"""Of `refresh_seconds`, while refreshes fail."""

STOP_SECONDS = 2.0
"""For which a refresh that runs is waited for at the end: to open a snapshot may take minutes."""

LOOK_SECONDS = 10.0
"""For which a question waits while a snapshot that it needs is opened for another one."""

MISS_SECONDS, MOST_MISS_SECONDS = 1.0, 3.0
"""Between two looks for a newer snapshot because an image or a snapshot is not there; and for which a picture
waits for another's look: ids that nobody has told of must not hold up all others."""

MOST_WAITERS = 2
"""Threads that wait for a snapshot that another one opens; who comes then goes on without it."""


class SnapshotClosedError(ForRayError):
    """The snapshot that is asked for is not open.

    Args:
        wanted: Its id.
        current: The id of the one that is.
        is_coming: Whether it may be open soon.
    """

    def __init__(self, wanted: int, current: int, is_coming: bool) -> None:
        super().__init__(wanted, current, is_coming)
        self.wanted, self.current, self.is_coming = wanted, current, is_coming

    def __str__(self) -> str:
        return f"snapshot {self.wanted} is asked for, and snapshot {self.current} is served now"


@dataclass
class _Held:
    """An opened snapshot, how many questions are in it, and whether no more will come."""

    index: OpenIndex
    num_leases: int = 0
    is_over: bool = False
    grace: threading.Timer | None = None

    @property
    def snapshot_id(self) -> int:
        return self.index.snapshot.snapshot_id


class Current:
    """The open snapshot of an index, and for a while the one before; threads share it.

    Args:
        open_snapshot: Opens a snapshot, given its id (None: the latest) and the opened index whose place it
            takes (None: the first), whose encoder it may share; as `retrieval.open_index` does.
        latest_id: Which snapshot was published last; cheap, for it is asked again and again.
        refresh_seconds: How often `start` looks for a newer one.
        grace_seconds: For which the snapshot before stays open after a switch, or until a next one begins to
            open: there are never more than two, but for leases.

    Raises:
        ForRayError: There is nothing to open.
    """

    def __init__(
        self,
        open_snapshot: Callable[[int | None, OpenIndex | None], OpenIndex],
        latest_id: Callable[[], int],
        *,
        refresh_seconds: float,
        grace_seconds: float = 0.0,
    ) -> None:
        self._open_snapshot = open_snapshot
        self._latest_id = latest_id
        self._refresh_seconds, self._grace_seconds = refresh_seconds, grace_seconds
        self._lock = threading.Lock()  # of what is held; never while something is opened
        self._refreshing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_begun = self._num_failed_now = 0
        self._missed_at = self._unknown_at = -math.inf
        self._waiters = threading.Semaphore(MOST_WAITERS)
        self._failing_since: float | None = None
        self.stale: str | None = None
        self.num_swaps = 0
        self.num_failed = 0
        self._before: _Held | None = None
        self._held = _Held(self._opened(None, None))

    @property
    def snapshot_id(self) -> int:
        """Of the snapshot that the next question goes to."""
        return self._held.snapshot_id

    @property
    def seconds_stale(self) -> float:
        """Since refreshes began to fail; 0 where the last one did not."""
        since = self._failing_since
        return time.monotonic() - since if since is not None else 0.0

    @contextmanager
    def lease(self, snapshot_id: int | None = None) -> Iterator[OpenIndex]:
        """The snapshot that is current now, or the one that is asked for; it stays open until the block ends.

        A newer one than the current is looked for.

        Raises:
            SnapshotClosedError: It is not open: it was replaced too long ago, or never published.
        """
        held = self._taken(snapshot_id)
        try:
            yield held.index
        finally:
            self._give_back(held)

    @contextmanager
    def lease_with(self, image_id: int) -> Iterator[OpenIndex]:
        """As `lease`: the current snapshot, or where it lacks the image the one before, or a newer one.

        The current one where none has it.
        """
        held = self._taken_with(image_id)
        try:
            yield held.index
        finally:
            self._give_back(held)

    def refresh(self) -> bool:
        """Look once for a newer snapshot, and take it; whether there was one.

        A refresh that fails is logged and counted, `stale` says why, and the snapshot stays.
        """
        with self._refreshing:
            return self._refreshed()

    def start(self) -> None:
        """Refresh from now on, in a thread."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._refresh_on, name="refresh", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is open stays open, and what is being opened is closed once it is."""
        with self._lock:
            self._stopped.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
            self._thread = None

    def close(self) -> None:
        """End the thread and give the snapshots back; no more leases are to be taken."""
        self.stop()
        self._end_grace()
        self._end(self._held)

    def _refresh_on(self) -> None:
        while not self._stopped.wait(self._wait_seconds()):
            self.refresh()

    def _wait_seconds(self) -> float:
        """Until the thread's next refresh."""
        if not self._num_failed_now:
            return self._refresh_seconds
        factor = 2.0 ** min(self._num_failed_now, MOST_DOUBLINGS)
        return min(self._refresh_seconds * factor, MOST_WAIT_SECONDS)

    def _look(self, seconds: float) -> bool:
        """Refresh for a question, unless a refresh that began after this call does so; whether that was done.

        One that runs is waited for so long, by `MOST_WAITERS`. While refreshes fail, the store is left to the
        thread.
        """
        begun = self._num_begun
        if self._num_failed_now or not (self._refreshing.acquire(blocking=False) or self._waited(seconds)):
            return False
        try:
            if self._num_begun == begun:
                self._refreshed()
        finally:
            self._refreshing.release()
        return not self._num_failed_now

    def _waited(self, seconds: float) -> bool:
        """Whether it is this thread's turn to refresh; at once False where enough wait for theirs."""
        if not self._waiters.acquire(blocking=False):
            return False
        try:
            return self._refreshing.acquire(timeout=seconds)
        finally:
            self._waiters.release()

    def _may_look(self) -> bool:
        """Whether a missing image is worth a look: with every one, guessed ids would keep the store busy."""
        now = time.monotonic()
        if now - self._missed_at < MISS_SECONDS and not self._refreshing.locked():
            return False
        self._missed_at = now
        return True

    def _refreshed(self) -> bool:
        self._num_begun += 1
        try:
            is_swapped = self._refresh()
        except Exception as error:  # noqa: BLE001 - whatever it is, the old snapshot goes on
            self.stale = _said(error)
            self.num_failed += 1
            if not self._num_failed_now:
                self._failing_since = time.monotonic()
            self._num_failed_now += 1
            _LOG.warning("snapshot %d stays: %s", self.snapshot_id, self.stale)
            return False
        self.stale = None
        self._num_failed_now = 0
        self._failing_since = None
        return is_swapped

    def _refresh(self) -> bool:
        latest_id, old = self._latest_id(), self._held
        if latest_id == old.snapshot_id:
            return False
        self._end_grace()
        opened = _Held(self._opened(latest_id, old.index))
        with self._lock:
            is_stopped = self._stopped.is_set()
            if not is_stopped:
                self._held, self._before = opened, old
        if is_stopped:
            opened.index.close()
            return False
        self.num_swaps += 1
        _LOG.info("snapshot %d instead of %d", latest_id, old.snapshot_id)
        if self._grace_seconds > 0:
            old.grace = threading.Timer(self._grace_seconds, self._end_grace, [old])
            old.grace.daemon = True
            old.grace.start()
        else:
            self._end_grace()
        return True

    def _end_grace(self, which: _Held | None = None) -> None:
        """Let no more questions go to the snapshot before: to `which`, where that is the one before still."""
        with self._lock:
            before = self._before
            if before is None or (which is not None and which is not before):
                return
            self._before = None
        if before.grace is not None:
            before.grace.cancel()
        self._end(before)

    def _end(self, held: _Held) -> None:
        """Close a snapshot that no more questions go to, now or by its last lease."""
        with self._lock:
            held.is_over = True
            is_free = held.num_leases == 0
        if is_free:
            held.index.close()

    def _opened(self, snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        opened = self._open_snapshot(snapshot_id, beside)
        try:
            opened.warm()
        except BaseException:
            opened.close()
            raise
        return opened

    def _taken(self, snapshot_id: int | None) -> _Held:
        is_known = True
        if snapshot_id is not None and snapshot_id > self.snapshot_id and not self._is_just_missed():
            now = time.monotonic()
            is_known = self._look(LOOK_SECONDS)
            if is_known and snapshot_id > self.snapshot_id:
                self._unknown_at = now
        with self._lock:
            for held in (self._held, self._before):
                if held is not None and snapshot_id in (None, held.snapshot_id):
                    held.num_leases += 1
                    return held
            current = self._held.snapshot_id
        raise SnapshotClosedError(snapshot_id or 0, current, not is_known)

    def _is_just_missed(self) -> bool:
        """Whether a look has just missed a snapshot that was asked for: nothing newer is there, then."""
        return time.monotonic() - self._unknown_at < MISS_SECONDS and not self._refreshing.locked()

    def _taken_with(self, image_id: int) -> _Held:
        held = self._taken_where(image_id)
        if held is None and self._may_look():
            self._look(MOST_MISS_SECONDS)
            held = self._taken_where(image_id)
        return held or self._taken(None)

    def _taken_where(self, image_id: int) -> _Held | None:
        """The current snapshot, or the one before, where it has the image; None where neither has."""
        with self._lock:
            taken = [held for held in (self._held, self._before) if held is not None]
            for held in taken:
                held.num_leases += 1
        found = None
        try:
            found = next((held for held in taken if held.index.image(image_id) is not None), None)
        finally:
            for held in taken:
                if held is not found:
                    self._give_back(held)
        return found

    def _give_back(self, held: _Held) -> None:
        with self._lock:
            held.num_leases -= 1
            is_last = held.is_over and held.num_leases == 0
        if is_last:
            held.index.close()


def _said(error: Exception) -> str:
    """In one line; what wasn't raised for people begins with its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ForRayError) else f"{type(error).__name__}: {said}".removesuffix(": ")
