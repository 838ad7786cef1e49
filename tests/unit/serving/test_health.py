"""What `/healthz` says, when the index answers, fails, hangs, or has long been stale."""

from __future__ import annotations

import asyncio
import datetime
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from for_ray.errors import StorageError
from for_ray.serving import health
from for_ray.serving.client import Client, ServiceError
from for_ray.serving.health import Health


class Index:
    """A current snapshot of an hour ago, whose index answers as it is told."""

    def __init__(self) -> None:
        made = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        self.snapshot = SimpleNamespace(snapshot_id=3, created_at=made)
        self.stale: str | None = None
        self.seconds_stale = 0.0
        self.error: Exception | None = None
        self.num_asked = 0
        self.lets_go = threading.Event()
        self.lets_go.set()

    @contextmanager
    def lease(self) -> Iterator[Index]:
        yield self

    def warm(self) -> None:
        self.num_asked += 1
        assert self.lets_go.wait(60)
        if self.error is not None:
            raise self.error


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def index() -> Index:
    return Index()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(checked: Health, *, is_known: bool = True) -> tuple[int, dict[str, Any]]:
    answer = asyncio.run(checked.response(is_known=is_known))
    return answer.status_code, json.loads(bytes(answer.body))


def test_an_index_that_answers_is_well_and_asked_now_and_then(index: Index, clock: Clock) -> None:
    checked = Health(index, clock)
    for _ in range(5):
        status, body = told(checked)
        assert (status, body["status"], body["snapshot_id"], body["stale"]) == (200, "ok", 3, None)
        assert 3600 <= body["age_seconds"] < 3700
    assert index.num_asked == 1
    clock.now += health.PROBE_SECONDS
    told(checked)
    assert index.num_asked == 2


def test_an_index_that_cannot_be_read_is_not_well(index: Index, clock: Clock) -> None:
    checked = Health(index, clock)
    index.error = StorageError("s3://secret/index is away:\n check the network")
    status, body = told(checked)
    assert (status, body["status"], body["code"]) == (503, "unwell", "unwell")
    assert body["error"] == "the index cannot be read: s3://secret/index is away: check the network"
    status, body = told(checked, is_known=False)
    assert (status, body["error"]) == (503, "the service is not well: its log says why")
    index.error = None
    clock.now += health.PROBE_SECONDS
    assert told(checked)[0] == 200


def test_an_index_that_hangs_is_not_well_after_a_while(
    index: Index, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WAIT_SECONDS", 0.01)
    checked = Health(index, clock)
    index.lets_go.clear()
    assert told(checked)[0] == 200  # it may be slow
    clock.now += health.MOST_PROBE_SECONDS + 1
    status, body = told(checked)
    assert (status, index.num_asked) == (503, 1)
    assert "has not answered for 60 s" in body["error"]
    index.lets_go.set()
    monkeypatch.setattr(health, "WAIT_SECONDS", 60)
    assert told(checked)[0] == 200


def test_a_snapshot_that_has_long_been_stale_is_not_well(index: Index, clock: Clock) -> None:
    checked = Health(index, clock)
    index.stale, index.seconds_stale = "s3://secret is away", health.STALE_SECONDS
    status, body = told(checked)
    assert (status, body["stale"]) == (200, "s3://secret is away")
    assert told(checked, is_known=False)[1]["stale"] == "the last refresh failed: the log says why"
    index.seconds_stale += 1
    status, body = told(checked)
    assert (status, body["error"]) == (
        503, "no newer snapshot could be looked for in 901 s: s3://secret is away",
    )  # fmt: skip
    assert "secret" not in json.dumps(told(checked, is_known=False)[1])


def test_the_client_raises_what_is_wrong(monkeypatch: pytest.MonkeyPatch, index: Index) -> None:
    import requests

    index.error = StorageError("the store is away")
    answer = asyncio.run(Health(index).response(is_known=True))
    received = requests.Response()
    received.status_code, received._content = answer.status_code, bytes(answer.body)
    monkeypatch.setattr(requests.Session, "request", lambda *_, **__: received)
    with pytest.raises(ServiceError, match="the index cannot be read: the store is away") as unwell:
        Client("http://localhost").health()
    assert (unwell.value.status, unwell.value.code) == (503, "unwell")
