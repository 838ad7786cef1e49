"""What a client must not be able to do, tried on the whole application."""

import io
import json
import struct
import tracemalloc
import zlib
from base64 import b64encode
from typing import Any

import pytest
from fastapi.routing import APIRoute
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from for_ray.serving import guards
from for_ray.serving.app import make_app
from tests.unit.serving.conftest import EVIL, TOKEN, Served

OPEN = {("GET", "/"), ("GET", "/page/{name}"), ("GET", "/healthz"), ("POST", "/session")}
"""Routes that need no token; all others do."""

JSON = {"Content-Type": "application/json"}


def routes(served: Served) -> list[tuple[str, str]]:
    """Method and path of all routes that the application has."""
    from dataclasses import replace

    app = make_app(replace(served.service, token=TOKEN))
    found: list[tuple[str, str]] = []
    stack: list[Any] = list(app.routes)
    while stack:
        route = stack.pop()
        inner = getattr(route, "original_router", None)
        if inner is not None:
            stack += inner.routes
        elif isinstance(route, APIRoute | Route):
            found += [(method, route.path) for method in sorted(route.methods or ()) if method != "HEAD"]
        else:
            raise AssertionError(f"a route of another kind: {route!r}")
    return found


def filled(path: str) -> str:
    for name, value in (("image_id", "0"), ("slot", "0"), ("name", "api.js")):
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path
    return path


def test_every_route_but_the_open_ones_needs_the_token(served: Served) -> None:
    client = served.client(token=TOKEN)
    found = routes(served)
    assert len(found) >= 14
    assert set(found) >= OPEN
    for method, path in found:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"{guards.COOKIE}=wrong"}):
            answer = client.request(method, filled(path), headers={**JSON, **headers}, content=b"")
            is_refused = answer.status_code == 401 and answer.json()["code"] == "token"
            is_open = (method, path) in OPEN
            assert is_refused != is_open, (method, path, answer.text)
        right = client.request(
            method, filled(path), headers={**JSON, "Authorization": f"Bearer {TOKEN}"}, content=b""
        )
        assert right.status_code != 401, (method, path)
    # Neither another method nor another writing of a path is a way around.
    others = (("HEAD", "/about"), ("GET", "/about/"), ("GET", "/page/%2e%2e/about"), ("PUT", "/session"))
    for method, path in (*others, ("GET", "http://localhost//about"), ("GET", "/ABOUT")):
        assert client.request(method, path, headers=JSON).status_code in {401, 404}, path


def test_a_session_is_a_cookie_for_the_token(served: Served) -> None:
    client = served.client(token=TOKEN)
    wrong = client.post("/session", json={"token": "wrong"})
    assert (wrong.status_code, wrong.json()["code"]) == (401, "token")
    assert "set-cookie" not in wrong.headers
    assert client.get("/about").status_code == 401
    signed_in = client.post("/session", json={"token": TOKEN})
    assert signed_in.status_code == 204
    cookie = signed_in.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={guards.SESSION_SECONDS}"):
        assert part in cookie
    assert TOKEN not in cookie
    assert client.get("/about").status_code == 200
    assert client.get("/thumbnails/0").status_code == 200
    signed_out = client.delete("/session")
    assert (signed_out.status_code, signed_out.headers["clear-site-data"]) == (204, '"cache"')
    assert client.get("/about").status_code == 401


@pytest.mark.parametrize(
    ("forwarded", "is_secure"), [(None, False), ("http", False), ("https", True), ("HTTPS, http", True)]
)
def test_a_cookie_that_came_through_tls_is_secure(
    served: Served, forwarded: str | None, is_secure: bool
) -> None:
    headers = {} if forwarded is None else {"X-Forwarded-Proto": forwarded}
    signed_in = served.client(token=TOKEN).post("/session", json={"token": TOKEN}, headers=headers)
    assert ("Secure" in signed_in.headers["set-cookie"]) == is_secure


def test_who_does_not_know_the_token_is_told_why_much_is_refused(served: Served) -> None:
    refused = served.client(token=TOKEN).post("/session", json={"token": "x" * 5000})
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert refused.json()["error"] == "without the token, a request has at most 4,096 bytes"


