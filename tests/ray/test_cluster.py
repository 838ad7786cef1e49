"""Joining and leaving clusters: what is wrong is said in a line, and no GCS is waited for for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters import Head, ray_head

JOIN = """
import os, sys
import ray
ray.__version__ = os.environ.get("TEST_RAY_VERSION", ray.__version__)
from for_ray.errors import ConfigError
from for_ray.stages.cluster import connect
try:
    with connect() as resources:
        print(resources["CPU"])
except ConfigError as error:
    print(error)
    sys.exit(2)
"""
"""A driver that joins, and says what it found or what is wrong."""

LEAVE = """
import os, signal
import ray
from for_ray.stages import cluster
cluster.SECONDS_TO_LEAVE = 3
with cluster.connect():
    processes = ray._private.worker._global_node.all_processes
    pids = [each.process.pid for kind in ("gcs_server", "raylet") for each in processes[kind]]
    os.kill(pids[0], signal.SIGSTOP)
print(ray.is_initialized(), *pids)
"""
"""A driver whose own cluster's GCS does not answer any more when it leaves."""

WITHOUT_THE_PACKAGE = """
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "for_ray":
            raise ModuleNotFoundError("No module named 'for_ray'", name=name)


sys.meta_path.insert(0, Finder())
"""
"""A `sitecustomize.py` for the nodes of a cluster that nobody has installed this package on."""


@pytest.fixture
def join(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a driver against the cluster of an address, in an environment without a token."""

    def run(address: str, **given: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(tmp_path), "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        environment = {**kept, **own, **given}
        return subprocess.run(
            [sys.executable, "-c", JOIN],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_another_ray_than_the_clusters_ends_with_both_versions(ray_address, join):
    import ray

    refused = join(ray_address, TEST_RAY_VERSION="2.59.1")
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stdout.splitlines()
    assert line.startswith(f"RAY_ADDRESS={ray_address}: Version mismatch")
    assert f"Ray: {ray.__version__}" in line
    assert "Ray: 2.59.1" in line
    assert line.endswith("Run the job with the cluster's Ray and Python")


def test_a_missing_token_is_said_at_once(ray_address, join):
    refused = join(ray_address, RAY_AUTH_MODE="token")
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stdout.splitlines()
    assert line.startswith(f"RAY_ADDRESS={ray_address}: Token authentication is enabled but no")
    assert "RAY_AUTH_TOKEN" in line
    named = join(ray_address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="/nowhere/token")
    assert "cannot be opened or is empty: /nowhere/token; set RAY_AUTH_MODE" in named.stdout


def test_an_address_where_nobody_listens_is_said_at_once(join):
    refused = join("127.0.0.1:1")
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stdout.splitlines()
    assert line.startswith("RAY_ADDRESS=127.0.0.1:1: nobody listens there; start one, correct the address")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster with a token, on whose nodes there is no for_ray."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "sitecustomize.py").write_text(WITHOUT_THE_PACKAGE)
    with ray_head(
        num_cpus=1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="ab" * 32, PYTHONPATH=str(folder)
    ) as head:
        yield head


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_a_wrong_token_is_told_from_a_cluster_that_does_not_answer(guarded, join, given):
    refused = join(guarded.address, **given)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stdout.splitlines()
    assert line.startswith(f"RAY_ADDRESS={guarded.address}: the cluster does not take this run's token; set")


@pytest.mark.slow
def test_workers_without_the_package_end_the_run_at_its_start(guarded, join):
    refused = join(guarded.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="ab" * 32)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stdout.splitlines()
    assert "its workers cannot run this job (ModuleNotFoundError: No module named 'for_ray')" in line
    assert "ray job submit --working-dir ." in line


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_an_own_cluster_whose_gcs_hangs_is_left_all_the_same(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    is_initialized, *pids = done.stdout.split()
    assert is_initialized == "False"
    assert len(pids) == 2
    assert not [pid for pid in pids if is_running(int(pid))]
