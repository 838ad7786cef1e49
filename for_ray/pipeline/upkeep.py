"""What may be done to an index besides a run: list its snapshots, go back to one, check it, see what is bad.

Only a rollback writes, and only one row: it publishes an old snapshot once more.
"""

from __future__ import annotations

import contextlib
import datetime
import re

import numpy as np
from numpy.typing import NDArray

from for_ray.config import IndexSettings
from for_ray.errors import ConfigError, DataError, ForRayError, StageError
from for_ray.index import snapshots, table
from for_ray.pipeline.chosen_encoder import open_encoder
from for_ray.pipeline.queries import recall_queries
from for_ray.schema import Codec, Layout, Segment, Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.progress import Progress
from for_ray.stages.report import print_problems, print_quarantine, print_snapshots
from for_ray.stages.run_report import sweep_reports
from for_ray.stages.sweep import is_due, sweep
from for_ray.storage import Lease, canonical_uri, list_objects, stat, temporary_folder

_BUNDLE = re.compile(r".*/encoder-(?P<fingerprint>[0-9a-f]+)/bundle/encoder\.toml")


def run_upkeep(settings: IndexSettings, *, progress: Progress) -> None:
    """Do what `settings.upkeep` names, and print what came of it.

    Raises:
        ConfigError: There is nothing to go back to.
        DataError: This is no index, nothing was published, or there is no such snapshot.
        StorageError: The store refused.
        StageError: The index is not what it should be; what is wrong was printed.
    """
    layout = Layout(canonical_uri(settings.index))
    if settings.upkeep == "list_snapshots":
        _list_snapshots(layout, settings)
    elif settings.upkeep == "show_quarantine":
        _show_quarantine(layout, settings)
    elif settings.upkeep == "verify":
        _verify(layout, settings, progress)
    elif settings.rollback is not None:
        restored = roll_back(layout, settings.rollback)
        progress.say(
            f"published snapshot {restored.snapshot_id}, which is snapshot {restored.restores} again; the "
            "next run publishes what it finds then"
        )


def sweep_idle(layout: Layout, *, keep_snapshots: int, keep_days: float, has_failed: bool) -> str:
    """Sweep after a run that published nothing: reports always, the rest only where there is something to.

    A run that failed may have left segments that nothing names; after another one it costs one look at the
    list of snapshots. Where another run holds the lease, the rest is left to that one.

    Args:
        layout: The index; it need not be there.
        keep_snapshots: See `snapshots.choose_expired`.
        keep_days: Likewise.
        has_failed: Whether the run did.

    Returns:
        What to say of it; empty where all went well.
    """
    try:
        sweep_reports(layout)
        if has_failed or is_due(layout, keep_snapshots=keep_snapshots, keep_days=keep_days):
            with Lease.acquire(layout.lease_uri, "jobs/index.py (sweep)") as lease:
                sweep(layout, lease, keep_snapshots=keep_snapshots, keep_days=keep_days)
    except ConfigError:  # another run has the lease, and sweeps
        return ""
    except ForRayError as error:
        return f"sweeping failed: {error}"
    return ""


def roll_back(layout: Layout, snapshot_id: int) -> Snapshot:
    """Publish a snapshot once more: searches that open the index from now on see it.

    The table of images is left as it is, so that nothing has to be encoded again: the next run closes the gap
    between the bucket and the index as always, and publishes that.

    Raises:
        ConfigError: It is what searches see already, or another run writes.
        DataError: There is no such snapshot, or a file of it is missing.
        StorageError: The store refused.
    """
    snapshots.by_id(layout, snapshot_id)  # refused before the lease is written
    with Lease.acquire(layout.lease_uri, f"jobs/index.py --rollback {snapshot_id}") as lease:
        wanted = snapshots.by_id(layout, snapshot_id)
        if _holds_the_same(wanted, snapshots.latest(layout)):
            raise ConfigError(f"snapshot {snapshot_id} is what searches of {layout.index_uri} see already")
        _check_files(layout, wanted)
        lease.check()
        now = datetime.datetime.now(datetime.UTC)
        restores = wanted.restores or wanted.snapshot_id
        return snapshots.publish(layout, wanted.model_copy(update={"created_at": now, "restores": restores}))


