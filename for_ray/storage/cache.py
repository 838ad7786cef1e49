"""Files of the store on this disk, each checked against its checksum before anybody reads it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from for_ray.errors import DataError
from for_ray.storage.objects import download, stat
from for_ray.storage.refusals import disk_refusals
from for_ray.storage.uris import is_s3, local_path, shown

_checked: dict[tuple[str, str], str] = {}


def local_copy(uri: str, *, sha256: str, cache_path: Path | None = None) -> Path:
    """A path on this disk with exactly these bytes.

    A file on disk is used where it lies; an object is fetched once into the cache, under its checksum, and
    found there by every process. A file of the same size and time is checked once a process. The cache may be
    deleted at any time when nothing runs.

    Args:
        uri: The file or object.
        sha256: Its checksum, in hex.
        cache_path: The cache's folder; else `$XDG_CACHE_HOME/for_ray` or `~/.cache/for_ray`.

    Raises:
        DataError: The checksum is another.
        ObjectGone: The object is not there.
        StorageError: The store or the disk refused.
    """
    if not is_s3(uri):
        path = local_path(uri)
        _require(uri, path, sha256)
        return path
    folder = cache_path or _default_cache()
    path = folder / sha256[:2] / f"{sha256}{Path(uri).suffix}"
    if path.exists():
        if _sha256(path) == sha256:
            return path
        path.unlink(missing_ok=True)
    download(uri, path)
    try:
        _require(uri, path, sha256)
    except DataError:
        path.unlink(missing_ok=True)
        raise
    return path


def _require(uri: str, path: Path, sha256: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise DataError(
            f"{shown(uri)} is damaged or was replaced: its SHA-256 is {found[:16]}…, expected "
            f"{sha256[:16]}…; restore the file, or build it anew"
        )


def _sha256(path: Path) -> str:
    etag = stat(str(path)).etag
    with disk_refusals("read", path), path.open("rb") as file:
        if (str(path), etag) not in _checked:
            _checked[str(path), etag] = hashlib.file_digest(file, "sha256").hexdigest()
        return _checked[str(path), etag]


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "for_ray"
