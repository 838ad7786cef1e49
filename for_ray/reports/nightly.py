"""The page about one run of the index job: what it found and did, what it took, and how the index grows."""

from __future__ import annotations

import datetime
from collections import defaultdict

from for_ray.reports.charts import Line, bar_chart, time_chart
from for_ray.reports.page import (
    Chart,
    Facts,
    Notice,
    Section,
    Table,
    Tone,
    render_page,
    scale_bytes,
    shown_bytes,
    shown_seconds,
)
from for_ray.schema import Cause, GrowthPoint, RunReport, WorkTime
from for_ray.storage import shown

MOST_CAUSES = 50
"""Rows of the table of causes; the report's JSON has them all."""

BETWEEN = "between stages"

_REMEDIES = {
    "start": "A Ray cluster that is up already saves it.",
    "list": "A manifest, or an S3 Inventory of the bucket, is read faster than a bucket is listed.",
    "diff": "It runs on the driver: a faster disk and CPU there help.",
    "build": "Segments are built side by side: more CPUs in the cluster help.",
    "merge": "Segments are merged side by side: more CPUs in the cluster help.",
    "verify": "Recall is measured side by side: more CPUs in the cluster help.",
}

_TONES: dict[str, Tone] = {"published": "good", "failed": "bad"}


def render_nightly(report: RunReport) -> str:
    """The page, as HTML.

    Args:
        report: Of a run that ended in whichever way; what it never came to know is not shown as 0.
    """
    sections: list[Section] = [
        Notice("", shown(report.message) or "The run left no word.", tone=_TONES.get(report.outcome, "")),
        _changes(report),
        _index(report),
        Notice("What bound the run", bound_by(report)),
        *_stages(report),
        *_work(report),
        _quarantine(report),
        *_growth(report.growth),
        Facts("The run", _settings(report)),
    ]
    when = report.started_at.astimezone(datetime.UTC)
    subtitle = f"{shown(report.index_uri)} · {when:%Y-%m-%d %H:%M} UTC · {shown_seconds(report.seconds)}"
    return render_page(_title(report), subtitle=subtitle, sections=sections)


def bound_by(report: RunReport) -> str:
    """What kept the run from being over sooner, and what helps; some sentences of plain text.

    That is the stage that took longest. Of the encode stage it is what its actors lacked: where they were not
    ready for half of it, their start; where they waited for more than half of their time, images to encode
    or, if that is the slower one, workers that write; else speed of their own.
    """
    seconds: dict[str, float] = defaultdict(float)
    for stage in report.stages:
        seconds[stage.name] += stage.seconds
    seconds[BETWEEN] = _seconds_between(report)
    name = max(seconds, key=lambda each: seconds[each])
    if not report.stages or seconds[name] <= 0:
        return "Not known: no stage was timed."
    took = f"{shown_seconds(seconds[name])} of {shown_seconds(max(report.seconds, seconds[name]))}"
    took += f" ({seconds[name] / max(report.seconds, seconds[name]):.0%})"
    if name == BETWEEN:
        return f"No stage: {took} went by between them."
    why = _encode_bound(report.work, seconds[name]) if name == "encode" else _REMEDIES.get(name, "")
    return f"The stage {name}, with {took}. {why}".strip()


def _encode_bound(work: WorkTime | None, seconds: float) -> str:
    if work is None or work.wait_seconds + work.encode_seconds <= 0:
        return "What its workers did is not known."
    present = work.wait_seconds + work.encode_seconds
    if present < work.num_actors * seconds / 2:
        return (
            f"In it, the start of the actors: of up to {work.num_actors:,}, {present / seconds:.1f} were "
            "ready on average. Nodes that are up already help, and more actors from the start (--min-actors)."
        )
    waited = f"the actors waited for {work.wait_seconds / present:.0%} of their time"
    if work.wait_seconds > present / 2:
        if work.write_seconds > work.read_seconds:
            return f"In it, writing: {waited}, and writing took longer than reading. More CPU nodes help."
        return f"In it, reading: {waited}. More CPU nodes help, or more threads (--read-threads)."
    more = "More GPUs help" if work.has_gpus else "GPUs help, or more CPU nodes"
    return f"In it, encoding: {waited}. {more}, as far as --max-actors lets them."


def _seconds_between(report: RunReport) -> float:
    return max(0.0, report.seconds - sum(stage.seconds for stage in report.stages))


def _title(report: RunReport) -> str:
    if report.outcome == "failed":
        return "The run failed"
    if report.outcome == "unchanged":
        return "Nothing changed"
    return f"Published snapshot {report.snapshot_id}"


def _changes(report: RunReport) -> Section:
    """The bucket against the index; a run that failed early knows nothing of it, or only the first count."""
    title, has_ended = "Images of the bucket", report.outcome != "failed"
    is_compared = has_ended or report.new + report.changed + report.gone + report.unchanged > 0
    if not is_compared:
        listed = f"; it had listed {report.listed:,}" if report.listed else ""
        return Notice(title, f"Not known: the run failed before it had compared them{listed}.", is_half=True)
    names = ("listed", "new", "changed", "gone", "unchanged", "skipped")
    note = "Skipped are those that were gone, not as listed, or denied when they were to be read."
    return Facts(title, [(name, getattr(report, name)) for name in names], note=note, is_half=True)