def _holds_the_same(one: Snapshot, other: Snapshot) -> bool:
    """Whether they differ in nothing but in when, and as what, they were published."""
    published = {name: getattr(other, name) for name in ("snapshot_id", "created_at", "restores")}
    return one.model_copy(update=published) == other


def _check_files(layout: Layout, snapshot: Snapshot) -> None:
    """Raise unless all that a snapshot names is there; `--verify` looks closer."""
    table.require_table(layout.images_uri(snapshot.fingerprint), version=snapshot.images_version)
    parts: list[Segment | Codec] = [*snapshot.segments, *([snapshot.codec] if snapshot.codec else [])]
    for part in parts:
        found = stat(layout.segment_uri(snapshot.fingerprint, part.file_name))
        if found.size_bytes != part.num_bytes:
            raise DataError(
                f"{found.uri} has {found.size_bytes} bytes, expected {part.num_bytes}; "
                "choose another snapshot"
            )


def _list_snapshots(layout: Layout, settings: IndexSettings) -> None:
    found = list(snapshots.list_snapshots(layout))
    if not found:
        _encoders(layout)  # refuses what is no index; in one that is, nothing may have been published yet
    print_snapshots(found, json=settings.json_)


def _verify(layout: Layout, settings: IndexSettings, progress: Progress) -> None:
    from for_ray.stages.audit import audit_index

    snapshot = snapshots.latest(layout)
    with (
        contextlib.ExitStack() as stack,
        temporary_folder() as folder,
        progress.stage("verify") as update,
    ):
        problems = audit_index(
            layout,
            snapshot,
            cluster=Cluster(stack),
            queries=_queries(layout, snapshot),
            cache_path=folder,
            on_progress=update,
            on_note=progress.say,
        )
    print_problems(problems, json=settings.json_)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise StageError(
            "verify", f"snapshot {snapshot.snapshot_id} of {layout.index_uri} has {count}: see above"
        )
    progress.say(
        f"snapshot {snapshot.snapshot_id} is sound: {snapshot.indexed:,} images indexed, "
        f"{snapshot.quarantined:,} quarantined, {snapshot.num_vectors:,} vectors in "
        f"{len(snapshot.segments)} segments"
    )


def _queries(layout: Layout, snapshot: Snapshot) -> NDArray[np.float32] | None:
    """None where the encoder that would make them is damaged: the audit will say so."""
    try:
        return recall_queries(layout, snapshot.fingerprint)
    except (ConfigError, DataError):
        return None


def _show_quarantine(layout: Layout, settings: IndexSettings) -> None:
    """Of the table as it is now: a run that was stopped by too many bad images published nothing."""
    images = table.require_table(layout.images_uri(_fingerprint(layout, settings)))
    print_quarantine(table.worst_causes(images), table.scan_quarantined(images), json=settings.json_)


def _fingerprint(layout: Layout, settings: IndexSettings) -> str:
    """Of the encoder that was asked for, or that is published, or of the only one that is there."""
    if settings.encoder is not None:
        return open_encoder(settings, own=None).fingerprint
    published = snapshots.list_published(layout)
    if published:
        return published[-1].fingerprint
    found = _encoders(layout)
    if len(found) > 1:
        raise ConfigError(
            f"{layout.index_uri} has {len(found)} encoders and no snapshot; say which: --encoder"
        )
    return found.pop()


def _encoders(layout: Layout) -> set[str]:
    """Fingerprints of those that lie in the index; at least one, or it is none."""
    found = {
        match["fingerprint"]
        for page in list_objects(layout.index_uri)
        for entry in page
        if (match := _BUNDLE.fullmatch(entry.uri))
    }
    if not found:
        raise DataError(f"{layout.index_uri} is no index; check the uri, or run jobs/index.py on it")
    return found
