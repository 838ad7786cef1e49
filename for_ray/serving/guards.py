"""What stands between a client and the routes: ASGI middlewares that know nothing of the index.

From outside to inside: `Headers`, what every answer carries, errors too; `Hosts` against names that others
bound to this machine (DNS rebinding); `bounds.Rates` per client address; `Tokens`; `bounds.Bodies`, whose
bytes are counted as they come in.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers as HeaderMap
from starlette.datastructures import MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from for_ray.serving.refusals import Refusal

_LOG = logging.getLogger(__name__)

COOKIE = "for_ray_session"

SESSION_SECONDS = 7 * 86_400
"""After which a session's cookie is worth nothing, and the token is asked for again."""

KNOWN = "for_ray.is_known"
"""In a request's scope: whether its client knows the token, on the routes that need none too."""

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

_UNTIL = re.compile(r"[0-9]{1,12}")

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:/@]+))(?::[0-9]+)?")


def is_open(method: str, path: str) -> bool:
    """Whether a route needs no token: the page, which holds no one's data, health, and the way to sign in."""
    return path in {"/", "/healthz"} or path.startswith("/page/") or (path == "/session" and method == "POST")


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
        return is_session(_cookie(headers), self._token)


def is_token(given: str, token: str) -> bool:
    """Whether it is the token, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def session_of(token: str, *, now: Callable[[], float] = time.time) -> str:
    """What the cookie of a session holds: until when it is good, and a proof that its holder knew the token.

    It doesn't tell the token. Whoever changes the token, or the time, ends it.
    """
    until = int(now()) + SESSION_SECONDS
    return f"{until}.{_proof(token, until)}"


def is_session(given: str, token: str, *, now: Callable[[], float] = time.time) -> bool:
    """Whether it is what `session_of` gave, and still good."""
    until, _, proof = given.partition(".")
    if not _UNTIL.fullmatch(until) or int(until) <= now():
        return False
    return hmac.compare_digest(proof.encode("utf-8", "replace"), _proof(token, int(until)).encode())


def _proof(token: str, until: int) -> str:
    return hmac.new(token.encode(), f"{COOKIE} {until}".encode(), hashlib.sha256).hexdigest()


def _cookie(headers: HeaderMap) -> str:
    """The session's; cookies of other applications on this host are of any form."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def _name_of(host: str) -> str:
    """A Host without its port, in small letters; empty where it is none."""
    parts = _HOST.fullmatch(host.strip().lower())
    return (parts["address"] or parts["name"] or "").rstrip(".") if parts else ""
