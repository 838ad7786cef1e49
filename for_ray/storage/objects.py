"""Reading, writing, listing and deleting, whichever kind of store a uri names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from for_ray.errors import DataError
from for_ray.storage import disk
from for_ray.storage.disk import Entry
from for_ray.storage.uris import is_s3, local_path, shown

__all__ = [
    "Entry",
    "check_writable",
    "delete",
    "delete_tree",
    "download",
    "exists",
    "list_objects",
    "read_bytes",
    "s3_client",
    "stat",
    "upload",
    "write_bytes",
]

# boto3 takes half a second to import: who works on disk never pays for it, hence the imports inside.


def s3_client(max_connections: int = 32) -> Any:
    """The boto3 S3 client of this process; threads may share it.

    Endpoint (`AWS_ENDPOINT_URL` or the profile's), region and credentials come from boto3's usual chain. One
    client is kept for each process and AWS environment.

    Raises:
        StorageError: The profile does not exist, or the endpoint is not valid.
    """
    from for_ray.storage import s3

    return s3.connection(max_connections).client


def stat(uri: str) -> Entry:
    """The entry of one file or object.

    Raises:
        ObjectGone: There is none.
        DataError: It is a folder, pipe or device.
        StorageError: The store refused.
    """
    if is_s3(uri):
        from for_ray.storage import s3

        return s3.stat(uri)
    return disk.stat(local_path(uri))


def list_objects(uri: str) -> Iterator[list[Entry]]:
    """Every file or object below a folder or prefix, however deep, in pages of at most 1,000, in no order.

    `s3://b/x` stands for the keys that start with `x/`; empty prefixes and folders yield nothing. On disk,
    links are followed and each folder is walked once; the etag is made of modification time and size.

    Raises:
        StorageError: The folder or the bucket is missing, or listing is not allowed.
    """
    if is_s3(uri):
        from for_ray.storage import s3

        return s3.list_objects(uri)
    return disk.list_objects(local_path(uri))


def read_bytes(
    uri: str,
    *,
    etag: str | None = None,
    start: int | None = None,
    length: int | None = None,
    max_bytes: int | None = None,
) -> bytes:
    """Read an object, or `length` bytes of it from `start` (to its end without a length): one request.

    Args:
        uri: The file or object.
        etag: What the listing said. On disk an etag that no listing of ours made is not compared.
        start: The first byte.
        length: How many bytes; fewer is an error.
        max_bytes: A larger object is refused before it is read.

    Raises:
        ObjectGone: It is not there any more.
        ObjectChanged: Its etag is another.
        DataError: It is too short, too long, archived, or no file.
        StorageError: The store refused, or could not be reached after several tries.
    """
    if length is not None and start is None:
        start = 0
    if length == 0:
        return b""
    if is_s3(uri):
        from for_ray.storage import s3

        content = s3.read_bytes(uri, etag, start, length, max_bytes)
    else:
        content = disk.read_bytes(local_path(uri), etag, start or 0, length, max_bytes)
    if length is not None and len(content) < length:
        raise DataError(f"{shown(uri)} ends too early: {length - len(content)} bytes are missing")
    return content


def write_bytes(uri: str, content: bytes, *, if_absent: bool = False, if_etag: str | None = None) -> str:
    """Write an object, whole or not at all; folders are made as needed.

    Args:
        uri: The file or object.
        content: All of it.
        if_absent: Only if there is none.
        if_etag: Only if it is still the one with this etag. Among writers on one disk, a lock file beside it
            (`.<name>.lock`) keeps comparing and replacing together.

    Returns:
        The new etag.

    Raises:
        ConditionFailed: The condition does not hold. After a retried request on S3 it may be the caller's own
            first try that broke it: read back to know.
        StorageError: The store refused.
    """
    if is_s3(uri):
        from for_ray.storage import s3

        return s3.write_bytes(uri, content, if_absent, if_etag)
    return disk.write_bytes(local_path(uri), content, if_absent, if_etag)


def exists(uri: str) -> bool:
    """Whether there is a file or object, or a folder or prefix with something in it.

    Raises:
        StorageError: The bucket is missing, or the store refused.
    """
    if is_s3(uri):
        from for_ray.storage import s3

        return s3.exists(uri)
    return disk.exists(local_path(uri))


def delete(uri: str) -> None:
    """Remove one file or object; it need not be there."""
    if is_s3(uri):
        from for_ray.storage import s3

        s3.delete(uri)
    else:
        disk.delete(local_path(uri))


def delete_tree(uri: str) -> None:
    """Remove all that lies below a folder or prefix; a whole bucket or disk is refused (`StorageError`)."""
    if is_s3(uri):
        from for_ray.storage import s3

        s3.delete_tree(uri)
    else:
        disk.delete_tree(local_path(uri))


def upload(path: Path, uri: str) -> None:
    """Copy a file from this disk to a uri, whole or not at all; large ones in parallel parts."""
    if is_s3(uri):
        from for_ray.storage import s3

        s3.upload(path, uri)
    else:
        disk.copy(path, local_path(uri))


def download(uri: str, path: Path) -> None:
    """Copy an object to this disk, whole or not at all; raises `ObjectGone` when there is none."""
    if is_s3(uri):
        from for_ray.storage import s3

        s3.download(uri, path)
    else:
        disk.stat(local_path(uri))
        disk.copy(local_path(uri), path)


def check_writable(uri: str) -> None:
    """Try to write and delete below a folder or prefix; nothing stays, and no folder is made.

    Raises:
        StorageError: Writing or deleting there is refused.
    """
    if is_s3(uri):
        from for_ray.storage import s3

        s3.check_writable(uri)
    else:
        disk.check_writable(local_path(uri))
