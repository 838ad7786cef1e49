"""The report of a run of the index job: gathered while it runs, put together at its end."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from for_ray.errors import ForRayError
from for_ray.index import snapshots, table
from for_ray.schema import Layout, RunReport, Snapshot, WorkTime
from for_ray.stages.diff import Gap
from for_ray.stages.listing import Listing
from for_ray.stages.run_report import earlier_growth, growth_points, write_report

if TYPE_CHECKING:
    from for_ray.stages.progress import Progress


@dataclass
class Findings:
    """What a run has found so far; what it has not come to yet is None or 0.

    Attributes:
        images: The table of encoded images.
        snapshot: What searches see.
        has_published: Whether the run published it.
        num_skipped: Images that were gone, replaced or denied when they were to be read.
        images_per_second: Of the encode stage.
    """

    started_at: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    started: float = field(default_factory=time.monotonic)
    listing: Listing | None = None
    gap: Gap | None = None
    images: Any = None
    snapshot: Snapshot | None = None
    has_published: bool = False
    work: WorkTime | None = None
    num_skipped: int = 0
    images_per_second: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.started


def report_run(
    found: Findings, layout: Layout, progress: Progress, *, outcome: str, message: str, **about: Any
) -> str:
    """Write the report of a run that has ended; a run is not lost by a report that can't be written.

    Args:
        found: By the run.
        layout: The index.
        progress: Has the times of the stages.
        outcome: `published`, `unchanged` or `failed`.
        message: What the run said at its end.
        about: The fields of `RunReport` that say which run it was.

    Returns:
        What to tell a person: where the report lies, or why it does not.
    """
    try:
        return f"report: {write_report(layout, _report(found, layout, progress, outcome, message, about))}"
    except ForRayError as error:
        return f"the report was not written: {error}"


def _report(
    found: Findings, layout: Layout, progress: Progress, outcome: str, message: str, about: dict[str, Any]
) -> RunReport:
    counts: dict[str, Any] = {}
    if found.listing is not None:
        counts["listed"] = found.listing.num_listed
    if found.gap is not None:
        counts |= {
            name: getattr(found.gap, f"num_{name}") for name in ("new", "changed", "gone", "unchanged")
        }
    if found.snapshot is not None:
        counts |= _of_snapshot(found.snapshot)
    return RunReport(
        started_at=found.started_at,
        seconds=round(found.seconds, 3),
        outcome=outcome,
        message=message,
        skipped=found.num_skipped,
        images_per_second=round(found.images_per_second, 1),
        stages=tuple(progress.times),
        work=found.work,
        causes=tuple(table.worst_causes(found.images)) if found.images is not None else (),
        growth=growth_points(snapshots.list_snapshots(layout), earlier=earlier_growth(layout)),
        **counts,
        **about,
    )


def _of_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "snapshot_id": snapshot.snapshot_id,
        "indexed": snapshot.indexed,
        "quarantined": snapshot.quarantined,
        "num_vectors": snapshot.num_vectors,
        "dead_vectors": sum(segment.num_dead for segment in snapshot.segments),
        "num_segments": len(snapshot.segments),
        "segment_bytes": sum(segment.num_bytes for segment in snapshot.segments),
        "codec": snapshot.codec.factory if snapshot.codec else None,
        "nprobe": snapshot.nprobe,
        "recall_at_50": snapshot.recall_at_50,
    }
