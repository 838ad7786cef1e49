"""Diff: what the bucket holds against what the index holds, part by part, so that memory stays flat.

An image is *new* if the table has no row of its uri, *changed* if the row has another etag, *gone* if only
the table knows it, *unchanged* otherwise. A quarantined image whose etag is the same is unchanged too, unless
it is to be tried again: then it is changed.
Metadata columns of a manifest are not compared: an image keeps what it was encoded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.storage import Spill, join_uri, shown, upload
from for_ray.storage.refusals import disk_refusals

ROWS_PER_FILE = 100_000
"""Of the gap; a file is a few MB."""

FEWEST_HELD = 20
"""Images that an index must hold for the share that is gone to say anything; fewer are soon encoded again."""

_TABLE_SCHEMA = pa.schema(
    [("uri", pa.string()), ("etag", pa.string()), ("is_quarantined", pa.bool_()), ("image_id", pa.int64())]
)


@dataclass(frozen=True)
class Gap:
    """What an index lacks and what it has too much.

    Args:
        num_unchanged: Listed images that the table holds as they are; `num_quarantined` of them are
            quarantined.
        num_duplicates: Rows of the table whose uri has another row; they go with the gone ones.
        num_bytes: Sizes of what is to encode, as far as they are known.
        file_uris: Parquet files with the listing's columns, new and changed images mixed; none if there
            is nothing to encode.
    """

    num_new: int
    num_changed: int
    num_gone: int
    num_unchanged: int
    num_quarantined: int
    num_duplicates: int
    num_bytes: int
    file_uris: list[str] = field(repr=False)
    _folder: Path = field(repr=False)

    @property
    def num_held(self) -> int:
        """Images that the table held, quarantined ones too."""
        return self.num_unchanged + self.num_changed + self.num_gone

    @property
    def num_to_encode(self) -> int:
        """New and changed images: the rows of `file_uris`."""
        return self.num_new + self.num_changed

    def changed_image_ids(self, length: int = 10_000) -> Iterator[NDArray[np.int64]]:
        """Rows of the table to delete since the image is another now, ascending; int64 [<= `length`] each."""
        return _read_ids(self._folder / "changed.ids", length)

    def gone_image_ids(self, length: int = 10_000) -> Iterator[NDArray[np.int64]]:
        """Rows of the table to delete because their image is gone, or doubled; as `changed_image_ids`."""
        return _read_ids(self._folder / "gone.ids", length)


def write_gap(
    listed: Spill,
    table_rows: Iterable[pa.RecordBatch],
    *,
    folder: Path,
    gap_uri: str,
    retry_quarantined: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Gap:
    """Compare, and write what is to encode.

    Args:
        listed: The rows of a finished listing.
        table_rows: The table, in any order: uri, etag, error (null unless quarantined) and _rowid.
        folder: For this stage alone, on this disk; the caller removes it.
        gap_uri: The folder or prefix that the workers read; made only if there is something to encode.
        retry_quarantined: Count quarantined images as changed, whatever their etag is.
        progress: Called with the number of listed images that were compared so far.

    Raises:
        DataError: A uri is listed twice.
        StorageError: The disk or the store refused.
    """
    table = _spill_table(table_rows, folder / "table")
    for smaller, larger in ((listed, table), (table, listed)):
        if smaller.num_parts < larger.num_parts:
            smaller.split()
    counts = dict.fromkeys(("new", "changed", "gone", "unchanged", "quarantined", "duplicates", "bytes"), 0)
    num_done = 0
    with _GapWriter(folder, gap_uri) as writer:
        for number in range(listed.num_parts):
            compared = _compare(listed.part(number), table.part(number), retry_quarantined=retry_quarantined)
            for name, count in compared.counts.items():
                counts[name] += count
            writer.add(compared)
            num_done += compared.num_listed
            progress(num_done)
            del compared  # before the next part is read
    named = {f"num_{name}": count for name, count in counts.items()}
    return Gap(**named, file_uris=writer.file_uris, _folder=folder)


def why_too_many_gone(
    gap: Gap, *, has_published: bool, num_listed: int, num_published: int, images_uri: str, most: float
) -> str | None:
    """What to say where more of the images that an index holds are gone than may be; None where it is well.

    An index that holds fewer than `FEWEST_HELD` images may lose all of them.

    Args:
        gap: Between the images and the table of the run's encoder.
        has_published: Whether this encoder has a snapshot. Of one that has none, no search misses what its
            table holds.
        num_listed: Images that are there.
        num_published: Images of the published snapshot where it is another encoder's, and the gap does not
            know them; else 0. At least those that are no longer listed, by their number, are gone.
        images_uri: Where the images were listed.
        most: The share that may be gone.
    """
    own = (gap.num_gone, gap.num_held if has_published else 0)
    sides = (own, (max(0, num_published - num_listed), num_published))
    shares = [(gone / held, gone, held) for gone, held in sides if held >= FEWEST_HELD]
    share, num_gone, num_held = max(shares, default=(0.0, 0, 0))
    if share <= most:
        return None
    return (
        f"{num_gone:,} of the {num_held:,} images that the index holds are gone ({share:.1%}), more than "
        f"max_gone_fraction {most:g}: {shown(images_uri)} lists {num_listed:,}, {gap.num_new:,} of them new; "
        "nothing was written: correct --images, or raise --max-gone-fraction if they are meant to leave"
    )


def _spill_table(batches: Iterable[pa.RecordBatch], folder: Path) -> Spill:
    rows = Spill(folder, _TABLE_SCHEMA)
    for batch in batches:
        columns = [
            batch["uri"].cast(pa.string()),
            batch["etag"].cast(pa.string()),
            pc.is_valid(batch["error"]),
            batch["_rowid"].cast(pa.int64()),
        ]
        rows.add(pa.record_batch(columns, schema=_TABLE_SCHEMA))
    rows.finish()
    return rows


@dataclass(frozen=True)
class _Compared:
    """One part: rows of the listing, image ids in the table, and counts."""

    num_listed: int
    rows_to_encode: pa.Table
    changed_ids: NDArray[np.int64]
    gone_ids: NDArray[np.int64]
    counts: dict[str, int]


def _compare(listed: pa.Table, table: pa.Table, *, retry_quarantined: bool) -> _Compared:
    listed, table = listed.combine_chunks(), table.combine_chunks()
    _refuse_duplicates(listed["uri"])
    # The newest row of the table with the same uri, for each listed image: a run that died before it deleted
    # the old rows of changed images need not encode these again.
    table = table.sort_by([("image_id", "descending")])
    match = pc.index_in(listed["uri"], value_set=table["uri"])
    is_known = _numpy(pc.is_valid(match))
    row = _numpy(pc.fill_null(match, 0)).astype(np.int64)[is_known]
    is_same = _numpy(
        pc.fill_null(
            pc.equal(listed["etag"].filter(pa.array(is_known)), table["etag"].take(pa.array(row))), False
        )
    )
    is_quarantined = _numpy(table["is_quarantined"])[row]
    if retry_quarantined:
        is_same = is_same & ~is_quarantined
    known = np.flatnonzero(is_known)
    to_encode = np.union1d(np.flatnonzero(~is_known), known[~is_same])
    is_matched = np.zeros(table.num_rows, bool)
    is_matched[row] = True
    is_listed = _numpy(pc.is_in(table["uri"], value_set=listed["uri"])) if table.num_rows else is_matched
    ids = _numpy(table["image_id"])
    rows_to_encode = listed.take(pa.array(to_encode))
    return _Compared(
        num_listed=listed.num_rows,
        rows_to_encode=rows_to_encode,
        changed_ids=ids[row[~is_same]],
        gone_ids=ids[~is_matched],
        counts={
            "new": int(np.count_nonzero(~is_known)),
            "changed": int(np.count_nonzero(~is_same)),
            "gone": int(np.count_nonzero(~is_listed)),
            "unchanged": int(np.count_nonzero(is_same)),
            "quarantined": int(np.count_nonzero(is_quarantined & is_same)),
            "duplicates": int(np.count_nonzero(is_listed & ~is_matched)),
            "bytes": int(pc.sum(rows_to_encode["size_bytes"]).as_py() or 0),
        },
    )


def _numpy(column: Any) -> NDArray[Any]:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _refuse_duplicates(uris: pa.ChunkedArray) -> None:
    # Each is the first of its kind. `count_distinct` takes 2.5 times the memory (pyarrow 26).
    first = _numpy(pc.index_in(uris, value_set=uris))
    if (first == np.arange(len(uris))).all():
        return
    counts = pc.value_counts(uris.combine_chunks())
    most = counts[int(np.argmax(_numpy(counts.field("counts"))))].as_py()
    raise DataError(f"{shown(most['values'])} is listed {most['counts']} times; a uri must be listed once")


def _read_ids(path: Path, length: int) -> Iterator[NDArray[np.int64]]:
    with disk_refusals("read", path), path.open("rb") as file:
        while (ids := np.fromfile(file, np.int64, length)).size:
            yield ids


def _sort_ids(path: Path) -> None:
    """Sort a file of int64 in place: a commit of neighbouring ids touches few of the table's files."""
    with disk_refusals("write", path):
        if path.stat().st_size:
            ids = np.memmap(path, np.int64, "r+")
            ids.sort()
            ids.flush()


