"""Sweep: remove what no kept snapshot needs: expired snapshots, files of runs that died, an old encoder."""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Container, Sequence
from typing import NamedTuple

from for_ray.index import snapshots
from for_ray.index.drafts import find_draft
from for_ray.index.table import sweep_versions
from for_ray.schema import Codec, Layout, Segment
from for_ray.storage import (
    Lease,
    canonical_uri,
    delete,
    delete_tree,
    exists,
    join_uri,
    list_objects,
    write_bytes,
)

_FINGERPRINT = re.compile("[0-9a-f]+")


class Swept(NamedTuple):
    """What was removed: snapshots, and files of segments and codecs."""

    num_snapshots: int
    num_files: int


def sweep(layout: Layout, lease: Lease, *, keep_snapshots: int, keep_days: float) -> Swept:
    """Expire snapshots, then delete what none of the kept ones names: segments, codecs, versions of tables.

    Only runs make such files and only the holder of the lease runs, so that none of them is still wanted, but
    for what the draft of a run that failed names: the next run goes on from it. A search opens what a
    snapshot names, and every kept snapshot counts here, not the last one alone. An encoder goes as a whole
    when its last snapshot expires; one that never published is left alone, since a run may have died while it
    built it. What runs hand to their workers goes too.

    Args:
        layout: The index.
        lease: Checked before each step.
        keep_snapshots: See `snapshots.choose_expired`.
        keep_days: Likewise.
    """
    published = snapshots.list_published(layout)
    expired = _choose_expired(published, keep_snapshots=keep_snapshots, keep_days=keep_days)
    kept_encoders = {each.fingerprint for each in published if each.snapshot_id not in expired}
    lease.check()
    # Marked, out of the list, deleted: an encoder that may lie there by half is never one to go on from.
    for fingerprint in {each.fingerprint for each in published} - kept_encoders:
        write_bytes(layout.removal_uri(fingerprint), b"")
    lease.check()
    snapshots.expire(layout, expired)
    finish_removals(layout, lease)
    num_files = 0
    for fingerprint, needed in sorted(_needed(layout).items()):
        num_files += _sweep_files(layout.segment_uri(fingerprint, ""), needed.file_names, lease)
        lease.check()
        sweep_versions(layout.images_uri(fingerprint), needed.versions)
    lease.check()
    delete_tree(join_uri(layout.index_uri, "work"))
    return Swept(len(expired), num_files)


def is_due(layout: Layout, *, keep_snapshots: int, keep_days: float) -> bool:
    """Whether snapshots have expired, or a sweep died while it removed an encoder; needs no lease."""
    published = snapshots.list_published(layout)
    expired = _choose_expired(published, keep_snapshots=keep_snapshots, keep_days=keep_days)
    return bool(expired) or bool(_marked(layout))


def is_removed(layout: Layout, fingerprint: str) -> bool:
    """Whether a sweep has begun to delete this encoder's files: what is left of them is of no use."""
    return exists(layout.removal_uri(fingerprint)) and fingerprint not in _published_encoders(layout)


def finish_removals(layout: Layout, lease: Lease) -> None:
    """Delete what is left of the encoders that a sweep has marked; a run does so before it goes on from one.

    Of an encoder that has snapshots only the mark goes: a sweep died before it took them out of the list, and
    whole it is still there.
    """
    marked = _marked(layout)
    published = _published_encoders(layout) if marked else set()
    for fingerprint in marked:
        lease.check()
        if fingerprint not in published:
            delete_tree(layout.encoder_uri(fingerprint))
        lease.check()
        delete(layout.removal_uri(fingerprint))


def _marked(layout: Layout) -> list[str]:
    """Fingerprints of encoders that are being removed."""
    folder = canonical_uri(layout.removal_uri(""))
    pages = list_objects(folder) if exists(folder) else iter(())
    names = (entry.uri.removeprefix(f"{folder}/") for page in pages for entry in page)
    return sorted(name for name in names if _FINGERPRINT.fullmatch(name))


def _published_encoders(layout: Layout) -> set[str]:
    return {each.fingerprint for each in snapshots.list_published(layout)}


def _choose_expired(
    published: Sequence[snapshots.Published], *, keep_snapshots: int, keep_days: float
) -> set[int]:
    now = datetime.datetime.now(datetime.UTC)
    return snapshots.choose_expired(published, keep_snapshots=keep_snapshots, keep_days=keep_days, now=now)


class _Needed(NamedTuple):
    """What the snapshots of one encoder name: files of segments and codecs, and versions of the table."""

    file_names: set[str]
    versions: set[int]


def _needed(layout: Layout) -> dict[str, _Needed]:
    """What all snapshots and drafts name, by their encoders; one record is in memory at a time."""
    needed: defaultdict[str, _Needed] = defaultdict(lambda: _Needed(set(), set()))
    latest: defaultdict[str, int] = defaultdict(int)
    for snapshot in snapshots.list_snapshots(layout):
        latest[snapshot.fingerprint] = max(latest[snapshot.fingerprint], snapshot.snapshot_id)
        parts: list[Segment | Codec] = [*snapshot.segments, *([snapshot.codec] if snapshot.codec else [])]
        needed[snapshot.fingerprint].file_names.update(part.file_name for part in parts)
        needed[snapshot.fingerprint].versions.add(snapshot.images_version)
    for fingerprint, base_id in latest.items():
        draft = find_draft(layout, fingerprint, base_id=base_id)
        if draft is not None:
            draft_name = layout.draft_uri(fingerprint).rpartition("/")[2]
            needed[fingerprint].file_names.update(draft.record.file_names, {draft_name})
            needed[fingerprint].versions.add(draft.record.images_version)
    return needed


def _sweep_files(folder_uri: str, names: Container[str], lease: Lease) -> int:
    """Delete the segments and codecs in a folder that have none of these names; how many."""
    num_deleted = 0
    for page in list_objects(folder_uri) if exists(folder_uri) else ():
        lease.check()
        for entry in page:
            if entry.uri.rpartition("/")[2] not in names:
                delete(entry.uri)
                num_deleted += 1
    return num_deleted
