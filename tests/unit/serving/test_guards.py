"""What stands before the routes, by itself: hosts, rates, bodies, sessions, and headers on all answers."""

from collections.abc import Iterator

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from for_ray.serving import bounds, guards


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def guarded(app: ASGIApp) -> TestClient:
    counted: list[tuple[str, int]] = []
    client = TestClient(guards.Headers(app, lambda *seen: counted.append(seen)), "http://localhost")
    client.counted = counted  # type: ignore[attr-defined]
    return client


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("localhost.", True), ("127.0.0.1", True),
        ("127.8.9.10:80", True), ("[::1]:8000", True), ("[::1]", True), ("10.1.2.3:8000", True),
        ("search.example", True), ("Search.Example:443", True), ("search.example.", True),
        ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("evil.example:localhost", False), ("", False), ("search.example@evil.example", False),
        ("٣.example", False), ("1.2.3", False), ("[::1].evil.example", False),
    ],
)  # fmt: skip
def test_hosts(host: str, is_ours: bool) -> None:
    client = guarded(guards.Hosts(echo, ("search.example",)))
    answer = client.get("/", headers={"Host": host.encode()})
    assert answer.status_code == (200 if is_ours else 421)
    if not is_ours:
        assert answer.json()["code"] == "host"
    assert guarded(guards.Hosts(echo, ("*",))).get("/", headers={"Host": host.encode()}).status_code == 200


def test_a_host_must_be_there_once() -> None:
    for given in ([], [(b"host", b"localhost"), (b"host", b"localhost")]):
        assert status_of(guards.Headers(guards.Hosts(echo, ()), lambda *_: None), headers=given) == 421


def status_of(app: ASGIApp, *, headers: list[tuple[bytes, bytes]], chunks: tuple[bytes, ...] = ()) -> int:
    """The status of a POST with these very headers and parts of a body."""
    parts: Iterator[bytes] = iter(chunks)
    statuses: list[int] = []
    left = [len(chunks)]

    async def receive() -> Message:
        left[0] -= 1
        return {"type": "http.request", "body": next(parts, b""), "more_body": left[0] > 0}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
    anyio.run(app, scope, receive, send)
    return statuses[0]


JSON = (b"content-type", b"application/json")


@pytest.mark.parametrize(
    ("headers", "chunks", "status"),
    [
        ([(b"content-length", b"10")], (b"x" * 10,), 200),
        ([(b"content-length", b"11")], (b"x" * 11,), 413),
        ([(b"content-length", b"11")], (), 413),  # before anything is read
        ([], (b"x" * 4, b"x" * 4, b"x" * 2), 200),
        ([], (b"x" * 4, b"x" * 4, b"x" * 3), 413),  # without a length, as it comes in
        ([(b"content-length", b"3")], (b"x" * 11,), 413),  # with a wrong one
        ([(b"content-length", b"1" + b"0" * 5000)], (), 413),
        ([(b"content-length", b"-1")], (), 413),
        ([(b"content-length", "٣".encode())], (), 413),
    ],
)
def test_bodies_are_counted(
    headers: list[tuple[bytes, bytes]], chunks: tuple[bytes, ...], status: int
) -> None:
    app = guards.Headers(bounds.Bodies(echo, 10), lambda *_: None)
    assert status_of(app, headers=[JSON, *headers], chunks=chunks) == status


def test_a_body_that_is_too_long_is_not_read_on() -> None:
    read: list[bytes] = []

    def endless() -> Iterator[bytes]:
        while True:
            read.append(b"x")
            yield b"x" * 4

    app = guards.Headers(bounds.Bodies(echo, 10), lambda *_: None)
    parts = endless()

    async def receive() -> Message:
        return {"type": "http.request", "body": next(parts), "more_body": True}

    async def send(message: Message) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [JSON], "query_string": b""}
    anyio.run(app, scope, receive, send)
    assert len(read) == 3


