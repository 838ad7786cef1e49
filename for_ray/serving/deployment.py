"""The service on Ray: replicas of the application behind Ray Serve's HTTP proxies.

Each replica holds the text tower and the open snapshot; the segments are mapped by the replica itself, or
shared out among plain Ray actors, which answer sooner than deployments of Serve would. Replicas come and go
with the load. One that dies, or whose shards are gone for good, is replaced by Serve; its shards end with it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from for_ray.errors import ConfigError, DataError, StageError, StorageError
from for_ray.serving.local import KEEP_ALIVE_SECONDS, SECONDS_TO_END, bind, url_of
from for_ray.serving.opening import SHARD_CPUS
from for_ray.stages.cluster import Cluster

if TYPE_CHECKING:
    from fastapi import FastAPI

    from for_ray.serving.meters import RayMeters
    from for_ray.serving.opening import Served

NAME = "for_ray"
"""Of the application in Serve."""

REPLICA_CPUS = 1.0

BUSY_REQUESTS, MOST_REQUESTS = 4, 64
"""Being answered by one replica: so many on average bring another; more than the most wait outside."""

MOST_WAITING = 256
"""Requests that wait for a replica at each proxy; what comes then is told to come again (503)."""

HEALTH_SECONDS, MOST_HEALTH_SECONDS = 10.0, 60.0
"""Between two looks at a replica's health, and for one: a shard that starts again may fetch its part."""

ANSWER_SECONDS = 300.0
"""After which a request is given up."""

LOOK_SECONDS = 10.0
"""Between two looks of this process at the cluster."""


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are: `least` at any time, `most` as the load asks."""

    least: int = 1
    most: int = 1


class Replica:
    """One replica: Serve runs it in an actor of its own.

    Args:
        served: What to open in this process.
    """

    def __init__(self, served: Served) -> None:
        self._service = served.open()
        self._service.current.start()
        self._meters: RayMeters | None = None
        self._is_open = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls it once the replica is made."""
        from for_ray.serving.app import make_app
        from for_ray.serving.meters import RayMeters

        self._meters = RayMeters()
        self._meters.show(self._service.current)
        return make_app(self._service, self._meters)

    async def check_health(self) -> None:
        """Ask something, while others are answered; Serve replaces the replica when this raises.

        Raises:
            StageError: A shard is gone for good. What is wrong with the store or the index raises nothing: a
                new replica would not do better.
        """
        if self._meters is not None:
            self._meters.show(self._service.current)
        await asyncio.to_thread(self._ask)

    def _ask(self) -> None:
        try:
            with self._service.current.lease() as index:
                index.warm()
        except (ConfigError, DataError, StorageError):
            return

    def __del__(self) -> None:
        if getattr(self, "_is_open", False):
            self._is_open = False  # Serve calls this, and Python once more
            self._service.current.close()


def run(
    served: Served,
    replicas: Replicas,
    *,
    host: str,
    port: int,
    when_up: Callable[[str], None],
) -> None:
    """Serve on the cluster of RAY_ADDRESS, or on one of this machine alone, until interrupted.

    Args:
        served: What each replica opens.
        replicas: How many.
        host: Address that the proxy of each node listens on.
        port: Likewise.
        when_up: Called with the URL once requests are answered.

    Raises:
        ConfigError: The cluster can't be joined, has no room, or serves at another address already; or the
            port is in use, or the index is of another encoder.
        DataError: Nothing is published there.
        StorageError: The store refused.
        StageError: The replicas do not start, or the cluster is gone.
        KeyboardInterrupt: As the signal's handler raises it; what was started is ended first.
    """
    bind(host, port).close()
    served.check()
    with ExitStack() as stack:
        cluster = Cluster(stack)
        gpus = _gpus(cluster, served.device)
        _check_room(cluster, served, replicas, gpus=gpus)
        _start(host, port, stack)
        _deploy(application(served, replicas, gpus=gpus), stack)
        when_up(url_of(host, port))
        _watch()


def application(served: Served, replicas: Replicas, *, gpus: int = 0) -> Any:
    """The application for `ray.serve.run`; each replica reserves so many GPUs."""
    from ray import serve

    scaling = {
        "min_replicas": replicas.least,
        "max_replicas": replicas.most,
        "target_ongoing_requests": BUSY_REQUESTS,
    }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": REPLICA_CPUS, "num_gpus": gpus},
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=MOST_WAITING,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=MOST_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=SECONDS_TO_END,
        max_constructor_retry_count=2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},  # questions are in no log
    )
    return deployment.bind(served)


def _gpus(cluster: Cluster, device: str) -> int:
    return {"cpu": 0, "cuda": 1}.get(device, cluster.task_gpus)


def _check_room(cluster: Cluster, served: Served, replicas: Replicas, *, gpus: int) -> None:
    """A cluster of this machine alone does not grow: what does not fit would be waited for in vain."""
    if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return
    shards = served.num_shards or 0
    needed = replicas.least * (REPLICA_CPUS + 2 * SHARD_CPUS * shards)  # a snapshot opens beside another
    cpus = cluster.resources.get("CPU", 0.0)
    if needed > cpus:
        raise ConfigError(
            f"{replicas.least} replicas with {shards} shards each reserve {needed:g} CPUs, this machine has "
            f"{cpus:g}: ask for fewer replicas or shards, or name a cluster in RAY_ADDRESS"
        )
    has = cluster.resources.get("GPU", 0.0)
    if replicas.least * gpus > has:
        raise ConfigError(
            f"{replicas.least} replicas reserve {replicas.least * gpus} GPUs, this machine has {has:g}: give "
            "--device cpu, ask for fewer replicas, or name a cluster in RAY_ADDRESS"
        )


def _start(host: str, port: int, stack: ExitStack) -> None:
    """Serve's controller and proxies; those that are there are used, and left as they are."""
    from ray import serve
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        found = running.http_config
        if (found.host, found.port) != (host, port):
            raise ConfigError(
                f"Ray Serve runs on this cluster already, at {found.host}:{found.port}: give these as --host "
                "and --port, or end it with `serve shutdown`"
            )
        return
    stack.callback(_shut_down)
    serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": host,
            "port": port,
            "request_timeout_s": ANSWER_SECONDS,
            "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _shut_down() -> None:
    """End Serve; Ray calls an error that the controller ends, as it is told to (ray 2.60)."""
    from ray import serve

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        serve.shutdown()


def _deploy(app: Any, stack: ExitStack) -> None:
    from ray import serve

    stack.callback(partial(serve.delete, NAME))
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        found = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise StageError("serve", f"the replicas do not start: {found[-1] if found else error!r}") from None


def _watch() -> None:
    """Wait until interrupted."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    waiting = threading.Event()
    while not waiting.wait(LOOK_SECONDS):
        try:
            is_there = NAME in serve.status().applications
        except (RayError, RayServeException) as error:
            reason = " ".join(str(error).split())
            raise StageError("serve", f"the cluster is gone ({reason}): start the service again") from None
        if not is_there:
            raise StageError("serve", "the application was deleted from Ray Serve: start the service again")
