"""S3 buckets: what `objects.py` does for `s3://bucket/key`. Imported late: boto3 takes half a second."""

from __future__ import annotations

import datetime
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    IncompleteReadError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.utils import parse_timestamp
from s3transfer.exceptions import RetriesExceededError

from for_ray.command import is_command
from for_ray.errors import DataError, StorageError
from for_ray.storage import patience
from for_ray.storage.disk import Entry, replacing
from for_ray.storage.refusals import (
    ConditionFailed,
    NoBucket,
    NotAnObject,
    ObjectChanged,
    ObjectDenied,
    ObjectGone,
    disk_refusals,
    s3_refusal,
)
from for_ray.storage.uris import shown, split_s3

_MOVED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
_GONE = ("NoSuchKey", "404", "NoSuchVersion")
_DENIED = ("AccessDenied", "AllAccessDisabled", "403")
_NO_OBJECTS = ("InvalidBucketName", "InvalidURI", "KeyTooLongError")
_BROKEN_OFF = (ResponseStreamingError, IncompleteReadError, ReadTimeoutError, ConnectionClosedError)


class _Connection(NamedTuple):
    session: Any
    client: Any


_connections: dict[tuple[object, ...], _Connection] = {}
_connections_lock = threading.Lock()


def connection(max_connections: int = 32) -> _Connection:
    """The boto3 session and client, which threads may share: one for each process and AWS environment."""
    # A client of the parent must not be used after a fork: two processes would share its sockets.
    settings = sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "HOME")))
    key = (os.getpid(), max_connections, *settings)
    if key not in _connections:
        with _connections_lock:
            if key not in _connections:
                _connections[key] = _connect(max_connections)
    return _connections[key]


def _connect(max_connections: int) -> _Connection:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=max_connections,
        connect_timeout=patience.CONNECT_SECONDS,
        read_timeout=patience.READ_SECONDS,
        tcp_keepalive=True,
    )
    try:
        core = botocore.session.get_session()
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
        session = boto3.session.Session(botocore_session=core)
        # boto3 knows only AWS_DEFAULT_REGION; AWS_REGION is what every other SDK, and Lance, reads.
        client = session.client("s3", config=config, region_name=os.environ.get("AWS_REGION"))
    except (BotoCoreError, ValueError) as error:
        raise s3_refusal(error, "reach", "S3", os.environ.get("AWS_ENDPOINT_URL", "AWS")) from error
    if is_command() and not _connections:
        try:
            patience.greet(session, client)
        except BotoCoreError as error:
            raise s3_refusal(error, "reach", "S3", client.meta.endpoint_url) from error
    patience.be_patient(client)
    return _Connection(session, client)


def _timestamp(value: Any) -> datetime.datetime:
    """A time in an answer. botocore's parser takes 50 µs for it, three quarters of what listing costs."""
    if isinstance(value, str) and value[4:5] == "-":
        with suppress(ValueError):
            return datetime.datetime.fromisoformat(value)
    return parse_timestamp(value)


@contextmanager
def _refusals(action: str, uri: str) -> Iterator[Any]:
    """Yield the client; turn what botocore raises in the block into a `StorageError`."""
    client = connection().client
    try:
        yield client
    except (BotoCoreError, ClientError) as error:
        raise s3_refusal(error, action, uri, client.meta.endpoint_url) from error
    except RetriesExceededError as error:  # of a download's body
        raise s3_refusal(error.last_exception, action, uri, client.meta.endpoint_url) from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _entry(uri: str, answer: dict[str, Any], size: str = "ContentLength") -> Entry:
    return Entry(uri, str(answer["ETag"]).strip('"'), int(answer[size]))


def stat(uri: str) -> Entry:
    """The object's entry; raises `ObjectGone` when there is none."""
    bucket, key = split_s3(uri)
    if not key:
        raise ObjectGone(f"{shown(uri)} is a bucket, not an object")
    with _refusals("read", uri) as client:
        try:
            return _entry(uri, client.head_object(Bucket=bucket, Key=key))
        except ClientError as error:
            _check_bucket(uri)
            if _code(error) in _GONE:
                raise ObjectGone(f"{shown(uri)} is not there; check the uri") from error
            raise


def _check_bucket(uri: str) -> None:
    """Raise the refusal that a HEAD, which has no body, cannot tell: no such bucket, or no right."""
    bucket, key = split_s3(uri)
    with _refusals("read", uri) as client:
        # Below the key: a policy may allow to list nothing else.
        client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


def list_objects(uri: str) -> Iterator[list[Entry]]:
    """Every object below a prefix, in pages of at most 1,000, in the store's order; memory is one page."""
    bucket, key = split_s3(uri)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    with _refusals("list", uri) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            if found := page.get("Contents"):
                yield [_entry(f"s3://{bucket}/{item['Key']}", item, "Size") for item in found]