def test_bodies_that_are_held_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BODIES_HELD", 2)
    monkeypatch.setattr(bounds, "SMALL_BYTES", 9)
    inner: list[int] = []

    async def nested(scope: Scope, receive: Receive, send: Send) -> None:
        """Holds its body while another request comes in, as often as there is room."""
        body = await Request(scope, receive).body()
        if len(inner) < 4:
            inner.append(await answer_of(app, b"x" * len(body)))
        await PlainTextResponse("held")(scope, receive, send)

    app = guards.Headers(bounds.Bodies(nested, 10), lambda *_: None)
    statuses = [anyio.run(answer_of, app, b"x" * 10) for _ in range(2)]
    assert inner == [503, 200] * 2  # the third does not fit; all is given back when they end
    assert statuses == [200, 200]


def test_small_bodies_pass_while_large_ones_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BODIES_HELD", 1)
    inner: list[int] = []

    async def nested(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if len(body) > bounds.SMALL_BYTES and not inner:
            inner.append(await answer_of(app, b"x" * bounds.SMALL_BYTES))
            inner.append(await answer_of(app, b"x" * (bounds.SMALL_BYTES + 1)))
        await PlainTextResponse("held")(scope, receive, send)

    app = guards.Headers(bounds.Bodies(nested, 100_000), lambda *_: None)
    assert anyio.run(answer_of, app, b"x" * 100_000) == 200
    assert inner == [200, 503]


@pytest.mark.parametrize(("size", "status"), [(bounds.STRANGER_BYTES, 200), (bounds.STRANGER_BYTES + 1, 413)])
@pytest.mark.parametrize("has_length", [True, False])
def test_who_does_not_know_the_token_sends_little(size: int, status: int, has_length: bool) -> None:
    app = guards.Tokens(bounds.Bodies(echo, 100_000), TOKEN)
    content = b"x" * size if has_length else iter([b"x" * (size - 1), b"x"])
    answer = guarded(app).post("/session", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    known = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    assert guarded(app).post("/session", content=b"x" * size, headers=known).status_code == 200


async def answer_of(app: ASGIApp, body: bytes) -> int:
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [JSON], "query_string": b""}
    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("", 415), ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415),
    ],
)  # fmt: skip
def test_other_sites_cannot_post(kind: str, status: int) -> None:
    client = guarded(bounds.Bodies(echo, 10))
    assert client.post("/", content=b"{}", headers={"Content-Type": kind}).status_code == status


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_refill_and_are_of_each_address() -> None:
    clock = Clock()
    rates = bounds.Rates(echo, 2.0, clock)  # 8 at once
    assert [rates.wait("a", 1.0) for _ in range(8)] == [0.0] * 8
    assert rates.wait("a", 1.0) == pytest.approx(0.5)
    assert rates.wait("b", 1.0) == 0.0
    clock.now = 0.5
    assert rates.wait("a", 1.0) == 0.0
    assert rates.wait("a", 1.0) == pytest.approx(0.5)
    clock.now = 1000.0
    assert [rates.wait("a", 1.0) for _ in range(8)] == [0.0] * 8  # no more than 8 gather
    assert rates.wait("a", 1.0) > 0


def test_addresses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "ADDRESSES_KEPT", 3)
    rates = bounds.Rates(echo, 1.0, Clock())
    for address in "abcdea":
        rates.wait(address, 1.0)
    assert list(rates._levels) == ["d", "e", "a"]


def test_rates_over_http() -> None:
    def client(address: str) -> TestClient:
        return TestClient(app, "http://localhost", client=(address, 1))

    app = guards.Headers(bounds.Rates(echo, 0.5, Clock()), lambda *_: None)  # 2 at once
    assert [client("1.2.3.4").get("/search").status_code for _ in range(3)] == [200, 200, 429]
    refused = client("1.2.3.4").get("/search")
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("rate", "2")
    assert client("1.2.3.4").get("/healthz").status_code == 200
    assert client("1.2.3.4").get("/page/api.js").status_code == 200
    assert client("1.2.3.5").get("/search").status_code == 200
    assert [client("1.2.3.6").get("/thumbnails/1").status_code for _ in range(21)] == [200] * 20 + [429]
    # Of IPv6, a client has as many addresses as it likes below one /64.
    assert [client(f"2001:db8::{n}").get("/search").status_code for n in range(1, 4)] == [200, 200, 429]
    assert client("2001:db8:0:1::1").get("/search").status_code == 200
    free = guards.Headers(bounds.Rates(echo, 0.0, Clock()), lambda *_: None)
    assert {TestClient(free, "http://localhost").get("/search").status_code for _ in range(50)} == {200}


