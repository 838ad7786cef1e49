"""How much clients may ask for: ASGI middlewares that bound the rate of requests and the size of bodies."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from for_ray.serving.guards import KNOWN
from for_ray.serving.refusals import Refusal

ADDRESSES_KEPT = 10_000
"""Client addresses whose rate is known, the last seen ones."""

BURST_SECONDS = 4.0
"""Requests that may come at once, in seconds' worth of the rate."""

PICTURE_COST = 0.1
"""Of a thumbnail or an image, where a question costs 1: a page of hits has a hundred of them."""

BODIES_HELD = 16
"""Bodies of the largest size that may be held in memory at once; smaller ones accordingly more."""

SMALL_BYTES = 65_536
"""Of a body that passes however many are held: large ones that come in slowly must not hold up questions."""

STRANGER_BYTES = 4_096
"""Of a body whose client doesn't know the token: it has one to say, and no more."""

_PICTURES = ("/thumbnails/", "/images/")
_UNMETERED = frozenset({"/", "/healthz", "/metrics"})


class Rates:
    """A bucket of tokens for each client address; those that were not seen the longest are forgotten.

    Args:
        app: What is guarded.
        per_second: Requests of one address, on average; 0 for as many as come.
        clock: Seconds.
    """

    def __init__(self, app: ASGIApp, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._per_second = per_second
        self._most = max(per_second * BURST_SECONDS, 1.0)
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and self._per_second and not _is_unmetered(scope["path"]):
            cost = PICTURE_COST if scope["path"].startswith(_PICTURES) else 1.0
            wait = self.wait(_address(scope), cost)
            if wait > 0:
                reason = f"more than {self._per_second:g} requests a second: wait a moment"
                raise Refusal(429, "rate", reason, retry_after=max(1, round(wait + 0.5)))
        await self._app(scope, receive, send)

    def wait(self, address: str, cost: float) -> float:
        """Seconds until a request of this cost is let through; 0 where it is now, and paid for."""
        now = self._clock()
        with self._lock:
            level, seen = self._levels.pop(address, (self._most, now))
            level = min(level + (now - seen) * self._per_second, self._most)
            is_let_through = level >= cost - 1e-9  # ten tenths are one
            self._levels[address] = (level - cost if is_let_through else level, now)
            while len(self._levels) > ADDRESSES_KEPT:
                self._levels.popitem(last=False)
        return 0.0 if is_let_through else (cost - level) / self._per_second


class Bodies:
    """Bodies that are JSON and not too large; their bytes are counted as they come in.

    Args:
        app: What is guarded.
        max_bytes: Of one body; all that are held at once have `BODIES_HELD` times as many.
            Clients that don't know the token have `STRANGER_BYTES`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held_bytes = 0  # of all requests; one event loop runs them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_bytes if scope.get(KNOWN, True) else min(STRANGER_BYTES, self._max_bytes)
        self._check_head(scope["method"], Headers(scope=scope), max_bytes)
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                num_bytes, self._held_bytes = num_bytes + size, self._held_bytes + size
                self._check_size(num_bytes, max_bytes)
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._held_bytes -= num_bytes

    def _check_head(self, method: str, headers: Headers, max_bytes: int) -> None:
        if method == "POST" and _media_type(headers) != "application/json":
            # A page of another site can send forms and plain text without asking, and JSON it can't.
            raise Refusal(415, "request", "send the body as content-type application/json")
        declared = headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > max_bytes:
            raise self._too_large(max_bytes)

    def _check_size(self, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise self._too_large(max_bytes)
        if num_bytes > SMALL_BYTES and self._held_bytes > BODIES_HELD * self._max_bytes:
            raise Refusal(503, "busy", "too many pictures come in: ask again in a moment", retry_after=1)

    def _too_large(self, max_bytes: int) -> Refusal:
        if max_bytes < self._max_bytes:
            return Refusal(413, "too_large", f"without the token, a request has at most {max_bytes:,} bytes")
        most = f"{max_bytes / 1e6:g} MB"
        return Refusal(413, "too_large", f"a request has at most {most}: send a smaller picture")


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_unmetered(path: str) -> bool:
    return path in _UNMETERED or path.startswith("/page/")


def _address(scope: Scope) -> str:
    """The client's address; of IPv6 the first half, since a client has all of the other."""
    client = scope.get("client")
    host = str(client[0]) if client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
