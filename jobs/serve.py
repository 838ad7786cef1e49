"""Serve the search page and the HTTP API of an index: `python jobs/serve.py --index URI [--local]`."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import NoReturn

from for_ray.command import run_command
from for_ray.config import ServeSettings, read_settings


def main() -> int:
    """Serve until a signal comes; the exit code."""
    return run_command(lambda: _serve(read_settings(ServeSettings, sys.argv[1:])))


def _serve(settings: ServeSettings) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    with suppress(KeyboardInterrupt):  # it is how a service ends
        _serve_until_interrupted(settings)


def _serve_until_interrupted(settings: ServeSettings) -> None:
    from for_ray.serving import deployment, local  # slow to import: --help and wrong settings don't wait
    from for_ray.serving.opening import Served
    from for_ray.serving.service import Limits

    limits = Limits(settings.max_body_bytes, settings.requests_per_second, settings.max_looked_at)
    served = Served(
        settings.index,
        encoder=settings.encoder,
        refresh_seconds=settings.refresh_seconds,
        grace_seconds=settings.grace_seconds,
        device=settings.device,
        cache_path=settings.cache,
        num_shards=settings.shards,
        limits=limits,
        token=settings.token.get_secret_value() if settings.token else None,
        hosts=(settings.host, *settings.other_hosts),
        examples=settings.proposed,
    )
    if settings.local:
        local.run(served, host=settings.host, port=settings.port, when_up=_say)
    else:
        replicas = deployment.Replicas(settings.replicas, settings.most_replicas)
        deployment.run(served, replicas, host=settings.host, port=settings.port, when_up=_say)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(url: str) -> None:
    print(f"serving {url}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
