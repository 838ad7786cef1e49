"""What a run found and did: the job's JSON, and a table for a person."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, Field

from for_ray.index.plan import IndexPlan, plan_index
from for_ray.schema import Snapshot

ONE_BILLION = 1_000_000_000


class IndexSummary(BaseModel):
    """What a run found and did; the fields that are not excluded are the job's JSON.

    Attributes:
        indexed: Of the snapshot that searches now see; likewise quarantined, vectors and segments.
        snapshot: Its number; None where nothing was ever published.
        recall_at_50: Against exact search; None where there is nothing to find.
        images_per_second: Of the encode stage; 0 when nothing was encoded.
        message: One line for a person.
        plan: Of a dry run: the layout of the index for its vectors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listed: int
    new: int
    changed: int
    gone: int
    unchanged: int
    indexed: int
    quarantined: int
    vectors: int
    segments: int
    snapshot: int | None
    recall_at_50: float | None
    seconds: float
    images_per_second: float
    message: str = Field(exclude=True)
    plan: IndexPlan | None = Field(None, exclude=True)

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
    """Print a summary as a table, and the plan of a dry run beside that for a billion vectors; on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream or sys.stderr, highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    fields = summary.model_dump()
    if "snapshot" in fields:
        fields["snapshot"] = fields.pop("snapshot")  # to the end
    for name, value in fields.items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, number in parts.items():
            table.add_row(f"{name.replace('_', ' ')} {part}".strip(), _shown(number))
    console.print(table)
    if isinstance(summary, IndexSummary) and summary.plan is not None:
        _print_plans(console, summary.plan)
    console.print(summary.message)


def _print_plans(console: Any, plan: IndexPlan) -> None:
    from rich.table import Table

    table = Table("plan", "now", "10⁹ vectors", box=None, padding=(0, 2, 0, 0))
    large = plan_index(ONE_BILLION, plan.dim)
    for name in IndexPlan.model_fields:
        table.add_row(name.replace("_", " "), _shown(getattr(plan, name)), _shown(getattr(large, name)))
    console.print(table)


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)