TOKEN = "a token of many letters"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"Authorization": f"bearer  {TOKEN} "}, 200),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer ü".encode()}, 401),
        ({}, 401),
        ({"Cookie": f"{guards.COOKIE}={guards.session_of(TOKEN)}"}, 200),
        ({"Cookie": f"a=b; {guards.COOKIE}={guards.session_of(TOKEN)}; c=d"}, 200),
        ({"Cookie": f'x={{"a": 1}}; é[]=,"; {guards.COOKIE}={guards.session_of(TOKEN)}; b'.encode()}, 200),
        ({"Cookie": f"{guards.COOKIE}={TOKEN}"}, 401),  # the cookie is not the token
        ({"Cookie": f"{guards.COOKIE}={guards.session_of('another')}"}, 401),
        ({"Cookie": f"{guards.COOKIE}="}, 401),
        ({"Cookie": "[]=;;;\"=x"}, 401),
    ],
)  # fmt: skip
def test_tokens(headers: dict[str, str | bytes], status: int) -> None:
    client = guarded(guards.Tokens(echo, TOKEN))
    answer = client.get("/search", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == status
    assert guarded(guards.Tokens(echo, None)).get("/search", headers=headers).status_code == 200  # type: ignore[arg-type]


def test_sessions_do_not_tell_the_token() -> None:
    session = guards.session_of(TOKEN)
    assert TOKEN not in session
    assert session.partition(".")[2] != guards.session_of(TOKEN + "x").partition(".")[2]


def test_sessions_end() -> None:
    session = guards.session_of(TOKEN, now=lambda: 1000.9)
    end = 1000 + guards.SESSION_SECONDS
    assert guards.is_session(session, TOKEN, now=lambda: end - 0.5)
    assert not guards.is_session(session, TOKEN, now=lambda: end)
    assert not guards.is_session(session, TOKEN + "x", now=lambda: 1000)
    proof = session.partition(".")[2]
    others = (
        f"{end + 1}.{proof}",
        f"{end}",
        f"{end}.",
        f"-1.{proof}",
        f"{'9' * 5000}.{proof}",
        f"{end}.é",
        "",
    )
    for other in others:
        assert not guards.is_session(other, TOKEN, now=lambda: 1000), other[:50]
    assert (
        guarded(guards.Tokens(echo, TOKEN))
        .get("/search", headers={"Cookie": f"{guards.COOKIE}={session}"})
        .status_code
        == 401
    )  # it ended in 1970


@pytest.mark.parametrize("fails", [ValueError("secret"), RecursionError()])
def test_what_fails_is_answered_and_counted(fails: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise fails

    caplog.set_level("ERROR", logger="for_ray.serving.guards")  # whatever others have set above it
    client = guarded(failing)
    answer = client.get("/search")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert client.counted == [("other", 500)]  # type: ignore[attr-defined]
    assert caplog.records[0].exc_info is not None
    for name, value in guards.SAFE_HEADERS.items():
        assert answer.headers[name] == value


def test_what_fails_after_the_head_was_sent_is_counted_as_sent() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("in the middle")

    counted: list[tuple[str, int]] = []
    assert status_of(guards.Headers(failing, lambda *seen: counted.append(seen)), headers=[]) == 200
    assert counted == [("other", 200)]


def test_headers_of_an_answer_stay_but_the_safe_ones() -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Cache-Control": "private", "Content-Security-Policy": "default-src *", "X-Own": "1"}
        await Response(b"", headers=headers)(scope, receive, send)

    answer = guarded(own).get("/")
    assert answer.headers["content-security-policy"] == guards.POLICY
    assert (answer.headers["cache-control"], answer.headers["x-own"]) == ("private", "1")
    assert guarded(echo).get("/").headers["cache-control"] == "no-store"


def test_there_are_no_websockets() -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), guarded(echo).websocket_connect("/search"):
        pass
