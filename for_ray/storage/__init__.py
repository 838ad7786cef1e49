"""Folders and S3 buckets behind the same plain functions.

A uri is a path on disk (`file://` too) or `s3://bucket/key`, unescaped. Endpoint, region and credentials come
from the usual AWS environment and profile. What the store refuses is a `StorageError` of one line: which uri,
why, what to do. Throttling, time-outs and resets are retried with back-off; what is permanent ends at once.
"""

from for_ray.storage.cache import local_copy
from for_ray.storage.connections import arrow_filesystem, lance_options
from for_ray.storage.lease import Lease
from for_ray.storage.manifest import manifest_schema, read_manifest
from for_ray.storage.objects import (
    Entry,
    check_writable,
    delete,
    delete_tree,
    download,
    exists,
    list_objects,
    read_bytes,
    s3_client,
    stat,
    upload,
    write_bytes,
)
from for_ray.storage.ranged import RangedReader
from for_ray.storage.refusals import (
    ConditionFailed,
    NoBucket,
    NotAnObject,
    ObjectChanged,
    ObjectDenied,
    ObjectGone,
)
from for_ray.storage.spill import Spill
from for_ray.storage.tars import find_image, list_members, read_image
from for_ray.storage.temporary import temporary_folder
from for_ray.storage.uris import canonical_uri, is_s3, join_uri, local_path, shown, split_s3

__all__ = [
    "ConditionFailed",
    "Entry",
    "Lease",
    "NoBucket",
    "NotAnObject",
    "ObjectChanged",
    "ObjectDenied",
    "ObjectGone",
    "RangedReader",
    "Spill",
    "arrow_filesystem",
    "canonical_uri",
    "check_writable",
    "delete",
    "delete_tree",
    "download",
    "exists",
    "find_image",
    "is_s3",
    "join_uri",
    "lance_options",
    "list_members",
    "list_objects",
    "local_copy",
    "local_path",
    "manifest_schema",
    "read_bytes",
    "read_image",
    "read_manifest",
    "s3_client",
    "shown",
    "split_s3",
    "stat",
    "temporary_folder",
    "upload",
    "write_bytes",
]
