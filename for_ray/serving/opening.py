"""From an index's address to the service of it; in this process, or in a replica that this is sent to."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from for_ray import storage
from for_ray.index import snapshots
from for_ray.retrieval import OpenIndex, check_index, open_index
from for_ray.schema import Layout
from for_ray.serving.current import Current
from for_ray.serving.service import Limits, Service

SHARD_CPUS = 0.25
"""That each shard reserves: a new snapshot's shards open beside the old one's, and both mostly wait."""


@dataclass(frozen=True)
class Served:
    """What is served, and how; it can be pickled.

    Attributes:
        index_uri: A folder or `s3://bucket/prefix`.
        encoder: That every snapshot must have been made with; None for any.
        refresh_seconds: How often to look for another snapshot.
        grace_seconds: For which the snapshot before stays open after a switch, for the pages of its answers.
        device: Where questions are encoded: `auto`, `cpu`, `cuda`.
        cache_path: Where segments of a bucket are kept; the user's cache folder where None.
        num_shards: Ray actors that the segments are shared out among; this process alone where None.
        limits: What a client may ask for.
        token: What a client has to know; None where everybody may ask.
        hosts: Names in `Host` that are answered, besides loopback's and addresses.
        examples: Questions that the page proposes.
    """

    index_uri: str
    encoder: str | None = None
    refresh_seconds: float = 10.0
    grace_seconds: float = 300.0
    device: str = "cpu"
    cache_path: Path | None = None
    num_shards: int | None = None
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def check(self) -> None:
        """Whether there is something to open; nothing is.

        Raises:
            ConfigError: The index is of another encoder.
            DataError: Nothing is published there.
            StorageError: The store refused.
        """
        check_index(self.index_uri, encoder=self.encoder)

    def open(self) -> Service:
        """Open and warm the latest snapshot; `Service.current` is not refreshed before it is started.

        Raises:
            ConfigError: The index is of another encoder, or there is no room for the shards.
            DataError: Nothing is published there, or a file is missing or damaged.
            StorageError: The store refused.
        """
        layout = Layout(storage.canonical_uri(self.index_uri))
        current = Current(
            self._open_snapshot,
            partial(_latest_id, layout),
            refresh_seconds=self.refresh_seconds,
            grace_seconds=self.grace_seconds,
        )
        return Service(
            layout.index_uri.rstrip("/").rpartition("/")[2],
            current,
            partial(snapshots.list_snapshots, layout),
            limits=self.limits,
            token=self.token,
            hosts=self.hosts,
            examples=self.examples,
        )

    def _open_snapshot(self, snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        return open_index(
            self.index_uri,
            snapshot_id=snapshot_id,
            encoder=self.encoder,
            device=self.device,
            cache_path=self.cache_path,
            num_shards=self.num_shards,
            shard_cpus=SHARD_CPUS,
            beside=beside,
        )


def _latest_id(layout: Layout) -> int:
    published = snapshots.list_published(layout)
    # Where nothing is published any more, the latest raises what is to be said.
    return published[-1].snapshot_id if published else snapshots.latest(layout).snapshot_id
