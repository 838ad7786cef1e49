"""Sweep: remove what no kept snapshot needs: expired snapshots, files of runs that died, an old encoder."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import NamedTuple

from for_ray.index import snapshots
from for_ray.index.table import sweep_versions
from for_ray.schema import Codec, Layout, Segment, Snapshot
from for_ray.storage import Lease, delete, delete_tree, exists, join_uri, list_objects


class Swept(NamedTuple):
    """What was removed: snapshots, and files of segments and codecs."""

    num_snapshots: int
    num_files: int


def sweep(layout: Layout, lease: Lease, *, keep_snapshots: int, keep_days: float) -> Swept:
    """Expire snapshots, then delete what none of the kept ones names: segments, codecs, versions of tables.

    Only runs make such files and only the holder of the lease runs, so that none of them is still wanted. A
    search opens what a snapshot names, and every kept snapshot counts here, not the last one alone. An
    encoder goes as a whole when its last snapshot expires; one that never published is left alone, since a
    run may have died while it built it. What runs hand to their workers goes too.

    Args:
        layout: The index.
        lease: Checked before each step.
        keep_snapshots: See `snapshots.choose_expired`.
        keep_days: Likewise.
    """
    published = snapshots.list_published(layout)
    now = datetime.datetime.now(datetime.UTC)
    expired = snapshots.choose_expired(published, keep_snapshots=keep_snapshots, keep_days=keep_days, now=now)
    kept_encoders = {each.fingerprint for each in published if each.snapshot_id not in expired}
    lease.check()
    # An encoder goes before its snapshots leave the list: a sweep that dies in between is done again.
    for fingerprint in {each.fingerprint for each in published} - kept_encoders:
        delete_tree(layout.encoder_uri(fingerprint))
    lease.check()
    snapshots.expire(layout, expired)
    kept = list(snapshots.list_snapshots(layout))
    num_files = 0
    for fingerprint in sorted(kept_encoders):
        own = [snapshot for snapshot in kept if snapshot.fingerprint == fingerprint]
        num_files += _sweep_files(layout.segment_uri(fingerprint, ""), own, lease)
        lease.check()
        sweep_versions(layout.images_uri(fingerprint), {snapshot.images_version for snapshot in own})
    delete_tree(join_uri(layout.index_uri, "work"))
    return Swept(len(expired), num_files)


def _sweep_files(folder_uri: str, kept: Iterable[Snapshot], lease: Lease) -> int:
    """Delete the segments and codecs in a folder that these snapshots don't name; how many."""
    names: set[str] = set()
    for snapshot in kept:
        parts: list[Segment | Codec] = [*snapshot.segments, *([snapshot.codec] if snapshot.codec else [])]
        names.update(part.file_name for part in parts)
    num_deleted = 0
    for page in list_objects(folder_uri) if exists(folder_uri) else ():
        lease.check()
        for entry in page:
            if entry.uri.rpartition("/")[2] not in names:
                delete(entry.uri)
                num_deleted += 1
    return num_deleted
