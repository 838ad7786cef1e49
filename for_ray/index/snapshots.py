"""Published states of an index: one row each in `snapshots.lance`.

Publishing is one atomic append, so a search sees the whole snapshot or the one before. The lease keeps two
runs from publishing at once. Rolling back publishes an old state once more; nothing is ever rewritten.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import lance
import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from for_ray.errors import DataError
from for_ray.index.commits import commit
from for_ray.index.table import delete_rows
from for_ray.schema import Layout, Snapshot, SnapshotRecord
from for_ray.storage import exists, join_uri, lance_options, shown
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
"""`record` is a `SnapshotRecord` as JSON."""

_Kind = TypeVar("_Kind", bound=SnapshotRecord)


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
    found = find_latest(layout)
    if found is None:
        raise _nothing_published(layout)
    return found


def find_latest(layout: Layout, *, fingerprint: str | None = None) -> Snapshot | None:
    """The snapshot that was published last, of all or of one encoder; None where there is none.

    Raises:
        DataError: The record is not readable.
        StorageError: The store refused.
    """
    table = _open(layout)
    rows = _rows(table, fingerprint) if table is not None else []
    return _read(layout, table, rows[-1]) if rows else None


def by_id(layout: Layout, snapshot_id: int) -> Snapshot:
    """The snapshot with this id.

    Raises:
        DataError: There is none; the message names the ids that there are.
        StorageError: The store refused.
    """
    table = _open(layout)
    if table is None:
        raise _nothing_published(layout)
    rows = _rows(table)
    for row in rows:
        if row.snapshot_id == snapshot_id:
            return _read(layout, table, row)
    known = ", ".join(str(row.snapshot_id) for row in rows[-10:])
    raise DataError(f"{shown(layout.index_uri)} has no snapshot {snapshot_id}; the last ones are {known}")


def list_snapshots(layout: Layout, *, fingerprint: str | None = None) -> Iterator[SnapshotRecord]:
    """All snapshots, or those of one encoder, the newest first; a record is read when it is asked for.

    Their deleted image ids are not read: `by_id` has them.

    Raises:
        DataError: A record is not readable.
        StorageError: The store refused.
    """
    table = _open(layout)
    if table is not None:
        for row in reversed(_rows(table, fingerprint)):
            yield _validated(layout, row, SnapshotRecord, _record(layout, table, row, ["record"]))


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


class _Row(NamedTuple):
    """Where a snapshot stands in the table."""

    snapshot_id: int
    fingerprint: str
    row_id: int


def _rows(table: lance.LanceDataset, fingerprint: str | None = None) -> list[_Row]:
    """Of all snapshots, or those of one encoder, the oldest first."""
    with lance_refusals(table.uri):
        found = table.to_table(columns=["snapshot_id", "fingerprint"], with_row_id=True).to_pylist()
    rows = (_Row(row["snapshot_id"], row["fingerprint"], row["_rowid"]) for row in found)
    return sorted(row for row in rows if fingerprint in (None, row.fingerprint))


def _last_id(table: lance.LanceDataset | None) -> int:
    rows = _rows(table) if table is not None else []
    return rows[-1].snapshot_id if rows else 0


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


def _read(layout: Layout, table: lance.LanceDataset, row: _Row) -> Snapshot:
    return _validated(layout, row, Snapshot, _record(layout, table, row, ["record", "deleted_image_ids"]))


def _record(layout: Layout, table: lance.LanceDataset, row: _Row, columns: list[str]) -> dict[str, Any]:
    """The fields of a snapshot that these columns hold."""
    with lance_refusals(layout.snapshots_uri):
        found = table._take_rows([row.row_id], columns=columns)
    fields: dict[str, Any] = json.loads(found["record"][0].as_py())
    if "deleted_image_ids" in columns:
        fields["deleted_image_ids"] = found["deleted_image_ids"][0].values.to_numpy()
    return fields


def _validated(layout: Layout, row: _Row, kind: type[_Kind], fields: dict[str, Any]) -> _Kind:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"snapshot {row.snapshot_id} of {layout.index_uri} cannot be read ({where}: {first['msg']}); "
            "it was published by another version of for_ray, use that one"
        ) from error


def _nothing_published(layout: Layout) -> DataError:
    return DataError(
        f"{shown(layout.index_uri)} has no published snapshot; check the uri, or run jobs/index.py --index "
        f"{shown(layout.index_uri)}"
    )
