"""What a fine-tuning did: the job's JSON, and a table for a person."""

from __future__ import annotations

import sys
from typing import TextIO

from pydantic import BaseModel, ConfigDict, Field

from for_ray.schema import EpochMetrics, FinetuneRun

MEANS = {"losses", "map50", "measures", "measures_before"}
"""Fields of a summary that hold several numbers."""


class FinetuneSummary(BaseModel):
    """What a fine-tuning did; the fields that are not excluded are the job's JSON.

    Attributes:
        images: That were trained on; `labelled` of them with labels.
        held_out: Kept from training.
        missing: Of the data set, that are not there, or unreadable.
        epochs: How many.
        selected_epoch: The one that the bundle is of; what follows is of this epoch.
        losses: Mean over its steps.
        map50: `base`, `novel` and `all` on the validation images; None without any.
        held_out_map50: What the best epoch is chosen by; None without held-out images.
        measures: Recipes of towers: by name, 0 to 1, on the validation images; None without any.
        measures_before: The same before the first epoch.
        fingerprint: Of the encoder.
        bundle: Where it lies.
        seconds: Of this run of the job.
        message: One line for a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    labelled: int
    held_out: int
    missing: int
    epochs: int
    selected_epoch: int
    losses: dict[str, float]
    map50: dict[str, float | None] | None
    held_out_map50: float | None
    measures: dict[str, float] | None = None
    measures_before: dict[str, float] | None = None
    fingerprint: str
    bundle: str
    seconds: float
    message: str = Field(exclude=True)

    @classmethod
    def of(cls, run: FinetuneRun, *, bundle_uri: str, seconds: float, message: str) -> FinetuneSummary:
        """The summary of a finished run."""
        selected = run.selected_epoch or len(run.epochs)
        epoch: EpochMetrics = run.epochs[selected - 1]
        return cls(
            images=run.num_images,
            labelled=run.num_labelled,
            held_out=run.num_held_out,
            missing=run.num_missing + epoch.num_unreadable,
            epochs=len(run.epochs),
            selected_epoch=selected,
            losses=epoch.losses,
            map50=epoch.val,
            held_out_map50=epoch.held_out,
            measures=epoch.measures,
            measures_before=run.epochs[0].measures_before,
            fingerprint=str(run.fingerprint),
            bundle=bundle_uri,
            seconds=seconds,
            message=message,
        )


def print_finetuned(summary: FinetuneSummary, stream: TextIO | None = None) -> None:
    """Print a summary as a table; on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream or sys.stderr, highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in summary.model_dump(exclude=MEANS).items():
        table.add_row(name.replace("_", " "), _shown(value))
    for name, value in summary.losses.items():
        table.add_row(f"loss {name}", _shown(value))
    for group, mean in (summary.map50 or {}).items():
        table.add_row(f"val mAP@50 {group}", _shown(mean))
    for name, said in _measured(summary.measures, summary.measures_before).items():
        table.add_row(f"val {name}", said)
    console.print(table)
    console.print(summary.message)


def epoch_line(metrics: EpochMetrics, num_epochs: int) -> str:
    """An epoch in one line."""
    parts = [f"{name} {value:.3f}" for name, value in metrics.losses.items()]
    if metrics.val is not None:
        parts += [f"val {group} {_shown(mean)}" for group, mean in metrics.val.items() if group != "all"]
    measured = _measured(metrics.measures, metrics.measures_before)
    parts += [f"val {name} {said}" for name, said in measured.items()]
    if metrics.val_problem is not None:
        parts.append(f"not measured: {metrics.val_problem}")
    elif metrics.num_val_unreadable:
        unread = f"{metrics.num_val_unreadable:,} images of --val"
        parts.append(f"{unread} cannot be read, or have no finite vector")
    if metrics.held_out is not None:
        parts.append(f"held out {metrics.held_out:.3f}")
    if dropped := sum(metrics.num_dropped.values()):
        parts.append(f"{dropped:,} labels without a slot")
    measuring = f" and {metrics.seconds_measuring:.1f} s to measure" if metrics.seconds_measuring else ""
    return f"epoch {metrics.epoch} of {num_epochs}: {', '.join(parts)}; {metrics.seconds:.1f} s{measuring}"


def _measured(measures: dict[str, float] | None, before: dict[str, float] | None) -> dict[str, str]:
    """Each measure, and what it was before the first epoch, where that is known."""
    return {
        name: _shown(value) + (f" ({_shown(before[name])} before)" if before else "")
        for name, value in (measures or {}).items()
    }


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