class _GapWriter:
    """Gathers the parts' rows into files of about `ROWS_PER_FILE`, and image ids into two files of int64."""

    def __init__(self, folder: Path, gap_uri: str) -> None:
        self.file_uris: list[str] = []
        self._folder = folder
        self._gap_uri = gap_uri
        self._rows: list[pa.Table] = []
        self._num_rows = 0

    def __enter__(self) -> _GapWriter:
        with disk_refusals("write", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._changed = (self._folder / "changed.ids").open("wb")
            self._gone = (self._folder / "gone.ids").open("wb")
        return self

    def add(self, compared: _Compared) -> None:
        with disk_refusals("write", self._folder):
            compared.changed_ids.astype(np.int64).tofile(self._changed)
            compared.gone_ids.astype(np.int64).tofile(self._gone)
        self._rows.append(compared.rows_to_encode)
        self._num_rows += compared.rows_to_encode.num_rows
        while self._num_rows >= ROWS_PER_FILE:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._changed.close()
        self._gone.close()
        if kind is None:
            _sort_ids(self._folder / "changed.ids")
            _sort_ids(self._folder / "gone.ids")
        if kind is None and self._num_rows:
            self._write()

    def _write(self) -> None:
        rows = pa.concat_tables(self._rows)
        self._rows = [rows.slice(ROWS_PER_FILE)]
        self._num_rows = self._rows[0].num_rows
        uri = join_uri(self._gap_uri, f"gap-{len(self.file_uris):06}.parquet")
        path = self._folder / "gap.parquet"
        with disk_refusals("write", path):
            pq.write_table(rows.slice(0, ROWS_PER_FILE), path, row_group_size=10_000, compression="zstd")
        upload(path, uri)
        path.unlink()
        self.file_uris.append(uri)
