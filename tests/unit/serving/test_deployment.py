"""What Ray Serve is told of a replica's health, and what does not fit on one machine."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from for_ray.errors import ConfigError, DataError, StageError, StorageError
from for_ray.serving.deployment import (
    BUSY_REQUESTS,
    MOST_REQUESTS,
    MOST_WAITING,
    REPLICA_CPUS,
    Replica,
    Replicas,
    _check_room,
    _gpus,
    application,
)
from for_ray.serving.opening import Served


class Held:
    """A service whose index answers, or fails as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []
        self.current = self

    def open(self) -> Held:
        return self

    def start(self) -> None:
        self.calls.append("start")

    def close(self) -> None:
        self.calls.append("close")

    @contextmanager
    def lease(self):
        yield self

    def warm(self) -> None:
        self.calls.append("warm")
        if self.error is not None:
            raise self.error


def test_a_replica_whose_shards_are_gone_is_not_healthy() -> None:
    replica = Replica(Held(StageError("search", "a shard is gone")))
    with pytest.raises(StageError, match="a shard is gone"):
        asyncio.run(replica.check_health())


@pytest.mark.parametrize("error", [None, StorageError("away"), DataError("damaged"), ConfigError("wrong")])
def test_what_a_new_replica_would_not_mend_leaves_it_in_its_place(error: Exception | None) -> None:
    held = Held(error)
    replica = Replica(held)
    asyncio.run(replica.check_health())
    replica.__del__()  # Serve calls it, and Python once more
    replica.__del__()
    assert held.calls == ["start", "warm", "close"]


@pytest.mark.parametrize(
    ("address", "replicas", "shards", "needed"),
    [
        ("", 1, 2, None),
        ("", 2, None, None),
        ("", 2, 2, "4 CPUs"),
        ("local", 3, None, "3 CPUs"),
        ("h:1", 9, 9, None),
    ],
)
def test_what_one_machine_has_no_room_for_is_said_at_once(
    address: str, replicas: int, shards: int | None, needed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that is joined may grow."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    cluster = SimpleNamespace(resources={"CPU": 2.0})
    given = (cluster, Served("index", num_shards=shards), Replicas(replicas, replicas))
    if needed is None:
        _check_room(*given, gpus=0)
    else:
        with pytest.raises(ConfigError, match=f"reserve {needed}, this machine has 2: ask for fewer"):
            _check_room(*given, gpus=0)


def test_replicas_without_a_gpu_each_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, served = SimpleNamespace(resources={"CPU": 8.0, "GPU": 1.0}), Served("index", device="auto")
    monkeypatch.setenv("RAY_ADDRESS", "")
    _check_room(cluster, served, Replicas(1, 4), gpus=1)
    _check_room(cluster, served, Replicas(2, 4), gpus=0)
    with pytest.raises(ConfigError, match="2 replicas reserve 2 GPUs, this machine has 1: give --device cpu"):
        _check_room(cluster, served, Replicas(2, 4), gpus=1)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    _check_room(cluster, served, Replicas(2, 4), gpus=1)


@pytest.mark.parametrize(
    ("device", "cluster_gpus", "gpus"),
    [("cpu", 1, 0), ("cuda", 1, 1), ("cuda", 0, 1), ("auto", 1, 1), ("auto", 0, 0)],
)
def test_what_the_settings_say_is_what_serve_is_asked_for(device: str, cluster_gpus: int, gpus: int) -> None:
    """With `cuda` a replica waits for a GPU, where the cluster may grow one."""
    assert _gpus(SimpleNamespace(task_gpus=cluster_gpus), device) == gpus
    app = application(Served("index", device=device), Replicas(2, 8), gpus=gpus)
    deployment = app._bound_deployment
    config = deployment._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert scaling.target_ongoing_requests == BUSY_REQUESTS
    assert (config.max_ongoing_requests, config.max_queued_requests) == (MOST_REQUESTS, MOST_WAITING)
    assert deployment.ray_actor_options["num_gpus"] == gpus
    assert deployment.ray_actor_options["num_cpus"] == REPLICA_CPUS


def test_a_replica_tells_where_it_stands_whenever_it_is_looked_at() -> None:
    replica, told = Replica(Held()), []
    replica._meters = SimpleNamespace(show=told.append)
    asyncio.run(replica.check_health())
    assert told == [replica._service.current]


def test_what_is_served_can_be_sent_to_a_replica() -> None:
    served = Served("s3://bucket/index", token="a-token-of-some-length", num_shards=3)
    assert pickle.loads(pickle.dumps(served)) == served
    assert "a-token" not in repr(served)
