from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from for_ray.errors import ConfigError, StageError, StorageError
from for_ray.storage import Lease, lease, write_bytes


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "index" / "lease.json")


def rewrite(uri: str, **fields: str) -> None:
    path = Path(uri)
    write_bytes(uri, json.dumps(json.loads(path.read_text()) | fields).encode())


def from_now(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()


def test_a_second_run_is_told_who_writes(uri):
    with Lease.acquire(uri, "index nightly") as held:
        message = r"index is being written by index nightly on \S+ since 20\d\d-.* UTC; wait for it to end"
        with pytest.raises(ConfigError, match=message), Lease.acquire(uri, "another"):
            pass
        held.check()


def test_a_lease_is_free_when_its_block_ends(uri):
    for owner in ("first", "second"):
        with Lease.acquire(uri, owner) as held:
            held.check()
    with pytest.raises(KeyError), Lease.acquire(uri, "third"):
        raise KeyError
    with Lease.acquire(uri, "fourth") as held:
        held.check()


def test_an_expired_lease_is_taken_over_and_the_old_holder_knows(uri):
    with Lease.acquire(uri, "first", seconds=600) as first:
        rewrite(uri, expires_at=from_now(-1))
        with Lease.acquire(uri, "second") as second:
            first._renew()
            second.check()
            with pytest.raises(StageError, match=r"lease: .* was lost to another run"):
                first.check()
    assert json.loads(Path(uri).read_text())["owner"] == "second"


def test_a_holder_that_was_killed_is_found_out_at_once(uri):
    code = (
        "import sys; from for_ray.storage import Lease\n"
        "with Lease.acquire(sys.argv[1], 'killed', seconds=600): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="written by killed"), Lease.acquire(uri, "next"):
        pass
    process.kill()
    process.communicate()
    with Lease.acquire(uri, "next") as held:
        held.check()


@pytest.mark.parametrize("process", ["", "another-boot/pid:[1]#1#1"])
def test_a_holder_elsewhere_is_believed(uri, process):
    with Lease.acquire(uri, "first"):
        pass
    rewrite(uri, process=process, expires_at=from_now(30))
    with pytest.raises(ConfigError, match="written by first"), Lease.acquire(uri, "second"):
        pass


def test_renewing_moves_the_expiry(uri, monkeypatch):
    with Lease.acquire(uri, "first", seconds=600) as held:
        before = json.loads(Path(uri).read_text())["expires_at"]
        until = held._valid_until
        held._renew()
        assert json.loads(Path(uri).read_text())["expires_at"] > before
        assert held._valid_until > until


def test_the_thread_renews(uri, monkeypatch):
    renewed = threading.Event()
    monkeypatch.setattr(Lease, "_renew", lambda self: renewed.set())
    with Lease.acquire(uri, "first", seconds=0.03):
        assert renewed.wait(10)


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(uri, monkeypatch):
    clock = lease.time.monotonic()
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock)
    with Lease.acquire(uri, "first", seconds=60) as held:
        monkeypatch.setattr(lease, "write_bytes", refuse)
        clock += 59
        with contextlib.suppress(StorageError):
            held._renew()
        held.check()
        clock += 2
        with pytest.raises(StageError, match="could not be renewed for 60 s"):
            held.check()


def refuse(*_: object, **__: object) -> str:
    raise StorageError("cannot write: the store is away")


def test_an_answer_that_was_lost_does_not_lose_the_lease(uri, monkeypatch):
    written = lease.write_bytes

    def twice(*arguments, **conditions):
        written(*arguments, **conditions)  # got through, but its answer did not: the client tries again
        return written(*arguments, **conditions)

    monkeypatch.setattr(lease, "write_bytes", twice)
    with Lease.acquire(uri, "first", seconds=600) as held:
        held.check()
        held._renew()
        held._renew()
        held.check()


def test_of_many_runs_one_gets_it(uri):
    barrier = threading.Barrier(8)

    def run(number: int) -> bool:
        barrier.wait()
        try:
            lease._take(uri, str(number), seconds=600).check()
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))).count(True) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_another_file_is_no_lease(uri, content):
    write_bytes(uri, content)
    with (
        pytest.raises(ConfigError, match=r"lease\.json is not a lease of for_ray"),
        Lease.acquire(uri, "first"),
    ):
        pass