def read_bytes(
    uri: str, etag: str | None, start: int | None, length: int | None, max_bytes: int | None
) -> bytes:
    """One GET. Tried again when the answer breaks off in the middle, which botocore leaves to its caller."""
    bucket, key = split_s3(uri)
    wanted: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if etag:
        wanted["IfMatch"] = f'"{etag}"'
    if start is not None:
        wanted["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
    with _refusals("read", uri) as client:
        for attempt in range(1, patience.num_attempts() + 1):
            answer = _get(client, uri, wanted)
            try:
                return _body(uri, answer, max_bytes)
            except _BROKEN_OFF:
                if attempt == patience.num_attempts():
                    raise
                time.sleep(patience.delay(attempt))
    raise AssertionError("unreachable")


def _get(client: Any, uri: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The answer to a GET, its body still to be read; botocore has tried again as often as it should."""
    try:
        answer: dict[str, Any] = client.get_object(**wanted)
    except ClientError as error:
        _raise_if_data(uri, error)
        if _code(error) in _DENIED:
            raise ObjectDenied(str(s3_refusal(error, "read", uri, client.meta.endpoint_url))) from error
        if _code(error) == "NoSuchBucket":
            raise NoBucket(str(s3_refusal(error, "read", uri, client.meta.endpoint_url))) from error
        if _code(error) in _NO_OBJECTS:
            raise NotAnObject(str(s3_refusal(error, "read", uri, client.meta.endpoint_url))) from error
        raise
    except ParamValidationError as error:
        raise NotAnObject(str(s3_refusal(error, "read", uri, client.meta.endpoint_url))) from error
    except UnicodeEncodeError as error:
        raise NotAnObject(f"cannot read {shown(uri)}: the name is no text; check the uri") from error
    return answer


def _body(uri: str, answer: dict[str, Any], max_bytes: int | None) -> bytes:
    if max_bytes is not None and answer["ContentLength"] > max_bytes:
        answer["Body"].close()
        size = answer["ContentLength"]
        raise DataError(f"{shown(uri)} is too large: {size} bytes, at most {max_bytes} are read")
    content: bytes = answer["Body"].read()
    return content


def _raise_if_data(uri: str, error: ClientError) -> None:
    """Raise a `DataError` if this one object is the trouble, not the store."""
    code = _code(error)
    if code in _MOVED:
        raise ObjectChanged(f"{shown(uri)} has changed since it was listed; run again") from error
    if code in _GONE:
        raise ObjectGone(f"{shown(uri)} is not there") from error
    if code in ("InvalidRange", "416"):
        raise DataError(f"{shown(uri)} is shorter than its listing says") from error
    if code == "InvalidObjectState":
        raise DataError(f"{shown(uri)} is archived (Glacier); restore it first") from error


def write_bytes(uri: str, content: bytes, if_absent: bool, if_etag: str | None) -> str:
    """One PUT; returns the new etag."""
    bucket, key = split_s3(uri)
    condition = (
        {"IfNoneMatch": "*"} if if_absent else {"IfMatch": f'"{if_etag}"'} if if_etag is not None else {}
    )
    with _refusals("write", uri) as client:
        try:
            answer = client.put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except ClientError as error:
            if condition and _code(error) in (*_MOVED, *_GONE):
                what = "it exists already" if if_absent else "somebody else has written or deleted it"
                raise ConditionFailed(f"cannot write {shown(uri)}: {what}") from error
            raise
    return str(answer["ETag"]).strip('"')


def exists(uri: str) -> bool:
    """Whether there is an object, or a prefix with something below it."""
    _, key = split_s3(uri)
    try:
        if key.rstrip("/"):
            stat(uri)
            return True
    except ObjectGone:
        pass
    return next(list_objects(uri), None) is not None


def delete(uri: str) -> None:
    """Remove one object; it need not be there."""
    bucket, key = split_s3(uri)
    with _refusals("delete", uri) as client:
        client.delete_object(Bucket=bucket, Key=key)


def delete_tree(uri: str) -> None:
    """Remove all objects below a prefix, 1,000 a request."""
    bucket, key = split_s3(uri)
    if not key.strip("/"):
        raise StorageError(f"cannot delete {shown(uri)}: it is a whole bucket; name a prefix in it")
    # A page is read while another is deleted: list until nothing is left, wherever the store's marker stood.
    while True:
        num_deleted = sum(_delete_page(uri, bucket, page) for page in list_objects(uri))
        if not num_deleted:
            return


def _delete_page(uri: str, bucket: str, page: list[Entry]) -> int:
    keys = [{"Key": split_s3(entry.uri)[1]} for entry in page]
    with _refusals("delete", uri) as client:
        answer = client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
    for error in answer.get("Errors", []):
        raise s3_refusal(
            ClientError({"Error": error}, "DeleteObjects"), "delete", uri, client.meta.endpoint_url
        )
    return len(keys)


def upload(path: Path, uri: str) -> None:
    """Send one file, in parts where it is large; the object appears whole or not at all."""
    bucket, key = split_s3(uri)
    with disk_refusals("read", path), path.open("rb") as file, _refusals("write", uri) as client:
        client.upload_fileobj(file, bucket, key)


def download(uri: str, path: Path) -> None:
    """Fetch one object; the file appears whole or not at all."""
    bucket, key = split_s3(uri)
    with _refusals("read", uri) as client, disk_refusals("write", path), replacing(path) as fresh:
        try:
            with fresh.open("xb") as file:
                client.download_fileobj(bucket, key, file)
                file.flush()
                os.fsync(file.fileno())
        except ClientError as error:
            _check_bucket(uri)
            if _code(error) in _GONE:
                raise ObjectGone(f"{shown(uri)} is not there; check the uri") from error
            raise


def check_writable(uri: str) -> None:
    """Write an empty object below the prefix and remove it."""
    bucket, key = split_s3(f"{uri.rstrip('/')}/.for_ray-{secrets.token_hex(6)}")
    with _refusals("write", uri) as client:
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    with _refusals("delete", uri) as client:
        client.delete_object(Bucket=bucket, Key=key)
