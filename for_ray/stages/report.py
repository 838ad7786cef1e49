"""What a run found and did, and what an index holds: JSON for machines, tables for people."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from json import dumps
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, Field

from for_ray.index.capacity import Capacity
from for_ray.reports.page import shown_bytes
from for_ray.schema import Cause, Snapshot, SnapshotRecord
from for_ray.stages.plan_report import print_plans
from for_ray.storage import shown

MOST_COLUMNS = 10_000
"""Of a table on stdout: a file or a pipe has no width, and a terminal breaks its own lines."""


class IndexSummary(BaseModel):
    """What a run found and did; the fields that are not excluded are the job's JSON.

    Attributes:
        ignored: Objects that are no images by their names.
        indexed: Of the snapshot that searches now see; likewise quarantined, vectors and segments.
        snapshot: Its number; None where nothing was ever published.
        recall_at_50: Against exact search; None where there is nothing to find.
        images_per_second: Of the encode stage; 0 when nothing was encoded.
        message: One line for a person.
        plans: Of a dry run: what the index would take, by the columns' names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listed: int
    new: int
    changed: int
    gone: int
    unchanged: int
    ignored: int
    indexed: int
    quarantined: int
    vectors: int
    segments: int
    snapshot: int | None
    recall_at_50: float | None
    seconds: float
    images_per_second: float
    message: str = Field(exclude=True)
    plans: dict[str, Capacity] = Field(default_factory=dict, exclude=True)

    @classmethod
    def of(cls, snapshot: Snapshot | None, **found: Any) -> IndexSummary:
        """The summary of a run that leaves this snapshot to searches."""
        return cls(
            indexed=snapshot.indexed if snapshot else 0,
            quarantined=snapshot.quarantined if snapshot else 0,
            vectors=snapshot.num_vectors if snapshot else 0,
            segments=len(snapshot.segments) if snapshot else 0,
            snapshot=snapshot.snapshot_id if snapshot else None,
            recall_at_50=snapshot.recall_at_50 if snapshot else None,
            **found,
        )


class LabelSummary(BaseModel):
    """What a run that labels images found and did; the fields that are not excluded are the job's JSON.

    Attributes:
        images: That the data set names.
        missing: Of these, not to be found in the store.
        labelled: Rows of the table without an error; `quarantined` are those with one.
        labels: Of all images together.
        without_labels: Images whose labels are none.
        names: Of the vocabulary, without those that were dropped.
        precision: Of the labels that mean a base, or a novel, category of the data set.
        recall: Likewise.
        images_per_second: Of the label stage; 0 when nothing was labelled.
        message: One line for a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    missing: int
    new: int
    changed: int
    gone: int
    unchanged: int
    labelled: int
    quarantined: int
    labels: int
    without_labels: int
    names: int
    dropped_names: int
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    seconds: float
    images_per_second: float
    message: str = Field(exclude=True)


def print_summary(summary: IndexSummary | LabelSummary, stream: TextIO | None = None) -> None:
    """Print a summary as a table, and the plans of a dry run beside each other; on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream or sys.stderr, highlight=False, markup=False, emoji=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    fields = summary.model_dump()
    if "snapshot" in fields:
        fields["snapshot"] = fields.pop("snapshot")  # to the end
    for name, value in fields.items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, number in parts.items():
            table.add_row(f"{name.replace('_', ' ')} {part}".strip(), _shown(number))
    console.print(table)
    if isinstance(summary, IndexSummary) and summary.plans:
        print_plans(summary.plans, stream or sys.stderr)
    console.print(summary.message)


def print_snapshots(snapshots: Sequence[SnapshotRecord], *, json: bool, stream: TextIO | None = None) -> None:
    """Print the snapshots of an index in their order, and which of them searches see.

    Args:
        snapshots: All of them.
        json: Nothing but JSON, a snapshot a line; the one with the highest number is what searches see.
        stream: Where to; stdout if None.
    """
    stream = stream or sys.stdout
    current = max((snapshot.snapshot_id for snapshot in snapshots), default=0)
    if json:
        _print_lines((dumps(_snapshot_record(each)) for each in snapshots), stream)
        return
    if not snapshots:
        print("no snapshot was published yet", file=stream)
        return
    names = ["snapshot", "published", "encoder", "indexed", "quarantined"]
    names += ["vectors", "segments", "size", "recall", ""]
    texts = ("published", "encoder", "")
    rows = [
        [
            str(each.snapshot_id),
            f"{each.created_at.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%SZ}",
            each.fingerprint[:12],
            *(
                f"{count:,}"
                for count in (each.indexed, each.quarantined, each.num_vectors, len(each.segments))
            ),
            shown_bytes(sum(segment.num_bytes for segment in each.segments)),
            _shown(each.recall_at_50),
            _mark(each, current),
        ]
        for each in snapshots
    ]
    _print_table(names, rows, texts=texts, stream=stream)


def _mark(snapshot: SnapshotRecord, current: int) -> str:
    marks = ["current"] if snapshot.snapshot_id == current else []
    if snapshot.restores is not None:
        marks.append(f"repeats {snapshot.restores}")
    return ", ".join(marks)


def _snapshot_record(snapshot: SnapshotRecord) -> dict[str, object]:
    return {
        "snapshot": snapshot.snapshot_id,
        "created_at": snapshot.created_at.isoformat(),
        "fingerprint": snapshot.fingerprint,
        "listed": snapshot.listed,
        "indexed": snapshot.indexed,
        "quarantined": snapshot.quarantined,
        "vectors": snapshot.num_vectors,
        "segments": len(snapshot.segments),
        "bytes": sum(segment.num_bytes for segment in snapshot.segments),
        "recall_at_50": snapshot.recall_at_50,
        "restores": snapshot.restores,
    }


def print_quarantine(
    causes: Sequence[Cause],
    rows: Iterable[tuple[str, str]],
    *,
    json: bool,
    limit: int | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print how many images each cause holds for, then every image with its reason; row by row as they come.

    Args:
        causes: All of them, the commonest first.
        rows: Uri and reason.
        json: Nothing but JSON: `uri` and `error` of an image a line.
        limit: Images at most; None for all.
        stream: Where to; stdout if None.
    """
    stream, rows = stream or sys.stdout, iter(rows)
    chosen = islice(rows, limit)
    if json:
        _print_lines((dumps({"uri": uri, "error": error}) for uri, error in chosen), stream)
        return
    total = sum(cause.count for cause in causes)
    if not total:
        print("no image is quarantined", file=stream)
        return
    counted = [[f"{cause.count:,}", shown(cause.cause)] for cause in causes]
    _print_table(["images", "cause"], counted, texts=("cause",), stream=stream)
    print(file=stream)
    _print_lines((f"{shown(uri)} → {shown(error)}" for uri, error in chosen), stream)
    if next(rows, None) is not None:
        print(f"… of {total:,} images, {limit:,} are shown", file=stream)


def print_problems(problems: Iterable[str], *, json: bool = False, stream: TextIO | None = None) -> None:
    """Print what is wrong with an index, one problem a line; as JSON, `problem` of an object a line."""
    lines = (dumps({"problem": problem}) if json else shown(problem) for problem in problems)
    _print_lines(lines, stream or sys.stdout)


def _print_lines(lines: Iterable[str], stream: TextIO) -> None:
    try:
        for line in lines:
            print(line, file=stream)
        stream.flush()
    except BrokenPipeError:  # `head` has seen enough; what is buffered has to go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[str], stream: TextIO
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=stream, width=MOST_COLUMNS, highlight=False, markup=False, emoji=False)
    console.print(table)


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)
