"""Reports of runs in an index: written at the end of each run, swept when there are too many."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from pydantic import ValidationError

from for_ray.errors import DataError
from for_ray.reports.nightly import render_nightly
from for_ray.schema import GrowthPoint, Layout, RunReport, SnapshotRecord
from for_ray.storage import canonical_uri, delete, exists, list_objects, read_bytes, write_bytes

MOST_POINTS = 60

_NAME = re.compile(r"(?P<name>\d{8}T\d{6}Z-[0-9A-Za-z]+)\.(?:json|html)")


def growth_points(
    snapshots: Iterable[SnapshotRecord], *, earlier: Iterable[GrowthPoint] = (), limit: int = MOST_POINTS
) -> tuple[GrowthPoint, ...]:
    """How an index grew, the oldest first.

    Args:
        snapshots: The newest first; no more than `limit` are asked for.
        earlier: Points that an earlier report knew: an index keeps its snapshots for days, and grows for
            years. Those of snapshots that are not older than the given ones are passed over.
        limit: How many points at most, the newest ones.
    """
    points = [_point(snapshot) for snapshot in islice(snapshots, limit)][::-1]
    if points:
        earlier = (point for point in earlier if point.snapshot_id < points[0].snapshot_id)
    return (*sorted(earlier, key=lambda point: point.snapshot_id), *points)[-limit:]


def _point(snapshot: SnapshotRecord) -> GrowthPoint:
    return GrowthPoint(
        snapshot_id=snapshot.snapshot_id,
        created_at=snapshot.created_at,
        indexed=snapshot.indexed,
        quarantined=snapshot.quarantined,
        num_vectors=snapshot.num_vectors,
        num_segments=len(snapshot.segments),
        num_bytes=sum(segment.num_bytes for segment in snapshot.segments),
    )


def earlier_growth(layout: Layout) -> tuple[GrowthPoint, ...]:
    """The growth that the latest report knew; empty where there is none, or none that can be read.

    Raises:
        StorageError: The store refused.
    """
    uris = sorted(uri for _, uri in _reports(layout) if uri.endswith(".json"))
    if not uris:
        return ()
    try:
        return RunReport.model_validate_json(read_bytes(uris[-1])).growth
    except (DataError, ValidationError):  # of another version, or swept just now: the plot gets shorter
        return ()


def write_report(layout: Layout, report: RunReport) -> str:
    """Write a run's report into its index: a page for people, then the JSON.

    The JSON comes last: whoever waits for it, or finds it, finds the page too.

    Returns:
        The uri of the page.

    Raises:
        StorageError: The store refused; the run itself is not touched by it.
    """
    started_at = report.started_at.astimezone(datetime.UTC)
    uri = layout.report_uri(f"{started_at:%Y%m%dT%H%M%SZ}-{report.run_id}")
    # A folder whose name is no UTF-8 is known by surrogates, which neither file can hold as they are.
    write_bytes(f"{uri}.html", render_nightly(report).encode("utf-8", "backslashreplace"))
    write_bytes(f"{uri}.json", f"{json.dumps(report.model_dump(mode='json'), indent=2)}\n".encode())
    return f"{uri}.html"


def sweep_reports(layout: Layout, *, keep: int = 400) -> int:
    """Delete the oldest reports; what is not named like a report stays.

    Args:
        layout: The index; it need not have any.
        keep: How many reports stay.

    Returns:
        How many were deleted.

    Raises:
        StorageError: The store refused.
    """
    found = list(_reports(layout))
    names = sorted({name for name, _ in found})
    expired = set(names[: max(0, len(names) - keep)])
    for name, uri in sorted(found):
        if name in expired:
            delete(uri)
    return len(expired)


def _reports(layout: Layout) -> Iterator[tuple[str, str]]:
    """Name and uri of each file of a report."""
    folder = canonical_uri(layout.report_uri(""))
    if not exists(folder):
        return
    for page in list_objects(folder):
        for entry in page:
            found = _NAME.fullmatch(entry.uri.removeprefix(f"{folder}/"))
            if found:
                yield found["name"], entry.uri
