"""Published states of an index: one row each in `snapshots.lance`.

Publishing is one atomic append, so a search sees the whole snapshot or the one before. The lease keeps two
runs from publishing at once. Rolling back publishes an old state once more; nothing is ever rewritten.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import lance
import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from for_ray.errors import DataError
from for_ray.index.commits import commit
from for_ray.index.table import delete_rows
from for_ray.schema import Layout, Snapshot
from for_ray.storage import exists, join_uri, lance_options
from for_ray.storage.refusals import lance_refusals

SNAPSHOTS_SCHEMA = pa.schema(
    [
        pa.field("snapshot_id", pa.int64(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("record", pa.string(), nullable=False),
        pa.field("deleted_image_ids", pa.list_(pa.int64()), nullable=False),
    ]
)
"""`record` is the `Snapshot` as JSON, but for the deleted image ids: there may be a million of them."""


def publish(layout: Layout, snapshot: Snapshot) -> Snapshot:
    """Make a snapshot the one that searches see; only the holder of the lease may.

    Args:
        layout: The index; its `snapshots.lance` is made when it is not there.
        snapshot: What to publish. Its `snapshot_id` is given here: the last one's plus 1, 1 for the first.

    Returns:
        The snapshot as published.

    Raises:
        StorageError: The store refused.
    """
    table = _open(layout)
    snapshot = snapshot.model_copy(update={"snapshot_id": _last_id(table) + 1})
    uri, row = layout.snapshots_uri, _row(snapshot)
    mode = "create" if table is None else "append"
    with lance_refusals(uri):
        commit(
            lambda: lance.write_dataset(row, uri, mode=mode, storage_options=lance_options(uri)),
            find=lambda: _last_id(_open(layout)) == snapshot.snapshot_id or None,
        )
    return snapshot


def latest(layout: Layout) -> Snapshot:
    """The snapshot that was published last.

    Raises:
        DataError: None was published here.
        StorageError: The store refused.
    """
    table = _open(layout)
    last = _last_id(table)
    if table is None or not last:
        raise _nothing_published(layout)
    return _read(layout, table, last)


def by_id(layout: Layout, snapshot_id: int) -> Snapshot:
    """The snapshot with this id.

    Raises:
        DataError: There is none; the message names the ids that there are.
        StorageError: The store refused.
    """
    table = _open(layout)
    if table is None:
        raise _nothing_published(layout)
    return _read(layout, table, snapshot_id)


def list_snapshots(layout: Layout, *, fingerprint: str | None = None) -> Iterator[Snapshot]:
    """All snapshots, or those of one encoder, the newest first; a record is read when it is asked for.

    Raises:
        DataError: A record is not readable.
        StorageError: The store refused.
    """
    table = _open(layout)
    if table is not None:
        for snapshot_id in reversed(_ids(table, fingerprint)):
            yield _read(layout, table, snapshot_id)


class Published(NamedTuple):
    """What is known of a snapshot without reading its record."""

    snapshot_id: int
    created_at: datetime.datetime
    fingerprint: str


def list_published(layout: Layout) -> list[Published]:
    """All snapshots, the oldest first."""
    table = _open(layout)
    if table is None:
        return []
    with lance_refusals(layout.snapshots_uri):
        rows = table.to_table(columns=list(Published._fields)).to_pylist()
    return sorted(Published(**row) for row in rows)


def choose_expired(
    published: Sequence[Published], *, keep_snapshots: int, keep_days: float, now: datetime.datetime
) -> set[int]:
    """Ids of the snapshots that nobody needs any more.

    A snapshot is kept while it is one of the last `keep_snapshots`, and for `keep_days` after another took
    its place: a search that opened it while it was the latest has that long to open a newer one.

    Args:
        published: All snapshots, the oldest first.
        keep_snapshots: At least 1: the latest is never expired.
        keep_days: Days, 0 or more.
        now: With a time zone.
    """
    older = list(itertools.pairwise(published))[: max(0, len(published) - keep_snapshots)]
    oldest_kept = now - datetime.timedelta(days=keep_days)
    return {snapshot.snapshot_id for snapshot, successor in older if successor.created_at <= oldest_kept}


def expire(layout: Layout, snapshot_ids: Iterable[int]) -> None:
    """Take snapshots out of the list; only the holder of the lease may. Their files are another matter.

    Versions of the list itself go when they are a day old: a search that reads one now is done by then.
    """
    table = _open(layout)
    ids = ", ".join(map(str, sorted(snapshot_ids)))
    if table is None:
        return
    with lance_refusals(layout.snapshots_uri):
        if ids:
            delete_rows(table, f"snapshot_id in ({ids})")
        table.cleanup_old_versions(older_than=datetime.timedelta(days=1))


def _open(layout: Layout) -> lance.LanceDataset | None:
    uri = layout.snapshots_uri
    # Asked of the store itself: Lance tells a missing table from wrong credentials by words alone.
    if not exists(join_uri(uri, "_versions")):
        return None
    with lance_refusals(uri):
        return lance.dataset(uri, storage_options=lance_options(uri))


def _ids(table: lance.LanceDataset, fingerprint: str | None = None) -> list[int]:
    with lance_refusals(table.uri):
        rows = table.to_table(columns=["snapshot_id", "fingerprint"]).to_pylist()
    return sorted(row["snapshot_id"] for row in rows if fingerprint in (None, row["fingerprint"]))


def _last_id(table: lance.LanceDataset | None) -> int:
    return max(_ids(table), default=0) if table is not None else 0


def _row(snapshot: Snapshot) -> pa.Table:
    deleted = np.asarray(snapshot.deleted_image_ids, np.int64)
    return pa.table(
        {
            "snapshot_id": [snapshot.snapshot_id],
            "created_at": [snapshot.created_at],
            "fingerprint": [snapshot.fingerprint],
            "record": [snapshot.model_dump_json(exclude={"deleted_image_ids"})],
            "deleted_image_ids": pa.ListArray.from_arrays([0, len(deleted)], deleted),
        },
        schema=SNAPSHOTS_SCHEMA,
    )


def _read(layout: Layout, table: lance.LanceDataset, snapshot_id: int) -> Snapshot:
    with lance_refusals(layout.snapshots_uri):
        rows = table.to_table(
            columns=["record", "deleted_image_ids"], filter=f"snapshot_id = {int(snapshot_id)}"
        ).to_pylist()
    if not rows:
        known = ", ".join(map(str, _ids(table)[-10:]))
        raise DataError(f"{layout.index_uri} has no snapshot {snapshot_id}; the last ones are {known}")
    record = json.loads(rows[0]["record"]) | {"deleted_image_ids": rows[0]["deleted_image_ids"]}
    try:
        return Snapshot.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"snapshot {snapshot_id} of {layout.index_uri} cannot be read ({where}: {first['msg']}); "
            "it was published by another version of for_ray, use that one"
        ) from error


def _nothing_published(layout: Layout) -> DataError:
    return DataError(
        f"{layout.index_uri} has no published snapshot; check the uri, or run jobs/index.py --index "
        f"{layout.index_uri}"
    )
