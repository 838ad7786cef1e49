"""Folders on disk: what `objects.py` does for a path."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from for_ray.errors import DataError, StorageError
from for_ray.storage.refusals import (
    ConditionFailed,
    NotAnObject,
    ObjectChanged,
    ObjectDenied,
    ObjectGone,
    disk_refusal,
    disk_refusals,
)
from for_ray.storage.uris import shown

ETAG_PREFIX = "mtime-"
"""A manifest may carry any etag for a file on disk; only one that starts so is compared with the file."""

PAGE_LENGTH = 1000

_RIGHTS = (errno.EACCES, errno.EPERM)
_NO_FILES = (errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG)
"""What opening a path may say of this one path, whatever the disk does with others."""


class Entry(NamedTuple):
    """One object: its uri, the etag that changes with its content, and its size."""

    uri: str
    etag: str
    size_bytes: int


def _entry(path: str, status: os.stat_result) -> Entry:
    return Entry(path, f"{ETAG_PREFIX}{status.st_mtime_ns:x}-{status.st_size:x}", status.st_size)


def stat(path: Path) -> Entry:
    """The file's entry; raises `ObjectGone` when there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectGone(f"{shown(str(path))} is not there; check the path") from error
    except OSError as error:
        raise disk_refusal(error, "read", str(path)) from error
    if not modes.S_ISREG(status.st_mode):
        raise DataError(f"{shown(str(path))} is not a file")
    return _entry(str(path), status)


def list_objects(root: Path) -> Iterator[list[Entry]]:
    """Every file below a folder, in pages, in no order.

    A link to a file counts as a file. Each folder is walked once, however many links lead to it, real folders
    before linked ones. Files that vanish meanwhile are left out, and so are pipes, sockets and devices, and
    what may not be listed of `lost+found` and of folders whose names begin with a dot. Any other folder that
    may not be listed is an error: its files would seem to be gone.
    Memory: one page, and 100 bytes a folder.
    """
    page: list[Entry] = []
    for entry in _walk(root):
        page.append(entry)
        if len(page) == PAGE_LENGTH:
            yield page
            page = []
    if page:
        yield page


def _walk(root: Path) -> Iterator[Entry]:
    seen: set[tuple[int, int]] = set()
    folders, links = [str(root)], list[str]()
    while folders or links:
        if not folders:
            folders, links = sorted(links, reverse=True), []
        folder = folders.pop()
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield from _scan(folder, folders, links)
        except OSError as error:
            if folder == str(root) or not (isinstance(error, FileNotFoundError) or _is_closed(folder, error)):
                raise disk_refusal(error, "list", folder) from error


def _is_closed(folder: str, error: OSError) -> bool:
    """Whether it is the system's own folder, or a hidden one, and may not be listed."""
    name = folder.rpartition("/")[2]
    return error.errno in _RIGHTS and (name == "lost+found" or name.startswith("."))


def _scan(folder: str, folders: list[str], links: list[str]) -> Iterator[Entry]:
    """The files of one folder; its folders, and the links to others, go to the lists."""
    with os.scandir(folder) as items:
        for item in items:
            if item.is_dir(follow_symlinks=False):
                folders.append(item.path)
            elif (status := _status(item)) is None:
                continue
            elif modes.S_ISDIR(status.st_mode):
                links.append(item.path)
            elif modes.S_ISREG(status.st_mode):
                yield _entry(item.path, status)


