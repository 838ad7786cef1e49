"""Shards: the segments of a snapshot, shared out among Ray actors and searched as one index.

Each actor maps its segments into memory and answers with its best hits; the caller merges them. Plain actors:
a question costs a message to each and one back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from for_ray.errors import ConfigError, ForRayError, StageError
from for_ray.index.probe import Hits, checked_queries, merge_hits, no_hits
from for_ray.index.search import SegmentSet, open_segments
from for_ray.index.selection import Remembered
from for_ray.schema import Layout, Segment

QUESTIONS_AT_ONCE = 8
"""Of one actor. FAISS's search leaves Python's lock alone, so that they run side by side."""

FILTERS_KEPT = 4
"""Filters whose selectors an actor keeps, of 32 bytes an image, the last used ones: a question gives the same
in each round, and every question the gone images."""

TASK_RETRIES = 3

START_SECONDS = 1800.0
"""For actors to start, and for each to fetch its segments: 90 GB at 100 MB/s take a quarter of an hour."""

ROOM_SECONDS = 45.0
"""For actors to be given a node that is there; then it is said which are not."""

LOOK_SECONDS = 5.0
"""For them to say so when there is no time left."""

Ids = NDArray[np.int64]

_LOG = logging.getLogger(__name__)


def assign_segments(segments: Sequence[Segment], num_shards: int) -> list[list[Segment]]:
    """Segments of each shard: neighbours by image id, of about equally many bytes; none is left empty.

    Args:
        segments: Any order.
        num_shards: At least 1; as many as there are segments at most are made.

    Raises:
        ValueError: `num_shards` is below 1.
    """
    if num_shards < 1:
        raise ValueError(f"expected at least one shard, got {num_shards}")
    ordered = sorted(segments, key=lambda segment: segment.first_image_id)
    num_shards = min(num_shards, len(ordered))
    shards: list[list[Segment]] = []
    bytes_left = sum(segment.num_bytes for segment in ordered)
    for number in range(num_shards, 0, -1):
        most, size = len(ordered) - number + 1, 0  # each shard behind this one gets a segment
        taken = 0
        while taken < most and (
            not taken or number == 1 or size + ordered[taken].num_bytes / 2 <= bytes_left / number
        ):
            size += ordered[taken].num_bytes
            taken += 1
        shards.append(ordered[:taken])
        ordered, bytes_left = ordered[taken:], bytes_left - size
    return shards


class ShardSet:
    """Shards that are searched as one index: what `SegmentSet` is in one process. Threads may share it.

    An actor that dies is started again, and what it was asked is asked once more. More of them than this
    machine has room for are refused at once where it is all there is. Another cluster may start nodes when
    asked: there it is logged, soon, what is waited for.

    Args:
        layout: The index.
        fingerprint: Of the encoder that made the segments.
        segments: All of a snapshot; may be none, then nothing is found.
        nprobe: Lists that a search looks at in each segment.
        num_shards: Actors, as many as there are segments at most.
        threads: FAISS's threads of each for several queries at once.
        num_cpus: That an actor reserves of its node; as many as threads where None. A service that opens a
            snapshot beside the one that it serves takes a fraction, or both would need a CPU each.
        cache_path: For segments of a bucket, on the actors' disks; the usual cache where None.

    Raises:
        ConfigError: The cluster has no room for so many.
        DataError: A file is not what its checksum says.
        StageError: An actor died before it had opened its segments, and again whenever it was started.
        StorageError: The store refused.
        ValueError: `num_shards` is below 1.
    """

    def __init__(
        self,
        layout: Layout,
        fingerprint: str,
        segments: Sequence[Segment],
        *,
        nprobe: int,
        num_shards: int,
        threads: int = 1,
        num_cpus: float | None = None,
        cache_path: Path | None = None,
    ) -> None:
        shards = assign_segments(segments, num_shards) if segments else []
        self._num_cpus = threads if num_cpus is None else num_cpus
        _check_room(len(shards), self._num_cpus)
        actor = ray.remote(_Shard).options(
            num_cpus=self._num_cpus,
            scheduling_strategy="SPREAD",  # each node's memory holds a part, also where CPUs would do on one
            max_concurrency=QUESTIONS_AT_ONCE,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
        )
        self._actors = [
            actor.remote(layout, fingerprint, shard, nprobe, threads, cache_path) for shard in shards
        ]
        self._spans = [
            (min(each.first_image_id for each in shard), max(each.end_image_id for each in shard))
            for shard in shards
        ]
        self._filters = Remembered(self._share)
        self.nprobe = max(nprobe, 1)
        facts = self._open()
        self.dim = max((each.dim for each in facts), default=0)
        self.nlist = max((each.nlist for each in facts), default=0)
        self.num_vectors = sum(each.num_vectors for each in facts)

    def search(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        exclude_image_ids: Ids | None = None,
        only_image_ids: Ids | None = None,
        nprobe: int | None = None,
    ) -> Hits:
        """As `SegmentSet.search`: the k best vectors of each query, of images that may be found.

        Raises:
            StageError: An actor is gone for good.
        """
        nprobe = self.nprobe if nprobe is None else nprobe
        queries = checked_queries(queries, k, dim=self.dim, nprobe=nprobe)
        filters = self._filters(only_image_ids, exclude_image_ids)
        asked = [
            actor.search.remote(queries, k, nprobe, each)
            for actor, each in zip(self._actors, filters, strict=True)
            if not each.is_empty
        ]
        if not asked or not len(queries):
            return no_hits(len(queries))
        with self._losses():
            return merge_hits(ray.get(asked), k)

    def _open(self) -> list[_Facts]:
        end = time.monotonic() + START_SECONDS
        asked = [actor.describe.remote() for actor in self._actors]
        try:
            with self._losses():
                if num_waiting := self._count_waiting(ROOM_SECONDS):
                    _LOG.warning("%s: add nodes, unless the cluster starts them", self._lack(num_waiting))
                return list(ray.get(asked, timeout=max(0.0, end - time.monotonic())))
        except GetTimeoutError:
            num_waiting = self._count_waiting(LOOK_SECONDS)
            why = self._lack(num_waiting) if num_waiting else "each needs time to fetch its segments"
            self.close()
            raise ConfigError(
                f"{len(asked)} shards did not open within {START_SECONDS:g} s; {why}: ask for fewer, or add "
                "nodes"
            ) from None
        except ForRayError:
            self.close()
            raise

    def _count_waiting(self, seconds: float) -> int:
        """Actors that no node has room for after this time."""
        asked = [actor.is_up.remote() for actor in self._actors]
        return len(ray.wait(asked, num_returns=len(asked), timeout=seconds)[1]) if asked else 0

    def _lack(self, num_waiting: int) -> str:
        cpus, free = (each.get("CPU", 0.0) for each in (ray.cluster_resources(), ray.available_resources()))
        return (
            f"{num_waiting} of {len(self._actors)} shards have no place: each reserves {self._num_cpus:g} "
            f"CPUs of a node, the cluster has {cpus:g}, of which {free:g} are free"
        )

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Raise what an actor raised as it was, and in one line that one is gone, or what it was given."""
        try:
            yield
        except GetTimeoutError:
            raise
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, RayError):
                raise cause from None
            raise StageError(
                "search",
                f"a shard of {len(self._actors)} is gone ({type(cause).__name__}), and asking again up to "
                f"{TASK_RETRIES} times did not help; is the cluster up, and has each node memory left? Open "
                "the index again",
            ) from error

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _share(self, only: Ids | None, excluded: Ids | None) -> list[_Filter]:
        """What each shard has to know of a filter: the ids that it may hold, once in Ray's object store."""
        filters = []
        for span in self._spans:
            parts = [None if ids is None else _within(ids, span) for ids in (only, excluded)]
            is_empty = parts[0] is not None and not len(parts[0])
            shared = [None if part is None else ray.put(part) for part in parts]
            filters.append(_Filter(shared[0], shared[1], is_empty))
        return filters


