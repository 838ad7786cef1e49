"""The client: what it sends, what it reads, and the one line that every failure becomes."""

from __future__ import annotations

import base64
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from for_ray.serving.client import Client, Found, Hit, ServiceError, Slot

HIT = {
    "uri": "s3://bucket/a b.jpg",
    "score": 0.25,
    "image_id": 7,
    "slot": 2,
    "box": [0.1, 0.2, 0.3, 0.4],
    "found": [{"name": "a dog", "score": 0.25, "slot": 2, "box": [0.1, 0.2, 0.3, 0.4]}],
    "folded": ["s3://bucket/b.jpg"],
    "width": 640,
    "height": None,
    "a newer field": 1,
}
ANSWER = {
    "hits": [HIT],
    "names": ["a dog"],
    "snapshot_id": 3,
    "num_looked_at": 90,
    "is_complete": False,
    "is_exhaustive": True,
    "is_proven": True,
    "reason": "1 image",
    "next_page": None,
    "seconds": {"total": 0.01},
}
OBJECTS = {
    "image_id": 7,
    "uri": "a.jpg",
    "etag": "e",
    "width": 4,
    "height": 3,
    "snapshot_id": 3,
    "slots": [{"slot": 0, "box": [0, 0, 1, 1]}, {"slot": 2, "box": [0, 0, 0.5, 1]}],
    "columns": {"camera": 2},
}
SNAPSHOT = {
    "snapshot_id": 3,
    "created_at": "2026-01-01T00:00:00Z",
    "encoder": "f",
    "indexed": 9,
    "vectors": 40,
    "recall": None,
}


class Asked(NamedTuple):
    verb: str
    path: str
    body: dict | None
    authorization: str | None
    content_type: str | None


