"""A bad network between the clients and an S3 server: a proxy that breaks a seeded part of the requests.

The `Host` header stays as the client signed it. Nothing is kept between two runs but the seed: which requests
are broken depends on their order, how they are broken goes round, so that few faults show every kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from tests.seaweed import S3Server, environment

KINDS = ("503 SlowDown", "reset", "lost", "late", "cut", "cut short", "hold", "slow")
"""How a request is broken.

    503 SlowDown   the store asks to slow down; so does any other "STATUS CODE" answer so
    reset          RST before an answer; the server never saw the request
    lost           the server did what was asked, but RST comes instead of its answer
    cut            half of the answer's body, then RST
    cut short      half of the answer's body, then the connection ends as if that were all
    hold           no answer for `hold_seconds`, then RST
    late           RST comes instead of an answer, and a moment later the server does what was asked
    slow           the answer's body comes in dribbles, over `slow_seconds`
"""

_OF_BODIES = ("cut", "cut short", "slow")


class Proxy:
    """A listener on loopback that hands requests on; `plan` says for each how it is broken, or None."""

    def __init__(self, upstream: str, plan: Callable[[str, str], str | None]) -> None:
        self.upstream = urlsplit(upstream)
        self.plan = plan
        self.hold_seconds = 2.0
        self.slow_seconds = 0.5
        self.before_landing: Callable[[], object] = lambda: time.sleep(0.1)
        """What a late request waits for."""
        self.num_landed = 0
        """Late requests that have been handed on by now."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, target, and how it was broken, or "" where it was not."""
        self._connections: set[socket.socket] = set()
        self._server: _Listener | None = None
        self._port = 0

    @property
    def endpoint(self) -> str:
        """Where the clients find it; the same after an outage."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def injected(self) -> Counter[str]:
        """How often each kind was injected."""
        return Counter(kind for _, _, kind in self.requests if kind)

    def start(self) -> None:
        """Answer."""
        self._server = _Listener(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Be away: connections are reset, new ones refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for one in list(self._connections):
            reset(one)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """An outage for the length of the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, *_: object) -> None:
        """A client that went away is its own affair."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None
        self.server.proxy._connections.add(self.connection)

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        self.server.proxy._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        proxy = self.server.proxy
        assert "chunked" not in self.headers.get("Transfer-Encoding", "")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = self.raw_requestline.split()[1].decode("ascii")  # unlike `path`, with all its slashes
        kind = proxy.plan(self.command, target) or ""
        proxy.requests.append((self.command, target, kind))
        if kind[:1].isdigit():
            self._refuse(kind)
        elif kind in ("reset", "hold"):
            time.sleep(proxy.hold_seconds if kind == "hold" else 0)
            self._reset()
        else:
            if kind == "late":
                self._reset()
                proxy.before_landing()
            status, headers, body = self._forward(target, content)
            if kind == "late":
                proxy.num_landed += 1
            elif kind == "lost":
                self._reset()
            else:
                self._answer(status, headers, body, kind)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def _forward(self, target: str, content: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._upstream is None:
            host, port = self.server.proxy.upstream.hostname, self.server.proxy.upstream.port
            self._upstream = http.client.HTTPConnection(str(host), port)
        self._upstream.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                self._upstream.putheader(name, value)
        self._upstream.endheaders(content)
        answer = self._upstream.getresponse()
        body = answer.read()
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "content-length")
        ]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        if answer.status not in (204, 304):
            headers.append(("Content-Length", length or "0"))
        return answer.status, headers, body

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, kind: str) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if kind in ("cut", "cut short"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if kind == "cut":
                self._reset()
        elif kind == "slow":
            step = -(-len(body) // 10)
            for start in range(0, len(body), step):
                time.sleep(self.server.proxy.slow_seconds / 10)
                self.wfile.write(body[start : start + step])
        else:
            self.wfile.write(body)

    def _refuse(self, kind: str) -> None:
        status, _, code = kind.partition(" ")
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        body = b"" if self.command == "HEAD" else body
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._answer(int(status), headers, body, "")

    def _reset(self) -> None:
        self.close_connection = True
        self.rfile.close()
        reset(self.connection)

    def log_message(self, *_: object) -> None:
        pass


def reset(connection: socket.socket) -> None:
    """Close so that the other side gets RST, not the end of a stream."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def at_random(rate: float, *, seed: int, kinds: tuple[str, ...] = KINDS) -> Callable[[str, str], str | None]:
    """A plan that breaks this part of all requests, kind after kind; what has no body is not cut or slow."""
    chance, waiting, lock = random.Random(seed), list(kinds), threading.Lock()

    def plan(method: str, target: str) -> str | None:
        with lock:
            if chance.random() >= rate:
                return None
            fit = [kind for kind in waiting if method == "GET" or kind not in _OF_BODIES]
            fit = fit or [kind for kind in kinds if kind not in _OF_BODIES]
            if fit[0] in waiting:
                waiting.remove(fit[0])
            if not waiting:
                waiting.extend(kinds)
            return fit[0]

    return plan


@contextlib.contextmanager
def bad_network(
    server: S3Server, plan: Callable[[str, str], str | None] = lambda method, target: None
) -> Iterator[Proxy]:
    """Run a proxy before the server for the length of the block, and point this process at it."""
    proxy = Proxy(server.endpoint, plan)
    proxy.start()
    try:
        with environment(dataclasses.replace(server, endpoint=proxy.endpoint)):
            yield proxy
    finally:
        proxy.stop()
