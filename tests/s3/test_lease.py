"""The lease on a real S3 server; its other cases are tested on disk."""

from __future__ import annotations

import json

import pytest

from for_ray.errors import ConfigError, StageError
from for_ray.storage import Lease, lease, read_bytes, write_bytes
from tests.contenders import contend

pytestmark = pytest.mark.s3


def rewrite(uri: str, **fields: object) -> None:
    write_bytes(uri, json.dumps(json.loads(read_bytes(uri)) | fields).encode())


def test_one_holds_it_until_its_block_ends(bucket_uri):
    uri = f"{bucket_uri}/index/lease.json"
    for owner in ("first", "second"):
        with Lease.acquire(uri, owner) as held:
            message = rf"{bucket_uri}/index is being written by {owner} on"
            with pytest.raises(ConfigError, match=message), Lease.acquire(uri, "x"):
                pass
            held._renew()
            held._renew()
            held.check()


def test_a_lease_that_was_left_is_taken_over_and_the_old_holder_knows(bucket_uri, monkeypatch):
    uri = f"{bucket_uri}/lease.json"
    monkeypatch.setattr(lease, "_pause", lambda seconds: None)
    with Lease.acquire(uri, "first", seconds=600) as first:
        rewrite(uri, expires_at="2026-01-01T00:00:00Z")
        with Lease.acquire(uri, "second", seconds=600) as second:
            first._renew()
            second._renew()
            second.check()
            with pytest.raises(StageError, match="was lost to another run"):
                first.check()
    assert json.loads(read_bytes(uri))["owner"] == "second"


def test_who_renews_is_not_taken_for_gone(bucket_uri, monkeypatch):
    uri = f"{bucket_uri}/lease.json"
    with Lease.acquire(uri, "first", seconds=600) as held:
        monkeypatch.setattr(lease, "_pause", lambda seconds: held._renew())
        rewrite(uri, expires_at="2026-01-01T00:00:00Z")
        held._etag = lease.stat(uri).etag
        with pytest.raises(ConfigError, match="it is alive: wait"), Lease.acquire(uri, "second"):
            pass
        held.check()


def test_of_many_processes_one_takes_a_lease_that_was_left(bucket_uri):
    uri = f"{bucket_uri}/lease.json"
    with Lease.acquire(uri, "gone"):
        pass
    fields = {"process": "another-boot/pid:[1]#1#1", "is_released": False, "seconds": 0.4}
    rewrite(uri, expires_at="2026-01-01T00:00:00Z", **fields)
    outcomes = contend(uri, num_processes=5)
    assert sorted(outcome.code for outcome in outcomes) == [0] + [2] * 4
    refused = [outcome.error for outcome in outcomes if outcome.code]
    assert all(error.count("\n") == 1 and "is being written by" in error for error in refused)
