"""Ray clusters of their own, for tests of what a job meets outside: each in one group of processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

RAY = Path(sys.executable).with_name("ray")
STORE_BYTES = 80 << 20
SECONDS_TO_START = 60

HEAD_ID = "f" * 51 + "00000"
"""What Ray's fake provider calls the head."""


class Nodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's fake provider for node types that say how much memory they have, as real providers do.

    The autoscaler wants to know it; a node that starts here finds out for itself.
    """

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        found = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, found, labels)


@dataclass(frozen=True)
class Head:
    """A head node that runs.

    Attributes:
        address: Of its GCS, for RAY_ADDRESS.
        dashboard_url: For `ray job submit`, where the dashboard was asked for.
        environment: What it was started with; whoever joins needs the same.
    """

    address: str
    dashboard_url: str
    environment: dict[str, str]

    def nodes(self) -> list[dict[str, float]]:
        """What the nodes have that are alive, the head's first."""
        found = GcsClient(address=self.address).get_all_node_info().values()
        alive = [node for node in found if node.state == 0]
        alive.sort(key=lambda node: not node.is_head_node)
        return [dict(node.resources_total) for node in alive]

    def num_with(self, resource: str) -> int:
        """How many nodes have any of this resource."""
        return sum(node.get(resource, 0) > 0 for node in self.nodes())


@contextlib.contextmanager
def ray_head(
    *options: str, num_cpus: int, dashboard: bool = False, port: int | None = None, **environment: str
) -> Iterator[Head]:
    """`ray start --head` on free ports, with a folder and a group of processes of its own.

    Args:
        options: Of `ray start`.
        num_cpus: CPUs of the head, in Ray's books.
        dashboard: Whether jobs can be submitted.
        port: Of the GCS; a free one where None.
        environment: More variables; without any, no token is asked for.
    """
    gcs_port, dashboard_port, client_port = port or free_port(), free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: it becomes part of sockets' names
    given = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    ip = "127.0.0.1"
    command = [str(RAY), "start", "--head", "--block", f"--port={gcs_port}", f"--num-cpus={num_cpus}"]
    command += [f"--node-ip-address={ip}", f"--object-store-memory={STORE_BYTES}", f"--temp-dir={folder}"]
    command += [f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"]
    command += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={client_port}", *options]
    log_path = folder / "start.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **given}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        head = Head(f"{ip}:{gcs_port}", f"http://{ip}:{dashboard_port}", given)
        wait_for(
            lambda: "Ray runtime started" in log_path.read_text(),
            seconds=SECONDS_TO_START,
            what=f"Ray to start ({log_path})",
            is_lost=lambda: process.poll() is not None,
        )
        yield head
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def autoscaling_head(
    node_types: dict[str, dict[str, Any]], *, num_cpus: int, idle_seconds: float
) -> Iterator[Head]:
    """A head whose autoscaler starts nodes on this machine, by Ray's fake provider, and stops them when idle.

    Args:
        node_types: Resources and `max_workers` of each type of worker, by its name.
        num_cpus: CPUs of the head.
        idle_seconds: After which a worker goes.
    """
    port = free_port()
    lists = "initialization_commands setup_commands head_setup_commands worker_setup_commands "
    lists += "head_start_ray_commands worker_start_ray_commands "
    lists += "cluster_synced_files rsync_exclude rsync_filter"
    settings: dict[str, Any] = {
        **{name: [] for name in lists.split()},  # the monitor reads them all
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "cluster_name": "fake",
        "max_workers": sum(each["max_workers"] for each in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_seconds / 60,
        "head_node_type": "ray.head.default",
        # Not by its name: the wheel lacks a file that Ray reads for `type: fake_multinode`.
        "provider": {
            "type": "external",
            "module": f"{__name__}.Nodes",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **each} for name, each in node_types.items()},
        },
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        with ray_head(
            f"--autoscaling-config={file.name}",
            num_cpus=num_cpus,
            port=port,
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            PYTHONPATH=str(Path(__file__).parents[1]),  # for the monitor, which imports this module
        ) as head:
            yield head


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    holds: Callable[[], object],
    *,
    seconds: float,
    what: str,
    is_lost: Callable[[], bool] = lambda: False,
) -> None:
    """Return as soon as `holds()` is true; fail with `what` after `seconds`, or when all is lost."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert not is_lost(), f"waited for {what}: it ended"
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
