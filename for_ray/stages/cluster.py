"""The Ray cluster that the stages run on: the one that is there, or one of this machine's own."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import for_ray
from for_ray.command import kept_sigterm
from for_ray.errors import ConfigError
from for_ray.index.plan import DEFAULT_MEMORY_BYTES

FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
"""What workers need to reach the driver's store. Secrets are not sent: nodes have a role, or their own."""

MOST_STORE_BYTES, LEAST_STORE_BYTES = 2 << 30, 80 << 20
"""Ray's shared memory on a single machine: blocks stream, so that more would lie idle; Ray needs 75 MiB."""

SECONDS_TO_LEAVE = 30
"""Ray 2.60 was seen to wait for ever for a farewell of its GCS (`PythonGcsSubscriber::Close`)."""

SECONDS_TO_LISTEN = 10
"""For a head to take a connection."""

MAX_PROBED_NODES = 32
"""Nodes whose Python is asked for this package when a cluster is joined."""

HOW_TO_BE_KNOWN = (
    "set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, or in a file that "
    "RAY_AUTH_TOKEN_PATH names; `ray get-auth-token` on the head prints it"
)

HOW_TO_FIND_A_CLUSTER = (
    "start one, correct the address (the head's host and port, 6379 by default), or unset it to run on this "
    "machine alone"
)


class Cluster:
    """A cluster that is joined, or started, when something is first asked of it.

    Args:
        stack: Leaves the cluster when it is closed.
        task_memory_bytes: What a task that trains, builds or merges may reserve.
    """

    def __init__(self, stack: ExitStack, *, task_memory_bytes: int = DEFAULT_MEMORY_BYTES) -> None:
        self._stack, self._task_memory_bytes = stack, task_memory_bytes
        if "ray" not in sys.modules:
            # The C++ part of every driver that has actors logs an "error" to stderr that is none (ray 2.60:
            # "Actor … has constructor arguments in the object store"), into the middle of the progress.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            if _is_own():
                _prepare_environment()

    @cached_property
    def resources(self) -> dict[str, float]:
        """What the cluster has, in Ray's names (`CPU`, `GPU`, `memory`, …)."""
        return self._stack.enter_context(connect())

    @property
    def task_cpus(self) -> int:
        """CPUs for a task that has threads: those of the largest node that is there, four at most.

        One where no node works yet: any that comes will do.
        """
        _ = self.resources
        cpus = [node["Resources"].get("CPU", 0) for node in _workers()]
        return max(1, min(4, int(max(cpus, default=1))))

    @property
    def task_memory_bytes(self) -> int:
        """Memory that a task may reserve and use: the setting's, or half of a node's where that is less.

        One byte where no node works yet: what no node that comes has would be waited for in vain.
        """
        return max(1, min(self._task_memory_bytes, self._half_of_a_node))

    @cached_property
    def planned_memory_bytes(self) -> int:
        """What segments and lists are laid out for: what a task may reserve on the nodes of this moment.

        Looked at once, so that all of a run is laid out alike; the setting's where no node works yet.
        """
        return min(self._task_memory_bytes, self._half_of_a_node or self._task_memory_bytes)

    @property
    def _half_of_a_node(self) -> int:
        """Half of the memory that Ray leaves to tasks on the largest node; 0 where none works yet."""
        _ = self.resources
        memory = [node["Resources"].get("memory", 0) for node in _workers()]
        return int(max(memory, default=0)) // 2

    @property
    def task_gpus(self) -> int:
        """GPUs for a task that can use one: 1, or 0 where there are none."""
        return min(1, int(self.resources.get("GPU", 0)))


@contextmanager
def connect() -> Iterator[dict[str, float]]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine for the time of the block.

    A session that the process has already joined is used, and left as it is.

    Yields:
        What the cluster has, in Ray's names (`CPU`, `GPU`, `memory`, …).

    Raises:
        ConfigError: RAY_ADDRESS names no cluster that answers, that takes this run's token, and whose
            workers have this package and this Ray and Python; or no cluster can be started here.
    """
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    if _is_own():
        _start(ray)
        leave = leave_own
    else:
        _join(ray, os.environ["RAY_ADDRESS"])
        leave = ray.shutdown
    try:
        yield ray.cluster_resources()
    finally:
        leave()


def leave_own() -> None:
    """End the cluster that this process has started, also when its GCS does not answer any more."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, name="leave-ray", daemon=True)
    leaving.start()
    leaving.join(SECONDS_TO_LEAVE)
    node = ray._private.worker._global_node
    if leaving.is_alive() and node is not None:
        node.kill_gcs_server(check_alive=False)  # without a GCS the farewell fails, and the rest follows
        leaving.join(SECONDS_TO_LEAVE)


