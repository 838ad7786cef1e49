"""What stands between a client and the routes: ASGI middlewares that know nothing of the index.

From outside to inside: `Headers`, what every answer carries, errors too; `Hosts` against names that others
bound to this machine (DNS rebinding); `Rates` per client address; `Tokens`; `Bodies`, whose bytes are counted
as they come in.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers as HeaderMap
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from for_ray.serving.refusals import Refusal

_LOG = logging.getLogger(__name__)

COOKIE = "for_ray_session"

KNOWN = "for_ray.is_known"
"""In a request's scope: whether its client knows the token, on the routes that need none too."""

ADDRESSES_KEPT = 10_000
"""Client addresses whose rate is known, the last seen ones."""

BURST_SECONDS = 4.0
"""Requests that may come at once, in seconds' worth of the rate."""

PICTURE_COST = 0.1
"""Of a thumbnail or an image, where a question costs 1: a page of hits has a hundred of them."""

BODIES_HELD = 16
"""Bodies of the largest size that may be held in memory at once; smaller ones accordingly more."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

SAFE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:/@]+))(?::[0-9]+)?")

_PICTURES = ("/thumbnails/", "/images/")
_PAGE = "/page/"
_UNMETERED = frozenset({"/", "/healthz", "/metrics"})


def is_open(method: str, path: str) -> bool:
    """Whether a route needs no token: the page, which holds no one's data, health, and the way to sign in."""
    return path in {"/", "/healthz"} or path.startswith(_PAGE) or (path == "/session" and method == "POST")


class Headers:
    """Safe headers on every answer; what no one caught is logged, and answered in one line.

    Args:
        app: What is guarded.
        count: Called with the route and the status of each request.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there are none here
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        statuses: list[int] = []

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in SAFE_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, send_safely)
        except Refusal as refusal:  # of a middleware, or while a body came in
            if not statuses:
                await refusal.response()(scope, receive, send_safely)
        except Exception:  # noqa: BLE001 - it is logged and answered; the next request is another
            _LOG.exception("%s %.200r failed", scope["method"], scope["path"])
            if not statuses:
                internal = Refusal(500, "internal", "the service failed: its log says why")
                await internal.response()(scope, receive, send_safely)
        route = getattr(scope.get("route"), "path", "other")
        self._count(route, statuses[0] if statuses else 500)


class Hosts:
    """Only requests to a name of ours: loopback's, an address, or one of `hosts`; `*` among them for any.

    A page of another site can have its own name point to this machine, and would then be of the same origin.
    An address can't be made to point elsewhere.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower().strip("[]").rstrip(".") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and "*" not in self._hosts:
            given = HeaderMap(scope=scope).getlist("host")
            if len(given) != 1 or not self._is_ours(given[0]):
                found = f"the service is not known as {given[0][:100]!r}" if given else "a Host is needed"
                raise Refusal(421, "host", f"{found}: use its address, or start it with --allow-host")
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        if name == "localhost" or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


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


class Tokens:
    """Only clients that know the token, or have a session's cookie; None lets everybody in."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            scope[KNOWN] = self._is_known(HeaderMap(scope=scope))
            if not scope[KNOWN] and not is_open(scope["method"], scope["path"]):
                raise Refusal(401, "token", "the token is missing or wrong: send Authorization: Bearer TOKEN")
        await self._app(scope, receive, send)

    def _is_known(self, headers: HeaderMap) -> bool:
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_token(given.strip(), self._token):
            return True
        return hmac.compare_digest(_cookie(headers).encode(), session_of(self._token).encode())


class Bodies:
    """Bodies that are JSON and not too large; their bytes are counted as they come in.

    Args:
        app: What is guarded.
        max_bytes: Of one body; all that are held at once have `BODIES_HELD` times as many.
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
        self._check_head(scope["method"], HeaderMap(scope=scope))
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                num_bytes, self._held_bytes = num_bytes + size, self._held_bytes + size
                self._check_size(num_bytes)
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._held_bytes -= num_bytes

    def _check_head(self, method: str, headers: HeaderMap) -> None:
        if method == "POST" and _media_type(headers) != "application/json":
            # A page of another site can send forms and plain text without asking, and JSON it can't.
            raise Refusal(415, "request", "send the body as content-type application/json")
        declared = headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > self._max_bytes:
            raise self._too_large()

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()
        if self._held_bytes > BODIES_HELD * self._max_bytes:
            raise Refusal(503, "busy", "too many pictures come in: ask again in a moment", retry_after=1)

    def _too_large(self) -> Refusal:
        most = f"{self._max_bytes / 1e6:g} MB"
        return Refusal(413, "too_large", f"a request has at most {most}: send a smaller picture")


def is_token(given: str, token: str) -> bool:
    """Whether it is the token, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def session_of(token: str) -> str:
    """What the cookie of a session holds: it proves that its holder knew the token, and doesn't tell it."""
    return hmac.new(token.encode(), COOKIE.encode(), hashlib.sha256).hexdigest()


def _cookie(headers: HeaderMap) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _name_of(host: str) -> str:
    """A Host without its port, in small letters; empty where it is none."""
    parts = _HOST.fullmatch(host.strip().lower())
    return (parts["address"] or parts["name"] or "").rstrip(".") if parts else ""


def _media_type(headers: HeaderMap) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_unmetered(path: str) -> bool:
    return path in _UNMETERED or path.startswith(_PAGE)


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