class Stub:
    """A server that gives prepared answers and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.status, self.content, self.headers = 200, b"{}", {}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                given = (self.headers["Authorization"], self.headers["Content-Type"])
                stub.asked.append(
                    Asked(self.command, self.path, json.loads(content) if content else None, *given)
                )
                self.send_response(stub.status)
                for name, value in stub.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(stub.content)))
                self.end_headers()
                self.wfile.write(stub.content)

            do_GET = do_POST = answer  # noqa: N815 - what the server calls

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def says(self, content: object, status: int = 200, **headers: str) -> None:
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.status, self.headers = status, {name.replace("_", "-"): each for name, each in headers.items()}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def test_a_search_sends_what_is_asked_and_reads_every_field(stub: Stub) -> None:
    stub.says(ANSWER)
    with Client(stub.url + "/", token="a secret of sixteen") as client:
        answer = client.search("a dog", k=20, where="camera = 2", under="s3://bucket", min_score=0.1)
    assert stub.asked == [
        Asked(
            "POST",
            "/search",
            {
                "text": "a dog",
                "k": 20,
                "min_score": 0.1,
                "filters": {"under": "s3://bucket", "where": "camera = 2"},
            },
            "Bearer a secret of sixteen",
            "application/json",
        )
    ]
    box = (0.1, 0.2, 0.3, 0.4)
    found = (Found("a dog", 0.25, 2, box),)
    assert answer.hits == (Hit(HIT["uri"], 0.25, 7, 2, box, found, ("s3://bucket/b.jpg",), 640, None),)
    assert (answer.names, answer.snapshot_id, answer.reason) == (("a dog",), 3, "1 image")
    assert (answer.is_complete, answer.is_exhaustive, answer.seconds) == (False, True, {"total": 0.01})


def test_a_picture_is_sent_as_base64(stub: Stub, tmp_path: Path) -> None:
    stub.says(ANSWER)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8pixels")
    client = Client(stub.url)
    client.search(image=tmp_path / "a.jpg", region=(0, 0, 0.5, 1))
    client.search(image=b"\xff\xd8pixels")
    first, second = (asked.body for asked in stub.asked)
    assert base64.b64decode(first["image"]) == b"\xff\xd8pixels"
    assert (first["region"], first.keys()) == ([0, 0, 0.5, 1], {"image", "region"})
    assert second == {"image": first["image"]}
    assert stub.asked[0].authorization is None


def test_the_other_verbs(stub: Stub) -> None:
    client = Client(stub.url)
    stub.says(ANSWER)
    assert client.similar(7, 2, k=5).hits[0].image_id == 7
    stub.says(b"\xff\xd8")
    assert client.image(7) == client.thumbnail(7, side=128) == b"\xff\xd8"
    assert client.export("coco", "a dog", only=[7], k=5, glob="*.jpg") == b"\xff\xd8"
    stub.says(OBJECTS)
    objects = client.objects(7)
    stub.says({"current": 3, "snapshots": [SNAPSHOT]})
    (snapshot,) = client.snapshots()
    stub.says({"name": "photos"})
    assert client.about() == client.health() == {"name": "photos"}
    assert objects.slots == (Slot(0, (0, 0, 1, 1)), Slot(2, (0, 0, 0.5, 1)))
    assert (objects.width, objects.columns, snapshot.recall) == (4, {"camera": 2}, None)
    assert snapshot.created_at == "2026-01-01T00:00:00Z"
    assert [asked[:2] for asked in stub.asked] == [
        ("GET", "/similar/7/2?k=5"),
        ("GET", "/images/7"),
        ("GET", "/thumbnails/7?side=128"),
        ("POST", "/export"),
        ("GET", "/images/7/objects"),
        ("GET", "/snapshots"),
        ("GET", "/about"),
        ("GET", "/healthz"),
    ]
    asked = {"text": "a dog", "k": 5, "filters": {"glob": "*.jpg"}}
    assert stub.asked[3].body == {"format": "coco", "question": asked, "image_ids": [7]}


def test_a_netrc_of_the_home_does_not_replace_the_token(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    Client(stub.url, token="a secret of sixteen").health()
    Client(stub.url).health()
    assert [asked.authorization for asked in stub.asked] == ["Bearer a secret of sixteen", None]


REFUSALS = {
    "a question that does not parse": (
        (400, {"error": "AND\n needs a name", "code": "question", "position": 6}, {}),
        ("AND needs a name", 400, "question", 6, None),
    ),
    "too many": (
        (429, {"error": "too many requests", "code": "rate", "position": None}, {"Retry_After": "2"}),
        ("too many requests", 429, "rate", None, 2.0),
    ),
    "a proxy's page": (
        (502, b"<html>\n<h1>Bad gateway</h1>" + 999 * b"x", {}),
        ("502 Bad Gateway: <html> <h1>Bad gateway</h1>", 502, "http", None, None),
    ),
    "JSON of others": ((404, ["none"], {}), ('404 Not Found: ["none"]', 404, "http", None, None)),
    "another address": ((307, {}, {"Location": "http://other"}), ("307 Temp", 307, "http", None, None)),
    "no search service": ((200, {"hello": "you"}, {}), ("is no search service's", 200, "http", None, None)),
    "no JSON": ((200, b"hello", {}), ("is no search service's answer: 'hello'", 200, "http", None, None)),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line_with_their_facts(stub: Stub, case: tuple) -> None:
    (status, content, headers), (reason, *facts) = case
    stub.says(content, status, **headers)
    with pytest.raises(ServiceError) as caught:
        Client(stub.url).search("a dog AND")
    error = caught.value
    assert error.reason.startswith(reason)
    assert [error.status, error.code, error.position, error.retry_after] == facts
    assert str(error).startswith(f"{stub.url}/search: ")
    assert "\n" not in str(error)
    assert len(str(error)) < 500
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(stub.asked) == 1


def test_a_service_that_is_not_there_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"^{url}/about: cannot be reached: is the service started"):
            Client(url).about()
        taken.listen()  # takes the connection, and says nothing
        with pytest.raises(ServiceError, match=r"about: no answer within 0.2 s: is it overloaded\?$"):
            Client(url, timeout=0.2).about()
    with pytest.raises(ServiceError, match=r"^nowhere/about: Invalid URL"):
        Client("nowhere").about()
