"""What Ray Serve is told of a replica's health, and what does not fit on one machine."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from for_ray.errors import ConfigError, DataError, StageError, StorageError
from for_ray.serving.deployment import Replica, Replicas, _check_room
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
        _check_room(*given)
    else:
        with pytest.raises(ConfigError, match=f"reserve {needed}, this machine has 2: ask for fewer"):
            _check_room(*given)


def test_what_is_served_can_be_sent_to_a_replica() -> None:
    served = Served("s3://bucket/index", token="a-token-of-some-length", num_shards=3)
    assert pickle.loads(pickle.dumps(served)) == served
    assert "a-token" not in repr(served)
