"""The lease on a real S3 server; its other cases are tested on disk."""

from __future__ import annotations

import datetime
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from for_ray.errors import ConfigError, StageError
from for_ray.storage import Lease, lease, read_bytes, write_bytes

pytestmark = pytest.mark.s3


def expire(uri: str) -> None:
    past = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat()
    write_bytes(uri, json.dumps(json.loads(read_bytes(uri)) | {"expires_at": past}).encode())


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


def test_an_expired_lease_is_taken_over_and_the_old_holder_knows(bucket_uri):
    uri = f"{bucket_uri}/lease.json"
    with Lease.acquire(uri, "first", seconds=600) as first:
        expire(uri)
        with Lease.acquire(uri, "second", seconds=600) as second:
            first._renew()
            second._renew()
            second.check()
            with pytest.raises(StageError, match="was lost to another run"):
                first.check()
    assert json.loads(read_bytes(uri))["owner"] == "second"


def test_of_many_runs_one_takes_an_expired_lease(bucket_uri):
    uri = f"{bucket_uri}/lease.json"
    with Lease.acquire(uri, "dead"):
        expire(uri)
    barrier = threading.Barrier(4)

    def run(number: int) -> bool:
        barrier.wait()
        try:
            lease._take(uri, str(number), seconds=600).check()
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))).count(True) == 1