def _check_room(num_shards: int, num_cpus: float) -> None:
    """A cluster that this process started does not grow: what does not fit would be waited for in vain."""
    cpus = ray.cluster_resources().get("CPU", 0.0)
    node = ray._private.worker._global_node
    if node is not None and node.head and num_shards * num_cpus > cpus:
        raise ConfigError(
            f"{num_shards} shards reserve {num_shards * num_cpus:g} CPUs, this machine has {cpus:g}: ask for "
            "fewer, or name a cluster in RAY_ADDRESS"
        )


class _Facts(NamedTuple):
    dim: int
    nlist: int
    num_vectors: int


class _Filter(NamedTuple):
    """References to ids in Ray's object store: those that alone may be found, and those that may not."""

    only: Any
    excluded: Any
    is_empty: bool = False


def _within(ids: Ids, span: tuple[int, int]) -> Ids:
    start, stop = np.searchsorted(ids, span)
    return np.asarray(ids, np.int64)[start:stop]


class _Shard:
    """The segments of one shard; an actor."""

    def __init__(
        self,
        layout: Layout,
        fingerprint: str,
        segments: Sequence[Segment],
        nprobe: int,
        threads: int,
        cache_path: Path | None,
    ) -> None:
        self._open = partial(
            open_segments,
            layout,
            fingerprint,
            segments,
            nprobe=nprobe,
            threads=threads,
            cache_path=cache_path,
        )
        self._lock = threading.Lock()
        self._opened: SegmentSet | None = None
        self._filters: OrderedDict[_Filter, tuple[Ids | None, Ids | None]] = OrderedDict()

    @property
    def _segments(self) -> SegmentSet:
        """Opened when first asked: what is wrong with a file is an answer then, and not an actor's death."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def is_up(self) -> bool:
        return True

    def describe(self) -> _Facts:
        return _Facts(self._segments.dim, self._segments.nlist, self._segments.num_vectors)

    def search(self, queries: NDArray[np.float32], k: int, nprobe: int, given: _Filter) -> Hits:
        only, excluded = self._ids(given)
        return self._segments.search(
            queries, k, nprobe=nprobe, only_image_ids=only, exclude_image_ids=excluded
        )

    def _ids(self, given: _Filter) -> tuple[Ids | None, Ids | None]:
        """The very same arrays each time, so that the segments' selectors of them are made once."""
        ids = self._filters.get(given)
        if ids is None:
            only, excluded = (None if ref is None else ray.get(ref) for ref in (given.only, given.excluded))
            ids = only, excluded
        with self._lock:
            ids = self._filters.setdefault(given, ids)
            self._filters.move_to_end(given)
            while len(self._filters) > FILTERS_KEPT:
                self._filters.popitem(last=False)
        return ids