def test_why_a_refresh_failed_is_told_to_those_who_know_the_token(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.client(token=TOKEN)
    monkeypatch.setattr(served.service.current, "stale", "s3://secret/place is away")
    assert "secret" not in client.get("/healthz").text
    assert client.get("/healthz").json()["stale"].startswith("the last refresh failed")
    known = client.get("/healthz", headers={"Authorization": f"Bearer {TOKEN}"})
    assert known.json()["stale"] == "s3://secret/place is away"


def test_every_answer_has_the_safe_headers(client: TestClient) -> None:
    answers = [
        client.get("/"), client.get("/page/api.js"), client.get("/images/0"), client.get("/thumbnails/0"),
        client.get("/nothing"), client.get("/search"), client.post("/search", json={"text": "a dog"}),
        client.post("/search", json={"text": "("}), client.post("/search", content=b"{", headers=JSON),
        client.post("/search", content=b"{}"), client.get("/metrics"), client.get("/images/99"),
        client.get("/about", headers={"Host": "evil.example"}),
        client.post("/export", json={"format": "csv", "question": {"text": "a dog"}}),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 405, 415, 421}
    for answer in answers:
        for name, value in guards.SAFE_HEADERS.items():
            assert answer.headers[name] == value, answer.url
    assert "unsafe" not in guards.POLICY


def test_markup_in_uris_and_questions_comes_back_as_json(client: TestClient) -> None:
    script = "</script><script>alert(1)</script>"
    hit = client.post("/search", json={"text": "a dog", "filters": {"image_ids": [3]}}).json()["hits"][0]
    assert hit["uri"].endswith(EVIL)
    answers = [
        client.post("/search", json={"text": "a dog", "filters": {"image_ids": [3]}}),
        client.post("/search", json={"text": script}),
        client.post("/search", json={"text": f"({script}"}),
        client.post("/search", json={script: 1}),
        client.post("/search", json={"text": "a", "filters": {"where": script}}),
        client.post("/search", json={"text": "a", "like": None, "page": script}),
        client.get(f"/{script}"),
        client.get("/images/3/objects"),
        client.get("/thumbnails/0", params={"side": script}),
        client.post("/export", json={"format": script, "question": {"text": script}}),
    ]
    for answer in answers:
        assert answer.headers["content-type"] == "application/json", answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "\n" not in answer.text
        json.loads(answer.text)


@pytest.mark.parametrize(
    "image_id",
    [
        "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "-1", "%2D1", "1.5", "1e3",
        "0x1", "1_0", "+1", "%201", "1%20", "1%00", "٣", "²", "nan", "true", "0/../../about",
        "file:%2f%2f%2fetc%2fpasswd", "s3:%2f%2fbucket%2fx", "http:%2f%2fevil.example", "1;ls",
        "1' or '1'='1", "%EF%BC%91", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/images/{}", "/thumbnails/{}", "/images/{}/objects", "/similar/{}/0"])
def test_ids_are_numbers_and_nothing_else(client: TestClient, route: str, image_id: str) -> None:
    answer = client.get(route.format(image_id))
    if str(answer.url).endswith("/about"):  # the client itself takes .. away
        return
    assert answer.status_code in {400, 404}
    assert answer.json()["code"] in {"request", "not_found"}
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "image_id", [str(2**55), str(2**63), str(2**64), "9" * 17, "9" * 18, "9" * 5000, "0" * 5000 + "1"]
)
def test_ids_may_be_as_large_as_they_like(client: TestClient, image_id: str) -> None:
    for route in ("/images/{}", "/thumbnails/{}", "/images/{}/objects", "/similar/{}/0", "/similar/0/{}"):
        answer = client.get(route.format(image_id))
        assert answer.status_code in {400, 404}, route
        assert answer.json()["code"] in {"request", "not_found"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the body"), (b"{", "no JSON: Expecting property name"),
        (b"null", ""), (b"[]", ""), (b'"text"', ""), (b"1", ""),
        (b"\xff\xfe", ""), (b'{"text": "a"} x', "JSON"), (b'{"text": 1}', "text"),
        (b'{"text": ["a"]}', "text"), (b'{"text": "a", "k": 0}', "k"), (b'{"text": "a", "k": 1001}', "k"),
        (b'{"text": "a", "k": -1}', "k"), (b'{"text": "a", "k": "5"}', "k"),
        (b'{"text": "a", "k": true}', "k"), (b'{"text": "a", "k": 1.5}', "k"),
        (b'{"text": "a", "k": NaN}', "k"), (b'{"text": "a", "k": 1e999}', "k"),
        (b'{"text": "a", "k": 1' + b"0" * 5000 + b"}", ""),
        (b'{"text": "a", "min_score": NaN}', "min_score"),
        (b'{"text": "a", "min_score": Infinity}', "min_score"),
        (b'{"text": "a", "min_score": -1e999}', "min_score"),
        (b'{"text": "a", "min_score": "0.5"}', "min_score"), (b'{"text": "a", "fold_at": 2}', "fold_at"),
        (b'{"text": "a", "unwanted_above": -2}', "unwanted_above"), (b'{"text": "a", "other": 1}', "other"),
        (b'{"text": "a", "filters": {"sql": "x"}}', "filters.sql"),
        (b'{"text": "a", "filters": []}', "filters"),
        (b'{"text": "a", "filters": {"image_ids": [-1]}}', "image_ids"),
        (b'{"text": "a", "filters": {"image_ids": [1.5]}}', "image_ids"),
        (b'{"text": "a", "filters": {"image_ids": [36028797018963968]}}', "image_ids"),
        (b'{"text": "a", "filters": {"where": ""}}', "where"), (b'{"text": "a\\u0000b"}', "text"),
        (b'{"text": "\\ud800"}', "text"), (b'{"text": "a", "filters": {"under": "\\udfff"}}', "under"),
        (b'{"text": "a", "region": [0, 0, 1, 1]}', "region"),
        (b'{"text": "a", "like": "0"}', "one of them"),
        (b'{"image": "QUJD", "region": [0, 0, 1]}', "region"),
        (b'{"image": "QUJD", "region": [0, 0, NaN, 1]}', "region"),
        (b'{"image": "QUJD", "region": [0.5, 0, 0.5, 1]}', "region"),
        (b'{"like": "../../etc/passwd"}', "no object"), (b'{"like": "0:0:0"}', "no object"),
        (b'{"like": "-1"}', "no object"), (b'{"like": "\xd9\xa1"}', "no object"),
        (b'{"page": "x", "text": "a"}', "no token"), (b"{}", "give one of them"), (b"[" * 100_000, ""),
        (b'{"text": ' + b'{"a":' * 50_000, ""),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused(client: TestClient, content: bytes, words: str) -> None:
    answer = client.post("/search", content=content, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in {"request", "question"}
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_long_questions_are_refused(client: TestClient) -> None:
    answer = client.post("/search", json={"text": "a " * 5000})
    assert (answer.status_code, answer.json()["code"], answer.json()["position"]) == (400, "question", 1000)
    for filters in ({"where": "a" * 10_001}, {"glob": "*" * 10_001}, {"under": "/" * 10_001}):
        assert client.post("/search", json={"text": "a", "filters": filters}).status_code == 400
    too_many = {"text": "a", "filters": {"image_ids": list(range(100_001))}}
    assert client.post("/search", json=too_many).status_code == 400
    assert client.post("/search", json={"text": "a", "filters": {"where": "(" * 9000}}).status_code == 400
    assert (
        client.post("/search", json={"text": "a", "filters": {"where": "repeat(uri, 9)='a'"}}).status_code
        == 400
    )


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("||".join(["uri"] * 1900) + " = 'x'", "'|' outside"),
        ("width" + "+1" * 4000 + " > 0", "more than 200"),
        ("width = ?", "'?' outside"),
        ("width = :x", "':' outside"),
    ],
    ids=["long", "deep", "placeholder", "name"],
)
@pytest.mark.parametrize("route", ["/search", "/export"])
def test_filters_that_would_fill_the_memory_or_end_the_planner_are_refused(
    client: TestClient, route: str, where: str, words: str
) -> None:
    question = {"text": "a", "filters": {"where": where}}
    body = question if route == "/search" else {"format": "csv", "question": question}
    answer = client.post(route, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "request")
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_large_bodies_are_refused(served: Served) -> None:
    client = served.client(max_body_bytes=10_000)
    body = json.dumps({"image": "A" * 10_000}).encode()
    with_length = client.post("/search", content=body, headers=JSON)
    assert (with_length.status_code, with_length.json()["code"]) == (413, "too_large")
    chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
    without = client.post("/search", content=chunks, headers=JSON)
    assert "content-length" not in without.request.headers
    assert (without.status_code, without.json()["code"]) == (413, "too_large")
    assert client.post("/search", content=b'{"text":"a"}', headers=JSON).status_code == 200


@pytest.mark.parametrize("image", ["", "!", "QUJ", "QUJD\n", "data:image/png;base64,QUJD", "QUJD" * 5, "Ü"])
def test_images_that_are_none_are_refused(client: TestClient, image: str) -> None:
    answer = client.post("/search", json={"image": image})
    assert (answer.status_code, answer.json()["code"]) == (400, "request")


def png_of(side: int) -> bytes:
    """A PNG that says it has side × side pixels, all of one colour: a thousandth of its pixels' bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 5_001], ids=["300 MB", "75 MB"])
def test_decompression_bombs_are_refused_by_their_header(client: TestClient, side: int) -> None:
    bomb = png_of(side)
    assert len(bomb) < 500_000
    tracemalloc.start()
    answer = client.post("/search", json={"image": b64encode(bomb).decode()})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (answer.status_code, answer.json()["code"]) == (400, "request")
    assert f"too many pixels: {side}×{side}, at most 25000000" in answer.json()["error"]
    assert most < 20_000_000


def test_broken_pictures_are_refused(client: TestClient) -> None:
    written = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(written, "JPEG")
    whole = written.getvalue()
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for content in (whole[: len(whole) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n", svg, b"%PDF-1.7", bytes(1000)):
        answer = client.post("/search", json={"image": b64encode(content).decode()})
        assert (answer.status_code, answer.json()["code"]) == (400, "request")
        assert "can't be decoded" in answer.json()["error"]


def test_no_request_opens_a_file_or_url(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    """Whatever a body says: only the index's own images are read."""
    from for_ray import storage

    read: list[str] = []
    read_image, read_bytes = storage.read_image, storage.read_bytes
    monkeypatch.setattr(storage, "read_image", lambda uri, etag: read.append(uri) or read_image(uri, etag))
    monkeypatch.setattr(
        storage, "read_bytes", lambda uri, **what: read.append(uri) or read_bytes(uri, **what)
    )
    for body in (
        {"text": "/etc/passwd"}, {"text": "a", "filters": {"under": "/etc"}}, {"image": "/etc/passwd"},
        {"text": "a", "filters": {"under": "s3://bucket/x"}}, {"image": "http://evil.example/x.png"},
        {"like": "/etc/passwd"}, {"text": "file:///etc/passwd"}, {"like": "0", "region": (0, 0, 1, 1)},
    ):  # fmt: skip
        client.post("/search", json=body)
    assert read == []
    client.get("/images/0")
    assert read == [str(served.folder / "0.jpg")]


def test_addresses_have_a_rate(served: Served) -> None:
    client = served.client(requests_per_second=1.0)
    statuses = [client.get("/about").status_code for _ in range(10)]
    assert statuses[:4] == [200] * 4
    assert statuses[-1] == 429
    assert client.get("/about").headers["retry-after"]
    assert client.get("/healthz").status_code == 200


def test_names_of_others_are_refused(served: Served) -> None:
    client = served.client(hosts=("search.example",))
    assert client.get("/about", headers={"Host": "search.example:8000"}).status_code == 200
    for path in ("/", "/about", "/healthz", "/page/api.js"):
        refused = client.get(path, headers={"Host": "evil.example"})
        assert (refused.status_code, refused.json()["code"]) == (421, "host")


def test_nothing_lets_other_sites_read(client: TestClient) -> None:
    origin = {"Origin": "http://evil.example"}
    answer = client.post("/search", json={"text": "a dog"}, headers=origin)
    assert not any(name.startswith("access-control") for name in answer.headers)
    preflight = client.options("/search", headers={**origin, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)
