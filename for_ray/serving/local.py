"""The service in this process: the application behind uvicorn, for a laptop and for tests."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from for_ray.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from for_ray.serving.opening import Served

SECONDS_TO_END = 10
"""For requests that are being answered when the service is told to end."""

KEEP_ALIVE_SECONDS = 65
"""Longer than load balancers keep an idle connection (60 s): they close it first, and never write into a
closed one."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet; the caller closes it.

    Raises:
        ConfigError: The port is in use or not allowed, or the machine has no such address.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: is no address of this machine ({error.strerror})") from None
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that ended may linger
    try:
        bound.bind(where)
    except OSError as error:
        bound.close()
        raise ConfigError(_why_not(error, host, port)) from None
    return bound


def url_of(host: str, port: int) -> str:
    """Where this machine reaches a service that listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(served: Served, *, host: str, port: int, when_up: Callable[[str], None]) -> None:
    """Serve in this process until SIGINT or SIGTERM; what is being answered is answered first.

    Args:
        served: What to open.
        host: Address to listen on.
        port: Likewise.
        when_up: Called with the URL once requests are answered.

    Raises:
        ConfigError: The port is in use, or the machine has no such address.
        DataError: Nothing is published there, or a file is missing or damaged.
        StorageError: The store refused.
        KeyboardInterrupt: The signal was SIGINT; SIGTERM does what its handler does.
    """
    from for_ray.serving.app import make_app

    with closing(bind(host, port)) as bound:
        service = served.open()
        with closing(service.current) as current:
            current.start()
            server = _server(make_app(service), lambda: when_up(url_of(host, port)))
            server.run(sockets=[bound])


def _server(app: FastAPI, when_up: Callable[[], None]) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                when_up()

    return Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody on this machine could say that the request is another's
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SECONDS_TO_END,
        )
    )


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: is in use on {host}; end what listens there, or give another --port"
    if error.errno == errno.EACCES:
        return f"--port {port}: this user may not listen there; give a --port above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: is no address of this machine; 0.0.0.0 listens on all that it has"
    return f"--host {host} --port {port}: cannot listen there: {os.strerror(error.errno or 0)}"