def _index(report: RunReport) -> Section:
    title = "What searches see"
    if report.snapshot_id is None:
        return Notice(title, "Nothing: no snapshot was ever published.", is_half=True)
    stored = report.num_vectors + report.dead_vectors
    dead = f"{report.dead_vectors:,}" + (f" ({report.dead_vectors / stored:.1%})" if stored else "")
    values: list[tuple[str, object]] = [
        ("snapshot", report.snapshot_id),
        ("images indexed", report.indexed),
        ("images quarantined", report.quarantined),
        ("vectors", report.num_vectors),
        ("dead vectors, of gone images", dead),
        ("segments", report.num_segments),
        ("size of the segments", shown_bytes(report.segment_bytes)),
        ("a vector takes", shown_bytes(report.segment_bytes / stored) if stored else None),
        ("codec", report.codec),
        ("lists searched (nprobe)", report.nprobe),
        ("recall at 50", report.recall_at_50),
    ]
    return Facts(title, values, note="Recall is against exact search.", is_half=True)


def _stages(report: RunReport) -> list[Section]:
    if not report.stages:
        return []
    rows: list[list[object]] = []
    names, seconds = [], []
    between = _seconds_between(report)
    rest = [(BETWEEN, between, 0, "")] if between > 0.01 * report.seconds else []
    for name, took, done, unit in [(s.name, s.seconds, s.done, s.unit) for s in report.stages] + rest:
        share = round(100 * took / report.seconds, 1) if report.seconds > 0 else None
        counted = (done, unit, done / took if took > 0 else None) if done else (None, "", None)
        rows.append([name, round(took, 3), share, *counted])
        names.append(name)
        seconds.append(round(took, 3))
    header = ["stage", "seconds", "% of the run", "done", "", "a second"]
    return [
        Table("Stages", header, rows),
        Chart("Seconds by stage", bar_chart(names, seconds, value_label="seconds")),
    ]


def _work(report: RunReport) -> list[Section]:
    work = report.work
    if work is None:
        return []
    present = work.wait_seconds + work.encode_seconds
    waited = f" ({work.wait_seconds / present:.0%} of the actors' time)" if present > 0 else ""
    values: list[tuple[str, object]] = [
        ("images a second", report.images_per_second or None),
        ("actors, at most", f"{work.num_actors:,}, {'a GPU each' if work.has_gpus else 'without GPUs'}"),
        ("actors encoded", shown_seconds(work.encode_seconds)),
        ("actors waited", shown_seconds(work.wait_seconds) + waited),
        ("images were fetched and decoded", shown_seconds(work.read_seconds)),
        ("rows were written", shown_seconds(work.write_seconds)),
    ]
    return [Facts("Inside the encode stage", values, note="Times are summed over all workers.")]


def _quarantine(report: RunReport) -> Section:
    causes, total = report.causes, sum(cause.count for cause in report.causes)
    if not causes:
        known = report.outcome != "failed" or report.snapshot_id is not None
        return Notice("Quarantine", "No image is quarantined." if known else "Not known.")
    note = "--show-quarantine prints them all; --retry-quarantined tries them again."
    if rest := causes[MOST_CAUSES:]:
        note = f"{len(rest):,} more causes hold for {sum(cause.count for cause in rest):,} images. {note}"
    if total != report.quarantined:
        note = f"Of the table as it is now; the snapshot has {report.quarantined:,} of them. {note}"
    rows = [_cause(cause, total) for cause in causes[:MOST_CAUSES]]
    title = f"Quarantine: {total:,} image{'s' if total != 1 else ''} that could not be read"
    return Table(title, ["cause", "images", "%", "such as"], rows, note=note)


def _cause(cause: Cause, total: int) -> list[object]:
    share = round(100 * cause.count / total, 1) if total else None
    return [(shown(cause.cause),), cause.count, share, tuple(map(shown, cause.examples))]


def _growth(points: tuple[GrowthPoint, ...]) -> list[Section]:
    if len(points) < 2:
        return [Notice("Growth", "It shows from the second snapshot on.")]
    times = [point.created_at.timestamp() for point in points]
    unit, size = scale_bytes(max(point.num_bytes for point in points))
    drawn: list[tuple[str, str, list[float]]] = [
        ("images indexed", "images", [point.indexed for point in points]),
        ("images quarantined", "images", [point.quarantined for point in points]),
        ("vectors", "vectors", [point.num_vectors for point in points]),
        ("size of the segments", unit, [point.num_bytes / size for point in points]),
    ]
    note = f"The last {len(points)} snapshots; days are UTC."
    return [
        Chart(f"Growth: {name}", time_chart([Line(name, times, values)], y_label=label), note, is_half=True)
        for name, label, values in drawn
    ]


def _settings(report: RunReport) -> list[tuple[str, object]]:
    return [
        ("run", report.run_id),
        ("images", shown(report.images_uri)),
        ("index", shown(report.index_uri)),
        ("encoder", f"{shown(report.encoder)} ({report.fingerprint})"),
    ]
