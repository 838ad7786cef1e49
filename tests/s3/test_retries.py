"""A store that misbehaves in a scripted way: what is retried, how often, and what it says in the end."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from for_ray.errors import DataError, ForRayError, StorageError
from for_ray.schema import LISTING_SCHEMA
from for_ray.stages.blocks import DENIED, OK
from for_ray.stages.reading import read_block
from for_ray.storage import (
    NoBucket,
    NotAnObject,
    ObjectDenied,
    download,
    list_objects,
    read_bytes,
    write_bytes,
)
from for_ray.storage.patience import NUM_ATTEMPTS
from tests.odd_keys import make_job

pytestmark = pytest.mark.s3

CONTENT = b"0123456789" * 1000

LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

URI = "s3://bucket/a.jpg"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers the n-th request by the n-th line of the script; the last line repeats."""

    server: ScriptedStore
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.num_requests += 1
        line = self.server.script[min(self.server.num_requests, len(self.server.script)) - 1]
        if line == "reset":
            self.close_connection = True
        elif line in ("ok", "cut"):
            content = b"" if self.command == "PUT" else CONTENT
            self._reply(200, content, len(content) if line == "ok" else 4321)
        elif line == "listing":
            self._reply(200, LISTING, len(LISTING))
        else:
            status, _, code = line.partition(" ")
            body = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode()
            self._reply(int(status), body, len(body))

    do_PUT = do_HEAD = do_GET  # noqa: N815

    def _reply(self, status: int, body: bytes, num_sent: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"etag"')
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 14:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:num_sent])
        self.close_connection = num_sent < len(body)

    def log_message(self, *_: object) -> None:
        pass


class ScriptedStore(http.server.ThreadingHTTPServer):
    daemon_threads = True
    script: list[str]
    num_requests = 0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedStore]:
    with ScriptedStore(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the back-off
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "trouble",
    ["503 SlowDown", "500 InternalError", "503 ServiceUnavailable", "400 RequestTimeout", "reset", "cut"],
)
def test_passing_trouble_is_retried(store, trouble):
    store.script = [trouble, trouble, "ok"]
    assert read_bytes(URI, etag="etag") == CONTENT
    assert store.num_requests == 3


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("503 SlowDown", "the store still asks to slow down after several tries; run again later"),
        ("500 InternalError", "the store still fails inside after several tries"),
        ("503 ServiceUnavailable", "the store is still not available after several tries"),
        ("reset", r"the store cannot be reached at http://127\.0\.0\.1:\d+ .*after several tries"),
        ("cut", r"the store cannot be reached at http://127\.0\.0\.1:\d+ .*after several tries"),
    ],
)
def test_lasting_trouble_ends_with_one_line(store, trouble, reason):
    store.script = [trouble]
    with pytest.raises(StorageError, match=rf"cannot read s3://bucket/a\.jpg: {reason}") as caught:
        read_bytes(URI, etag="etag")
    assert "\n" not in str(caught.value)
    assert store.num_requests == NUM_ATTEMPTS


@pytest.mark.parametrize(
    ("trouble", "kind", "reason"),
    [
        ("403 AccessDenied", ObjectDenied, "access is denied; check which credentials are used"),
        ("400 ExpiredToken", StorageError, "the credentials have expired; log in again"),
        ("403 RequestTimeTooSkewed", StorageError, "clock and the store's differ by too much; set the clock"),
        ("507 InsufficientStorage", StorageError, "the store is full"),
        ("418 Teapot", StorageError, r"the store at http://127\S+ answered Teapot: scripted"),
        ("403 InvalidObjectState", DataError, r"is archived \(Glacier\); restore it first"),
        ("404 NoSuchBucket", NoBucket, "the bucket does not exist; check its name"),
        ("400 KeyTooLongError", NotAnObject, "the key is longer than the store allows; choose a shorter one"),
        ("404 NoSuchKey", DataError, "is not there"),
        ("412 PreconditionFailed", DataError, "has changed since it was listed"),
    ],
)
def test_permanent_trouble_is_asked_once(store, trouble, kind, reason):
    store.script = [trouble]
    with pytest.raises(kind, match=reason) as caught:
        read_bytes(URI, etag="etag")
    assert isinstance(caught.value, ForRayError)
    assert "\n" not in str(caught.value)
    assert store.num_requests == 1


@pytest.mark.parametrize("uri", ["s3://bucket/", "s3://not a bucket/a.jpg"])
def test_a_uri_that_no_object_can_have_is_not_asked_for(store, uri):
    store.script = ["ok"]
    with pytest.raises(NotAnObject, match=r"cannot read s3://.*: the name is not valid .*; check the uri"):
        read_bytes(uri, etag="etag")
    assert store.num_requests == 0


def test_rows_of_a_store_without_the_bucket_are_tried_again_unless_others_can_be_read(store, tmp_path):
    """The store may be the wrong one, AWS_ENDPOINT_URL unset; one row alone says nothing of it."""
    store.script = ["404 NoSuchBucket"]
    (tmp_path / "empty.jpg").touch()
    uris = ["s3://bucket/a.jpg", "s3://bucket/b.jpg", str(tmp_path / "empty.jpg")]
    rows = pa.table([uris, ["x", "x", ""], [1, 1, 0]], schema=LISTING_SCHEMA)
    for length, status in ((1, OK), (2, DENIED), (3, OK)):
        block = read_block(rows.slice(0, length), job=make_job())
        assert block["status"].to_pylist() == [status] * length
        assert (
            block["error"][0].as_py().startswith("cannot read s3://bucket/a.jpg: the bucket does not exist")
        )


def test_rows_that_may_be_listed_and_not_read_are_tried_again(store):
    """The policy, or the key that they are encrypted with, is lost; where listing fails too, it is raised."""
    uris = ["s3://bucket/a.jpg", "s3://bucket/b.jpg"]
    rows = pa.table([uris, ["x", "x"], [1, 1]], schema=LISTING_SCHEMA)
    store.script = ["403 AccessDenied", "403 AccessDenied", "listing"]
    assert read_block(rows, job=make_job())["status"].to_pylist() == [DENIED, DENIED]
    store.script = ["403 AccessDenied"]
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a\.jpg: access is denied"):
        read_block(rows, job=make_job())


def test_attempts_can_be_set(store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store.script = ["503 SlowDown"]
    with pytest.raises(StorageError, match="slow down"):
        list(list_objects("s3://bucket/x"))
    assert store.num_requests == 2


def test_writing_is_retried(store):
    store.script = ["reset", "500 InternalError", "ok"]
    assert write_bytes(URI, b"content") == "etag"
    assert store.num_requests == 3


def test_downloads_are_retried_and_leave_nothing_when_they_fail(store, tmp_path: Path):
    store.script = ["ok", "cut", "ok"]  # HEAD, GET, GET
    download(URI, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    store.script, store.num_requests = ["ok", "cut"], 0
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a\.jpg: "):
        download(URI, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
