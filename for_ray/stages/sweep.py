"""Sweep: remove the files of runs that did not come to their end."""

from __future__ import annotations

from for_ray.index.snapshots import list_snapshots
from for_ray.index.table import sweep_versions
from for_ray.schema import Codec, Layout, Segment
from for_ray.storage import Lease, delete, delete_tree, exists, join_uri, list_objects


def sweep(layout: Layout, fingerprint: str, lease: Lease) -> int:
    """Delete what no published snapshot names: an encoder's segments, codecs and versions of its table.

    Only runs make such files and only the holder of the lease runs, so that none of them is still wanted. A
    search opens what a snapshot names, and every snapshot counts here, not the last one alone. What runs hand
    to their workers goes too.

    Returns:
        The number of segments and codecs that were deleted.
    """
    kept: set[str] = set()
    versions: set[int] = set()
    for snapshot in list_snapshots(layout):
        if snapshot.fingerprint == fingerprint:
            versions.add(snapshot.images_version)
        parts: list[Segment | Codec] = [*snapshot.segments, *([snapshot.codec] if snapshot.codec else [])]
        kept.update(part.file_name for part in parts)
    num_deleted = 0
    folder = layout.segment_uri(fingerprint, "")
    for page in list_objects(folder) if exists(folder) else ():
        lease.check()
        for entry in page:
            if entry.uri.rpartition("/")[2] not in kept:
                delete(entry.uri)
                num_deleted += 1
    lease.check()
    sweep_versions(layout.images_uri(fingerprint), versions)
    delete_tree(join_uri(layout.index_uri, "work"))
    return num_deleted
