"""A Ray cluster of several nodes for tests and benchmarks, and the means to kill parts of it.

    with ray_nodes(2) as nodes:
        ... RAY_ADDRESS=nodes.address ...
        nodes.kill("MapWorker"); nodes.remove_node(); nodes.add_node()

The nodes are processes of this machine, with GPUs in their books. They belong to a process of their own (this
file, run as a script), so that they do not meet the Ray that the caller's process has joined.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACTOR, AT_WORK, READER = "MapWorker", ".submit", "measured_read"
"""What titles of processes have in them: of encoding actors, of these while they encode, of reading tasks."""

STORE_BYTES = 120 * 2**20


class RayNodes:
    """The cluster: a head without GPUs, and nodes with one each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("the process has no pipes")
        self._stdin, self._stdout = process.stdin, process.stdout
        self.address: str = self._read()["address"]

    def add_node(self) -> None:
        """Start a node with a GPU, and wait until it is there."""
        self._ask("add")

    def remove_node(self) -> bool:
        """SIGKILL for all processes of the node that was there first; False if only the head is left."""
        return bool(self._ask("remove")["done"])

    def num_nodes(self) -> int:
        """Nodes with a GPU."""
        return int(self._ask("count")["done"])

    def find(self, title: str) -> list[int]:
        """Pids of workers whose process title has `title` in it."""
        return list(self._ask("find", title)["done"])

    def kill(self, title: str, *, chance: random.Random | None = None) -> int | None:
        """SIGKILL one worker with such a title; its pid, or None where there is none."""
        pids = self.find(title)
        if not pids:
            return None
        pid = (chance or random.Random(0)).choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        """Let the process shut the cluster down, and end."""
        self._stdin.close()

    def _ask(self, *words: str) -> dict[str, Any]:
        self._stdin.write(json.dumps(words) + "\n")
        self._stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        while line := self._stdout.readline():
            if line.startswith("{"):  # Ray may say something, too
                return dict(json.loads(line))
        raise RuntimeError("the cluster's process ended")


@contextlib.contextmanager
def ray_nodes(num_nodes: int, *, env: dict[str, str] | None = None) -> Iterator[RayNodes]:
    """Run a cluster for the length of the block.

    Args:
        num_nodes: Nodes with a GPU, beside the head.
        env: More variables for its processes.
    """
    setpriv = shutil.which("setpriv")  # on Linux: no cluster is left behind by a test run that is killed
    process = subprocess.Popen(
        [*([setpriv, "--pdeathsig", "TERM"] if setpriv else []), sys.executable, __file__, str(num_nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(env or {}),
        start_new_session=True,
    )
    nodes = RayNodes(process)
    try:
        yield nodes
    finally:
        nodes.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = [str(Path(__file__).resolve().parents[1]), kept.get("PYTHONPATH", ""), more.get("PYTHONPATH", "")]
    return {
        **kept,
        **more,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def main(num_nodes: int) -> None:
    """Start the cluster, do what comes in on stdin line by line, and end with it."""
    from ray.cluster_utils import Cluster

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        nodes = [_add(cluster) for _ in range(num_nodes)]
        _say(address=cluster.address)
        for line in sys.stdin:
            command, *more = json.loads(line)
            if command == "add":
                nodes.append(_add(cluster))
                _say(done=True)
            elif command == "remove":
                if nodes:
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
                    _say(done=True)
                else:
                    _say(done=False)
            elif command == "count":
                _say(done=len(nodes))
            else:
                _say(done=_workers(more[0]))
    finally:
        cluster.shutdown()


def _add(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _workers(title: str) -> list[int]:
    """Descendants of this process whose command line has `title` in it."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
    found, wave = set(), {os.getpid()}
    while wave:
        found |= wave
        wave = {pid for pid, parent in parents.items() if parent in wave} - found
    return sorted(pid for pid in found if title in titles.get(pid, "") and "ray::" in titles[pid])


if __name__ == "__main__":
    main(int(sys.argv[1]))