def _is_own() -> bool:
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def _workers() -> list[dict[str, Any]]:
    """The nodes that run tasks now; a head that is kept free of them is none."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _prepare_environment() -> None:
    """Set what a cluster of our own reads while Ray is imported; what the user has set stays."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on all interfaces: a token that only this run's processes know keeps everybody else out.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    package_path = str(Path(for_ray.__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if package_path not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([package_path, *filter(None, paths)])


def _start(ray: Any) -> None:
    try:
        with kept_sigterm(), _silence():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_store_bytes(),
            )
    except Exception as error:  # Ray raises a bare one when its processes do not come up in time
        reason = str(error).strip().splitlines()[0]
        message = f"Ray cannot be started here: {reason}; has the machine CPU and memory left?"
        raise ConfigError(message) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what C++ and forked children say at a start off the terminal; Python's errors are exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _join(ray: Any, address: str) -> None:
    if not _listens(address):
        raise ConfigError(f"RAY_ADDRESS={address}: nobody listens there; {HOW_TO_FIND_A_CLUSTER}")
    try:
        with kept_sigterm(), _silence():
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=_runtime_env()
            )
    except ray.exceptions.AuthenticationError as error:
        reason = str(error).split(". ")[0]
        raise ConfigError(f"RAY_ADDRESS={address}: {reason}; {HOW_TO_BE_KNOWN}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if _is_refused(address):
            message = f"the cluster does not take this run's token; {HOW_TO_BE_KNOWN}"
        elif reason.startswith("Version mismatch"):
            message = f"{reason} Run the job with the cluster's Ray and Python"
        else:
            message = f"no cluster answers there ({reason}); {HOW_TO_FIND_A_CLUSTER}"
        raise ConfigError(f"RAY_ADDRESS={address}: {message}") from None
    try:
        _check_workers(address)
    except ConfigError:
        ray.shutdown()
        raise


def _is_refused(address: str) -> bool:
    """Whether a GCS answers there, but not to our token; `ray.init` does not tell the two apart."""
    import ray

    try:
        with _silence():
            ray._raylet.GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        return True
    except (ValueError, ray.exceptions.RayError):
        return False
    return False


def _listens(address: str) -> bool:
    """Whether somebody takes connections there; Ray waits minutes for that. True for other than host:port."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_LISTEN).close()
    except (OSError, OverflowError):
        return False
    return True


def _check_workers(address: str) -> None:
    """Raise unless the nodes that are there can import this package.

    Raises:
        ConfigError: One cannot, or has another version of it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def find_version() -> str:  # local, hence sent as it is: a worker need not have the package to run it
        import for_ray

        return for_ray.__version__

    probe = ray.remote(find_version)
    nodes = [node["NodeID"] for node in _workers()][:MAX_PROBED_NODES]
    try:
        versions = ray.get(
            [
                probe.options(
                    num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)
                ).remote()
                for node in nodes
            ]
        )
        found = f"they have for_ray {', '.join(sorted(set(versions)))}, this run has {for_ray.__version__}"
        is_right = set(versions) <= {for_ray.__version__}
    except ray.exceptions.RayError as error:
        found, is_right = str(error).strip().splitlines()[-1], False
    if not is_right:
        raise ConfigError(
            f"RAY_ADDRESS={address}: its workers cannot run this job ({found}); install this checkout on all "
            "nodes, or send it along: ray job submit --working-dir . -- python jobs/…"
        )


def _runtime_env() -> dict[str, Any]:
    """What workers on other nodes need of the driver's environment; a job's own settings stay as they are."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    given = submitted.get("env_vars") or {}
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ and name not in given}
    return {"env_vars": env_vars} if env_vars else {}


def _store_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    store = min(MOST_STORE_BYTES, memory * 3 // 10)
    shared = Path("/dev/shm")  # noqa: S108 - asked for its size only
    if shared.exists() and shutil.disk_usage(shared).free > LEAST_STORE_BYTES * 2:
        store = min(store, shutil.disk_usage(shared).free * 9 // 10)
    return max(store, LEAST_STORE_BYTES)
