"""What the application serves, and how much of it: all that its routes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from for_ray.retrieval import MAX_HITS
from for_ray.schema import SnapshotRecord
from for_ray.serving.current import Current
from for_ray.serving.messages import MAX_K

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        max_body_bytes: Of a request.
        requests_per_second: Of one client address on average, four seconds' worth at once; pictures count a
            tenth. 0 for as many as come.
        max_looked_at: Images that one question scores at most where few answer it; what it found by then is
            the answer, which says so.
        questions_at_once: That are answered side by side.
        questions_waiting: For their turn; the next one is refused as busy.
        uploads_at_once: Questions with a picture that are answered side by side, besides the others: each
            has a decoded picture in memory.
        uploads_waiting: For their turn, with their pictures in memory.
        pictures_at_once: Images that are read and made small side by side.
        pictures_waiting: For their turn.
        thumbnail_bytes: That are kept in memory.
    """

    max_body_bytes: int = 16 * MEGABYTE
    requests_per_second: float = 50.0
    max_looked_at: int = 100_000
    questions_at_once: int = 8
    questions_waiting: int = 64
    uploads_at_once: int = 2
    uploads_waiting: int = 16
    pictures_at_once: int = 8
    pictures_waiting: int = 1000
    thumbnail_bytes: int = 128 * MEGABYTE

    def to_json(self) -> dict[str, float]:
        """Those that clients heed."""
        return {
            "max_body_bytes": self.max_body_bytes,
            "max_k": MAX_K,
            "max_export": MAX_HITS,
            "requests_per_second": self.requests_per_second,
        }


@dataclass(frozen=True)
class Service:
    """An index as it is served.

    Attributes:
        name: Of the index, for people.
        current: Its open snapshot.
        list_snapshots: Gives those that are published, the newest first.
        limits: What a client may ask for.
        token: What a client has to know; None where everybody may ask.
        hosts: Names in `Host` that are answered, besides loopback's and addresses; `*` for any.
        examples: Questions that the page proposes.
    """

    name: str
    current: Current
    list_snapshots: Callable[[], Iterable[SnapshotRecord]]
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
