"""The snapshot that questions go to, and the switch to the next one between two of them.

A question leases the snapshot that is current when it begins, and ends on it. A new one is opened and warmed
beside the old one; then they are swapped; the old one is closed when its last lease ends. What goes wrong on
the way leaves the old one in its place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from for_ray.errors import ForRayError
from for_ray.retrieval import OpenIndex

_LOG = logging.getLogger(__name__)

MOST_WAIT = 32
"""While refreshes fail, they are tried more and more rarely: after this many `refresh_seconds` at most."""


@dataclass
class _Held:
    """An opened snapshot, how many questions are in it, and whether another has taken its place."""

    index: OpenIndex
    num_leases: int = 0
    is_replaced: bool = False


class Current:
    """The open snapshot of an index; threads share it.

    Args:
        open_snapshot: Opens a snapshot, given its id (None: the latest) and the opened index whose place it
            takes (None: the first), whose encoder it may share; as `retrieval.open_index` does.
        latest_id: Which snapshot was published last; cheap, for it is asked again and again.
        refresh_seconds: How often `start` looks for a newer one.

    Raises:
        ForRayError: There is nothing to open.
    """

    def __init__(
        self,
        open_snapshot: Callable[[int | None, OpenIndex | None], OpenIndex],
        latest_id: Callable[[], int],
        *,
        refresh_seconds: float,
    ) -> None:
        self._open_snapshot = open_snapshot
        self._latest_id = latest_id
        self._refresh_seconds = refresh_seconds
        self._lock = threading.Lock()  # of what is held; never while something is opened
        self._refreshing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_failed_now = 0
        self.stale: str | None = None
        self.num_swaps = 0
        self.num_failed = 0
        self._held = _Held(self._opened(None, None))

    @property
    def snapshot_id(self) -> int:
        """Of the snapshot that the next question goes to."""
        return self._held.index.snapshot.snapshot_id

    @contextmanager
    def lease(self) -> Iterator[OpenIndex]:
        """The snapshot that is current now; it stays open until the block ends."""
        with self._lock:
            held = self._held
            held.num_leases += 1
        try:
            yield held.index
        finally:
            self._give_back(held)

    def refresh(self) -> bool:
        """Look once for a newer snapshot, and take it; whether there was one.

        A refresh that fails is logged and counted, `stale` says why, and the snapshot stays.
        """
        with self._refreshing:
            try:
                is_swapped = self._refresh()
            except Exception as error:  # noqa: BLE001 - whatever it is, the old snapshot goes on
                self.stale = _said(error)
                self.num_failed += 1
                self._num_failed_now += 1
                _LOG.warning("snapshot %d stays: %s", self.snapshot_id, self.stale)
                return False
            self.stale = None
            self._num_failed_now = 0
            return is_swapped

    def start(self) -> None:
        """Refresh from now on, in a thread."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._refresh_on, name="refresh", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, a refresh that runs first; the snapshot stays open."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """End the thread and give the snapshot back; no more leases are to be taken."""
        self.stop()
        self._replace(None)

    def _refresh_on(self) -> None:
        while not self._stopped.wait(self._refresh_seconds * min(2**self._num_failed_now, MOST_WAIT)):
            self.refresh()

    def _refresh(self) -> bool:
        latest_id = self._latest_id()
        if latest_id == self.snapshot_id:
            return False
        old_id = self.snapshot_id
        self._replace(self._opened(latest_id, self._held.index))
        self.num_swaps += 1
        _LOG.info("snapshot %d instead of %d", latest_id, old_id)
        return True

    def _replace(self, opened: OpenIndex | None) -> None:
        """Let questions go to another snapshot; the old one is closed now, or by its last lease."""
        with self._lock:
            old = self._held
            old.is_replaced = True
            if opened is not None:
                self._held = _Held(opened)
            is_free = old.num_leases == 0
        if is_free:
            old.index.close()

    def _opened(self, snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        opened = self._open_snapshot(snapshot_id, beside)
        try:
            opened.warm()
        except BaseException:
            opened.close()
            raise
        return opened

    def _give_back(self, held: _Held) -> None:
        with self._lock:
            held.num_leases -= 1
            is_last = held.is_replaced and held.num_leases == 0
        if is_last:
            held.index.close()


def _said(error: Exception) -> str:
    """In one line; what wasn't raised for people begins with its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ForRayError) else f"{type(error).__name__}: {said}".removesuffix(": ")