def _status(item: os.DirEntry[str]) -> os.stat_result | None:
    """Of the file itself, behind all links; nothing if it vanished, or the link leads nowhere."""
    try:
        return item.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def read_bytes(path: Path, etag: str | None, start: int, length: int | None, max_bytes: int | None) -> bytes:
    """The file, or `length` bytes from `start`; may be shorter at its end."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            status = os.fstat(descriptor)
            if not modes.S_ISREG(status.st_mode):
                raise DataError(f"{shown(str(path))} is not a file")
            if etag and etag.startswith(ETAG_PREFIX) and _entry("", status).etag != etag:
                raise ObjectChanged(f"{shown(str(path))} has changed since it was listed; run again")
            if length is None and max_bytes is not None and status.st_size - start > max_bytes:
                raise DataError(
                    f"{shown(str(path))} is too large: {status.st_size} bytes, at most {max_bytes} are read"
                )
            file.seek(start)
            return _read(file.fileno(), length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectGone(f"{shown(str(path))} is not there") from error
    except OSError as error:
        refusal = disk_refusal(error, "read", str(path))
        if error.errno in (*_RIGHTS, errno.EIO):
            raise ObjectDenied(str(refusal)) from error
        if error.errno in _NO_FILES:
            raise NotAnObject(str(refusal)) from error
        raise refusal from error
    except UnicodeEncodeError as error:
        raise NotAnObject(f"cannot read {shown(str(path))}: the name is no text; check the path") from error


def _read(descriptor: int, length: int | None) -> bytes:
    parts, missing = [], length
    while missing is None or missing > 0:
        part = os.read(descriptor, min(missing or 1 << 24, 1 << 24))  # one read returns at most 2 GiB
        if not part:
            break
        parts.append(part)
        missing = None if missing is None else missing - len(part)
    return b"".join(parts)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The name of a file that does not exist yet, in the folder of `path`; removed when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block ends well, and is removed when not."""
    with _beside(path) as fresh:
        yield fresh
        fresh.replace(path)


def _put(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes, if_absent: bool, if_etag: str | None) -> str:
    """Write the whole file or nothing; returns its etag."""
    with disk_refusals("write", path):
        if if_absent:
            _create(path, content)
        elif if_etag is not None:
            _exchange(path, content, if_etag)
        else:
            with replacing(path) as fresh:
                _put(fresh, content)
        return _entry("", path.stat()).etag


def _create(path: Path, content: bytes) -> None:
    try:
        with _beside(path) as fresh:
            _put(fresh, content)
            path.hardlink_to(fresh)  # unlike rename, it fails where a file stands
    except FileExistsError as error:
        raise ConditionFailed(f"cannot write {shown(str(path))}: it exists already") from error


def _exchange(path: Path, content: bytes, etag: str) -> None:
    """Compare and replace under a lock; the lock file stays, since removing it would race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = path.stat()
        except FileNotFoundError as error:
            raise ConditionFailed(f"cannot write {shown(str(path))}: it is gone") from error
        if _entry("", before).etag != etag:
            raise ConditionFailed(f"cannot write {shown(str(path))}: somebody else has written it")
        with replacing(path) as fresh:
            _put(fresh, content)
            # Clocks of file systems tick every few milliseconds: two writes must not get the same etag.
            after = max(fresh.stat().st_mtime_ns, before.st_mtime_ns + 1)
            os.utime(fresh, ns=(after, after))


def exists(path: Path) -> bool:
    """Whether there is a file, or a folder with something in it."""
    with disk_refusals("read", path):
        return any(path.iterdir()) if path.is_dir() else path.exists()


def delete(path: Path) -> None:
    """Remove one file; it need not be there."""
    with disk_refusals("delete", path), suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def delete_tree(path: Path) -> None:
    """Remove a folder and all in it; it need not be there."""
    if path == path.parent:
        raise StorageError(f"cannot delete {path}: it is the root of the disk; name a folder")
    with disk_refusals("delete", path), suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(path)


def copy(source: Path, target: Path) -> None:
    """Copy one file; the target appears whole or not at all."""
    with disk_refusals("write", target), replacing(target) as fresh, fresh.open("xb") as file:
        try:
            reader = source.open("rb")
        except OSError as error:
            raise disk_refusal(error, "read", str(source)) from error
        with reader:
            shutil.copyfileobj(reader, file, 1 << 24)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Path) -> None:
    """Write a file of 4 KiB where the folder is or will be, and remove it; makes no folder."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".for_ray-{secrets.token_hex(6)}.part"
    with disk_refusals("write", folder):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        try:
            _put(probe, b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
