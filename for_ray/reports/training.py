"""The page about a fine-tuning: how the losses fell, what each epoch measured, and with which settings."""

from __future__ import annotations

from collections.abc import Sequence

from for_ray.reports.charts import Line, line_chart
from for_ray.reports.page import Chart, Facts, Section, Table, render_page
from for_ray.schema import EpochMetrics, FinetuneRun

LOSS_NAMES = {
    "sup": "labels",
    "pse": "pseudo-labels",
    "classes": "classes (ArcMargin)",
    "captions": "pseudo-captions (MCArcMargin)",
    "pairs": "image-caption pairs (InfoNCE)",
}
"""The ranking loss's pseudo-labels are soft: how likely the teacher holds an image to show a name."""

GROUPS = ("base", "novel", "all")


def render_training(run: FinetuneRun, *, title: str) -> str:
    """The page of a finished run, as HTML.

    Args:
        run: With all its epochs.
        title: What was trained.
    """
    epochs = run.epochs
    rates = line_chart(
        [_line(run, "learning rate", [each.lr for each in epochs])], x_label="epoch", is_log=True
    )
    measured = [_tasks(run)] if _tunes_towers(run) else [_validation(run), _held_out(run)]
    sections: list[Section] = [
        Facts("What was trained on", _counts(run)),
        _losses(epochs),
        *measured,
        Chart("Learning rate", rates),
        _table(run),
        Facts("Settings", list(run.settings.items())),
    ]
    subtitle = f"encoder {run.fingerprint}, of epoch {run.selected_epoch} of {len(epochs)}"
    return render_page(title, subtitle=subtitle, sections=sections)


def _tunes_towers(run: FinetuneRun) -> bool:
    return run.settings.get("recipe", "for") != "for"


def _counts(run: FinetuneRun) -> list[tuple[str, object]]:
    last = run.epochs[-1]
    counts: list[tuple[str, object]] = [
        ("images", run.num_images),
        ("of these with labels", run.num_labelled),
        ("kept from training", run.num_held_out),
        ("missing or unreadable", run.num_missing + last.num_unreadable),
    ]
    if _task_names(run):
        counts.append(("validation images left out: unreadable, or no vector", last.num_val_unreadable))
    is_set = run.settings.get("objective", "set") == "set"  # the ranking loss gives labels no slots
    for name, dropped in last.num_dropped.items() if is_set else ():
        known = LOSS_NAMES.get(name, name)
        counts.append((f"{known} with a slot, an epoch", last.num_matched[name]))
        counts.append((f"{known} dropped: more than the image has slots", dropped))
    return counts


def _losses(epochs: Sequence[EpochMetrics]) -> Chart:
    steps_of_epoch = max(1, epochs[0].curve[-1].step) if epochs[0].curve else 1
    points = [point for each in epochs for point in each.curve]
    lines = [
        Line(
            LOSS_NAMES.get(name, name),
            [point.step / steps_of_epoch for point in points],
            [point.losses[name] for point in points],
        )
        for name in epochs[0].losses
    ]
    return Chart("Losses", line_chart(lines, x_label="epoch", y_label="loss, nats"))


def _validation(run: FinetuneRun) -> Chart:
    if all(each.val is None for each in run.epochs):
        return Chart("Validation", line_chart([], x_label="epoch"), note="No --val was given.")
    lines = [_line(run, group, [(each.val or {}).get(group) for each in run.epochs]) for group in GROUPS]
    chart = line_chart(lines, x_label="epoch", y_label="mAP@50", marked_x=run.selected_epoch)
    return Chart("Validation: mAP@50", chart, note="Never used to choose the epoch.")


def _task_names(run: FinetuneRun) -> list[str]:
    """What towers are measured by; none without --val."""
    return list(run.epochs[0].measures_before or run.epochs[0].measures or {})


def _tasks(run: FinetuneRun) -> Chart:
    """What towers do, from how they were before the first epoch."""
    names = _task_names(run)
    if not names:
        return Chart("Validation", line_chart([], x_label="epoch"), note="No --val was given.")
    found = [(0, run.epochs[0].measures_before), *((each.epoch, each.measures) for each in run.epochs)]
    known = [(epoch, measures) for epoch, measures in found if measures is not None]
    places = [epoch for epoch, _ in known]
    lines = [Line(name, places, [measures[name] for _, measures in known]) for name in names]
    notes = ["Epoch 0 is the encoder that it began with. The encoder that came out is of the last epoch."]
    problems = [(each.epoch, each.val_problem) for each in run.epochs if each.val_problem is not None]
    notes += [f"Epoch {epoch} was not measured: {problem}." for epoch, problem in problems]
    return Chart("Validation", line_chart(lines, x_label="epoch"), note=" ".join(notes))


def _held_out(run: FinetuneRun) -> Chart:
    if all(each.held_out is None for each in run.epochs):
        return Chart("Held out", line_chart([], x_label="epoch"), note="No images were kept from training.")
    lines = [
        _line(run, "base, by labels", [each.held_out_base for each in run.epochs]),
        _line(run, "all names, by pseudo-labels", [each.held_out_pseudo for each in run.epochs]),
        _line(run, "mean", [each.held_out for each in run.epochs], is_dashed=True),
    ]
    chart = line_chart(lines, x_label="epoch", y_label="mAP@50", marked_x=run.selected_epoch)
    return Chart("Held-out training images: mAP@50", chart, note="The mark is the epoch of the encoder.")


def _line(
    run: FinetuneRun,
    name: str,
    values: Sequence[float | None],
    *,
    is_dashed: bool = False,
) -> Line:
    heights = [float("nan") if value is None else value for value in values]
    return Line(name, [each.epoch for each in run.epochs], heights, is_dashed=is_dashed)


def _table(run: FinetuneRun) -> Table:
    epochs = run.epochs
    names = list(epochs[0].losses)
    measured = _measured_of_towers(run) if _tunes_towers(run) else _measured_of_heads(run)
    header = ["epoch", *(f"loss, {LOSS_NAMES.get(name, name)}" for name in names)]
    header += [*measured, "seconds", "seconds to measure"]
    rows: list[list[object]] = [
        [
            each.epoch,
            *(each.losses[name] for name in names),
            *(values[place] for values in measured.values()),
            *(each.seconds, each.seconds_measuring),
        ]
        for place, each in enumerate(epochs)
    ]
    if (before := epochs[0].measures_before) is not None:
        rows.insert(0, [0, *([None] * len(names)), *before.values(), None, None])
    return Table("Epochs", header, rows)


def _measured_of_heads(run: FinetuneRun) -> dict[str, list[float | None]]:
    """The columns of the table, by name, a value an epoch."""
    found = {f"val {group}": [(each.val or {}).get(group) for each in run.epochs] for group in GROUPS}
    return found | {"held out": [each.held_out for each in run.epochs]}


def _measured_of_towers(run: FinetuneRun) -> dict[str, list[float | None]]:
    """The columns of the table, by name, a value an epoch."""
    return {name: [(each.measures or {}).get(name) for each in run.epochs] for name in _task_names(run)}
