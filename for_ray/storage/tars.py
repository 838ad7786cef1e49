"""Images inside tar files (WebDataset): listed from the headers alone, read by one ranged request each.

A member's uri is `<tar uri>#<member name>`, its etag `<tar etag>@<offset>+<length>`. What reads it needs
nothing but these two. A damaged tar is listed as one more entry, under the tar's own uri, so that it is
quarantined with its reason like a broken image, and the members before the damage are kept. So is a tar with
`.tar#` in its own uri, whose members could not be told from those of another.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from for_ray.errors import DataError
from for_ray.storage.objects import Entry, read_bytes, stat
from for_ray.storage.ranged import RangedReader
from for_ray.storage.uris import is_s3, shown

MAX_IMAGE_BYTES = 1 << 28
"""Larger objects are not read as images: 256 MiB."""

_MEMBER = re.compile(r"(?P<etag>.*)@(?P<offset>\d+)\+(?P<length>\d+)", re.DOTALL)
_DAMAGED = re.compile(r".*@damaged\+(?P<offset>\d+)", re.DOTALL)
_AMBIGUOUS = "@ambiguous"
_TAR_END = re.compile(r"\.tar#", re.IGNORECASE)
_BLOCK = 512


def read_image(uri: str, etag: str, *, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image as it was listed: a whole object, or a member of a tar; one request.

    Raises:
        ObjectGone: The object, or the tar, is not there any more.
        ObjectChanged: It is not the one that was listed.
        DataError: It is larger than `max_bytes`, or the tar is damaged.
        StorageError: The store refused, or could not be reached after several tries.
    """
    member = _member(uri, etag)
    if member is None:
        return read_bytes(uri, etag=etag, max_bytes=max_bytes)
    tar, offset = member
    if tar.size_bytes > max_bytes:
        raise DataError(f"{shown(uri)} is too large: {tar.size_bytes} bytes, at most {max_bytes} are read")
    return read_bytes(tar.uri, etag=tar.etag, start=offset, length=tar.size_bytes)


def find_image(uri: str, etag: str) -> tuple[Entry, int]:
    """Where `read_bytes` finds an image as it was listed: without reading it.

    Returns:
        The object, which is the tar for a member of one, with the image's own size and the etag that it must
        have; and the image's first byte in it.

    Raises:
        ObjectGone: The object is not there any more; a tar is not looked for.
        DataError: It is no file, or the tar is damaged.
        StorageError: The store refused, or could not be reached after several tries.
    """
    member = _member(uri, etag)
    if member is not None:
        return member
    entry = stat(uri)
    return Entry(uri, etag or entry.etag, entry.size_bytes), 0


def _member(uri: str, etag: str) -> tuple[Entry, int] | None:
    """The tar, with the size of its member, and where that begins; None for a whole object."""
    if damage := _DAMAGED.fullmatch(etag):
        raise DataError(f"{shown(uri)} is damaged: what lies behind byte {damage['offset']} cannot be read")
    if etag.endswith(_AMBIGUOUS):
        raise DataError(f"{shown(uri)} has .tar# in its name: that marks members of a tar; rename it")
    member = _MEMBER.fullmatch(etag)
    if member is None:
        return None
    end = _TAR_END.search(uri)
    if end is None:
        raise DataError(f"{shown(uri)} has the etag of a tar member, but names no .tar file")
    return Entry(uri[: end.end() - 1], member["etag"], int(member["length"])), int(member["offset"])


def list_members(tar: Entry) -> Iterator[Entry]:
    """The regular files of an uncompressed tar, in the tar's order; memory does not grow with their number.

    Args:
        tar: The tar, as it was listed.

    Raises:
        ObjectChanged: The tar was replaced meanwhile.
        StorageError: The store refused.
    """
    if _TAR_END.search(tar.uri):
        yield Entry(tar.uri, f"{tar.etag}{_AMBIGUOUS}", tar.size_bytes)
        return
    position = 0
    with _open(tar) as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (it has nothing to close)
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers
                if archive.offset > _padded(tar.size_bytes):
                    break
                if member.isreg() and not member.issparse():
                    yield Entry(
                        f"{tar.uri}#{member.name}",
                        f"{tar.etag}@{member.offset_data}+{member.size}",
                        member.size,
                    )
                position = archive.offset
        except tarfile.TarError:
            pass  # what follows `position` is told below
        file.seek(position)
        if any(file.read(_BLOCK)):
            yield Entry(tar.uri, f"{tar.etag}@damaged+{position}", tar.size_bytes)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _open(tar: Entry) -> io.BufferedReader:
    # On S3 a request takes as long as 256 KiB of an answer: skipping less by another request is no gain.
    return io.BufferedReader(RangedReader(tar), 1 << 18 if is_s3(tar.uri) else 4096)
