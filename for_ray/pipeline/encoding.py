"""Encoding a gap to its end, also where an image kills the process that decodes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from for_ray.errors import StageError
from for_ray.index import table
from for_ray.schema import WorkTime
from for_ray.stages.diff import Gap, write_gap
from for_ray.storage import Lease, Spill, join_uri

# Ray takes seconds to import: a run that finds nothing to do is done before.
if TYPE_CHECKING:
    from for_ray.stages.blocks import TableJob
    from for_ray.stages.encode import Encoded, Pool


def encode_gap(
    images: Any,
    gap: Gap,
    *,
    work_uri: str,
    folder: Path,
    job: TableJob,
    pool: Pool,
    commit_seconds: float,
    most_bad: float,
    lease: Lease,
    on_progress: Callable[[int], None],
) -> Encoded:
    """Encode a gap; where processes of tasks die, go on with what is left, each image decoded apart.

    Args:
        images: The table, at its latest version; nobody else writes to it.
        gap: Its files are on this disk.
        work_uri: Where the workers find the same files; what is left is written below it.
        folder: On this disk, for this function alone.
        job: As for `encode`, like all that follows.
        pool: See `encode`.
        commit_seconds: See `encode`.
        most_bad: See `encode`.
        lease: See `encode`.
        on_progress: See `encode`.

    Raises:
        StageError: Processes die also where images are decoded apart: images are not the cause.
    """
    from for_ray.stages.encode import encode

    first = encode(
        images,
        work_uri,
        job=job,
        pool=pool,
        num_images=gap.num_to_encode,
        commit_seconds=commit_seconds,
        most_bad=most_bad,
        lease=lease,
        on_progress=on_progress,
    )
    if first.crash is None:
        return first
    rest = _rest_of(gap, images, first.table, folder=folder, rest_uri=join_uri(work_uri, "rest"))
    # Images that were gone or replaced are in no table: they are met, and counted, again.
    done = first.counts._replace(gone=0, changed=0)
    if not rest.num_to_encode:
        return first._replace(counts=done, crash=None)
    second = encode(
        first.table,
        join_uri(work_uri, "rest"),
        job=job,
        pool=pool,
        num_images=rest.num_to_encode,
        commit_seconds=commit_seconds,
        most_bad=most_bad - done.quarantined,
        lease=lease,
        on_progress=lambda count: on_progress(done.stored + count),
        is_apart=True,
    )
    if second.crash is not None:
        raise StageError(
            "encode",
            f"processes of tasks die again and again, though no image is to blame: {second.crash}; "
            "has each node memory for them? Run again to go on: what was committed stays",
        )
    return second._replace(counts=done.plus(second.counts), work=_sum(first.work, second.work))


def _rest_of(gap: Gap, before: Any, after: Any, *, folder: Path, rest_uri: str) -> Gap:
    """The gap between what was to be encoded and the rows that came into the table since `before`."""
    wanted = Spill(folder / "wanted", pq.read_schema(gap.file_uris[0]))
    for uri in gap.file_uris:
        with pq.ParquetFile(uri) as file:
            for batch in file.iter_batches():
                wanted.add(batch)
    wanted.finish()
    known = (batch["_rowid"] for batch in table.scan_state(before) if batch.num_rows)
    last = max((pc.max(row_ids).as_py() for row_ids in known), default=-1)
    added = (_newer(batch, last) for batch in table.scan_state(after))
    return write_gap(wanted, added, folder=folder / "rest", gap_uri=rest_uri)


def _newer(rows: pa.RecordBatch, last: int) -> pa.RecordBatch:
    return rows.filter(pc.greater(rows["_rowid"], last))


def _sum(one: WorkTime, other: WorkTime) -> WorkTime:
    names = ("read_seconds", "wait_seconds", "encode_seconds", "write_seconds")
    return other.model_copy(update={name: getattr(one, name) + getattr(other, name) for name in names})
