"""An image's file as it is sent: in pieces, whole or a range, and not again where the client has it."""

from __future__ import annotations

import asyncio
import io
import tarfile
from pathlib import Path

import anyio.to_thread
import numpy as np
import pytest
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from for_ray import storage
from for_ray.retrieval import StoredImage
from for_ray.serving import streams
from for_ray.serving.refusals import Refusal
from tests.unit.serving.conftest import Served

CONTENT = b"\xff\xd8\xff" + np.random.default_rng(0).bytes(2_500_000)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredImage:
    """Of two and a half pieces."""
    path = tmp_path_factory.mktemp("streams") / "large.jpg"
    path.write_bytes(CONTENT)
    return StoredImage(1, str(path), storage.stat(str(path)).etag, None, None)


def sent(image: StoredImage, **asked: str) -> tuple[int, list[bytes], Headers]:
    """Status, pieces and headers of an answer to a request with these headers."""
    answer = streams.image_response(image, Headers({k.replace("_", "-"): v for k, v in asked.items()}))
    if not isinstance(answer, StreamingResponse):
        return answer.status_code, [], Headers(raw=answer.raw_headers)
    return answer.status_code, read(answer), Headers(raw=answer.raw_headers)


def read(answer: StreamingResponse) -> list[bytes]:
    """The pieces of an answer."""

    async def pieces() -> list[bytes]:
        return [bytes(piece) async for piece in answer.body_iterator]

    return asyncio.run(pieces())


def test_a_large_file_comes_in_pieces(stored: StoredImage, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    read_bytes = storage.read_bytes

    def counted(uri: str, **what: int) -> bytes:
        lengths.append(what["length"])
        return read_bytes(uri, **what)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "read_bytes", counted)
    status, pieces, headers = sent(stored)
    assert (status, b"".join(pieces)) == (200, CONTENT)
    assert lengths == [len(piece) for piece in pieces] == [1 << 20, 1 << 20, len(CONTENT) - (2 << 20)]
    assert headers["content-length"] == str(len(CONTENT))
    assert headers["content-type"] == "image/jpeg"
    assert headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-1999999", 5, 2_000_000),
        ("bytes=2000000-", 2_000_000, len(CONTENT)),
        ("bytes=-7", len(CONTENT) - 7, len(CONTENT)),
        ("bytes=1-99999999999", 1, len(CONTENT)),
        ("bytes=-99999999999", 0, len(CONTENT)),
    ],
)
def test_a_range_is_a_part_of_it(stored: StoredImage, asked: str, first: int, end: int) -> None:
    status, pieces, headers = sent(stored, range=asked)
    assert status == 206
    assert b"".join(pieces) == CONTENT[first:end]
    assert headers["content-range"] == f"bytes {first}-{end - 1}/{len(CONTENT)}"
    assert headers["content-length"] == str(end - first)
    assert headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize("asked", ["bytes=3-1", "bytes=-", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", ""])
def test_ranges_that_are_not_served_are_the_whole_file(stored: StoredImage, asked: str) -> None:
    status, pieces, _ = sent(stored, range=asked)
    assert (status, sum(map(len, pieces))) == (200, len(CONTENT))


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_a_range_behind_the_end_is_refused(stored: StoredImage, asked: str) -> None:
    with pytest.raises(Refusal, match="the file has 2,500,003 bytes") as refused:
        sent(stored, range=asked)
    assert refused.value.status == 416
    assert refused.value.response().headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_who_has_the_file_is_not_sent_it_again(stored: StoredImage, monkeypatch: pytest.MonkeyPatch) -> None:
    etag = sent(stored)[2]["etag"]
    assert sent(stored, range="bytes=1-2", if_range=etag)[0] == 206
    assert sent(stored, range="bytes=1-2", if_range='"another"')[0] == 200
    assert sent(stored, if_none_match='"another"')[0] == 200
    other = StoredImage(1, stored.uri, storage.disk.ETAG_PREFIX + "1-1", None, None)
    with pytest.raises(Refusal, match="was changed since"):
        sent(other, if_none_match=etag)
    monkeypatch.setattr(storage, "read_bytes", None)  # nothing is read
    for known in (etag, f'"another", W/{etag}'):
        status, pieces, headers = sent(stored, if_none_match=known)
        assert (status, pieces, headers["etag"]) == (304, [], etag)


def test_pieces_are_read_in_threads_of_their_own(stored: StoredImage) -> None:
    async def bytes_sent() -> int:
        limiter = anyio.CapacityLimiter(1)
        anyio.to_thread.current_default_thread_limiter().total_tokens = 0  # taken by others
        answer = streams.image_response(stored, Headers({}), limiter)
        assert isinstance(answer, StreamingResponse)
        with anyio.fail_after(20):
            return sum([len(piece) async for piece in answer.body_iterator])

    assert asyncio.run(bytes_sent()) == len(CONTENT)


def test_a_file_that_changes_while_it_is_sent_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(CONTENT)
    answer = streams.image_response(
        StoredImage(1, str(path), storage.stat(str(path)).etag, None, None), Headers({})
    )
    assert isinstance(answer, StreamingResponse)
    path.write_bytes(CONTENT[::-1] + b"x")
    with pytest.raises(storage.ObjectChanged):
        read(answer)


@pytest.fixture
def in_tar(tmp_path: Path) -> StoredImage:
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.jpg", b"other"), ("b.jpg", CONTENT), ("c.jpg", b"other")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    (entry,) = (each for each in storage.list_members(storage.stat(str(path))) if "#b.jpg" in each.uri)
    return StoredImage(1, entry.uri, entry.etag, None, None)


def test_a_member_of_a_tar_has_its_own_bytes(in_tar: StoredImage) -> None:
    status, pieces, _ = sent(in_tar)
    assert (status, b"".join(pieces)) == (200, CONTENT)
    assert b"".join(sent(in_tar, range="bytes=-10")[1]) == CONTENT[-10:]


def test_an_image_without_an_etag_is_sent_each_time(stored: StoredImage) -> None:
    status, pieces, headers = sent(StoredImage(1, stored.uri, "", None, None), if_none_match='""')
    assert (status, len(b"".join(pieces))) == (200, len(CONTENT))
    assert "etag" not in headers


def test_over_http(client: TestClient, served: Served) -> None:
    content = (served.folder / "0.jpg").read_bytes()
    whole = client.get("/images/0")
    again = client.get("/images/0", headers={"If-None-Match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    part = client.get("/images/0", headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, content[2:6])
    refused = client.get("/images/0", headers={"Range": "bytes=999999-"})
    assert (refused.status_code, refused.json()["code"]) == (416, "range")
    assert refused.headers["content-range"] == f"bytes */{len(content)}"
    assert client.get("/images/8", headers={"If-None-Match": whole.headers["etag"]}).status_code == 410
