"""Uris: `s3://bucket/key`, unescaped, or a path on disk (`file://` is understood and turned into a path)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from for_ray.errors import ConfigError

_S3 = "s3://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_s3(uri: str) -> bool:
    """Whether the uri lies in an object store; everything else lies on disk."""
    return uri.startswith(_S3)


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key may be empty and is never unescaped.

    Raises:
        ConfigError: There is no bucket in it.
    """
    bucket, _, key = uri.removeprefix(_S3).partition("/")
    if not is_s3(uri) or not bucket:
        raise ConfigError(f"{shown(uri)} names no bucket; expected s3://BUCKET/PREFIX")
    return bucket, key


def local_path(uri: str) -> Path:
    """The absolute path of a uri on disk; links stay as they are written.

    Raises:
        ConfigError: The uri has another scheme than `file://`, names another host, or is empty.
    """
    if uri.startswith("file://"):
        host, _, path = uri.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{shown(uri)} names the host {host}; expected file:///PATH or a plain path")
        uri = unquote("/" + path)
    elif _SCHEME.match(uri):
        raise ConfigError(
            f"{shown(uri)} is of a kind that is not known; expected a path or s3://BUCKET/PREFIX"
        )
    if not uri or "\0" in uri:
        raise ConfigError(f"{shown(uri)!r} is no path; expected a path or s3://BUCKET/PREFIX")
    return Path(os.path.abspath(uri))  # noqa: PTH100  (Path.resolve would follow links)


def canonical_uri(uri: str) -> str:
    """The one way to write a uri: an absolute path, or `s3://bucket/key`, without a slash at the end."""
    if not is_s3(uri):
        return str(local_path(uri))
    bucket, key = split_s3(uri)
    return f"{_S3}{bucket}/{key}".rstrip("/")


def join_uri(uri: str, *parts: str) -> str:
    """The uri of something inside a folder; parts are taken as they are, never escaped."""
    folder = uri if is_s3(uri) else str(local_path(uri))
    return "/".join([folder.rstrip("/"), *(part.strip("/") for part in parts)])


def shown(uri: str) -> str:
    """The uri for a message: control characters are escaped, so that the message stays one line."""
    return uri if uri.isprintable() else repr(uri)[1:-1]
