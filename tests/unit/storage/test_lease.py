from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from for_ray.errors import ConfigError, StageError, StorageError
from for_ray.storage import Lease, lease, write_bytes
from tests.contenders import HOLD, contend, start

DAY = 86_400.0
ELSEWHERE = "another-boot/pid:[1]#1#1"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "index" / "lease.json")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


class FakeClock:
    """Stands in for both clocks of the lease, and for its waiting; the thread that renews waits for ever."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        self.offset = 0.0
        """By how much the wall clock is wrong."""
        self.on_pause: Callable[[], object] = lambda: None
        self.num_pauses = 0
        patch.setattr(lease, "_clock", lambda: self.seconds)
        patch.setattr(lease, "_now", self.now)
        patch.setattr(lease, "_pause", self.pause)
        patch.setattr(Lease, "_renew_until_stopped", lambda self: None)

    def now(self) -> datetime.datetime:
        start = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC)
        return start + datetime.timedelta(seconds=self.seconds + self.offset)

    def pause(self, seconds: float) -> None:
        self.seconds += seconds
        self.num_pauses += 1
        self.on_pause()


def rewrite(uri: str, **fields: object) -> None:
    path = Path(uri)
    write_bytes(uri, json.dumps(json.loads(path.read_text()) | fields).encode())


def record(uri: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(uri).read_text())
    return found


def leave(uri: str, **fields: object) -> None:
    """A lease whose holder is gone without a word, on a machine that nobody here can look into."""
    with Lease.acquire(uri, "gone"):
        pass
    rewrite(uri, process=ELSEWHERE, is_released=False, **fields)


def test_a_second_run_is_told_who_writes(uri):
    with Lease.acquire(uri, "index nightly") as held:
        message = r"index is being written by index nightly on \S+ since 20\d\d-.* UTC; wait for it to end"
        with pytest.raises(ConfigError, match=message), Lease.acquire(uri, "another"):
            pass
        held.check()


def test_a_lease_is_free_when_its_block_ends(uri, clock):
    for owner in ("first", "second"):
        with Lease.acquire(uri, owner) as held:
            held.check()
    with pytest.raises(KeyError), Lease.acquire(uri, "third"):
        raise KeyError
    with Lease.acquire(uri, "fourth") as held:
        held.check()
    assert clock.num_pauses == 0


def test_a_lease_that_was_left_is_watched_then_taken_and_the_old_holder_knows(uri, clock):
    with Lease.acquire(uri, "first", seconds=600) as first:
        clock.seconds += 601
        with Lease.acquire(uri, "second", seconds=600) as second:
            assert clock.seconds == pytest.approx(1000 + 601 + 300)
            second.check()
            with pytest.raises(StageError, match=r"lease: .* was lost to another run"):
                first.check()
            second.check()
    assert record(uri)["owner"] == "second"


def test_who_slept_past_its_expiry_goes_on_if_nobody_came(uri, clock):
    with Lease.acquire(uri, "first", seconds=60) as held:
        clock.seconds += 3600
        held.check()
        assert record(uri)["num_renewals"] == 1
        with pytest.raises(ConfigError, match="written by first"), Lease.acquire(uri, "second"):
            pass


def test_a_check_asks_the_store_unless_it_just_has(uri, clock):
    with Lease.acquire(uri, "first", seconds=60) as held:
        clock.seconds += 2.9
        held.check()
        assert record(uri)["num_renewals"] == 0
        clock.seconds += 0.2
        held.check()
        assert record(uri)["num_renewals"] == 1


def test_a_holder_whose_clock_stands_still_is_refused_by_the_store(uri, clock):
    with Lease.acquire(uri, "first", seconds=60) as first:
        rewrite(uri, token="another")
        clock.seconds += 4  # to its own clocks the lease has 56 s to go
        with pytest.raises(StageError, match="was lost to another run"):
            first.check()


@pytest.mark.parametrize(("holder", "taker"), [(DAY, 0), (-DAY, 0), (0, DAY), (0, -DAY), (300, -300)])
def test_a_wrong_clock_takes_nothing_from_who_renews(uri, clock, holder, taker):
    clock.offset = holder
    with Lease.acquire(uri, "first", seconds=60) as held:

        def renew() -> None:
            if clock.num_pauses % 7 == 0:  # every 21 s: its thread would, every 20 s
                clock.offset = holder
                held._renew()
                clock.offset = taker

        clock.on_pause, clock.offset = renew, taker
        with (
            pytest.raises(ConfigError, match=r"written by first .* it is alive"),
            Lease.acquire(uri, "second"),
        ):
            pass
        assert clock.num_pauses == 7
        held.check()


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_clock_that_jumps_under_its_holder_changes_nothing(uri, clock, jump):
    with Lease.acquire(uri, "first", seconds=60) as held:
        held._renew()
        clock.offset = jump
        clock.seconds += 10
        held._renew()
        held.check()
        clock.offset = 0
        held._renew()
        held.check()
        with pytest.raises(ConfigError, match="written by first"), Lease.acquire(uri, "second"):
            pass


@pytest.mark.parametrize("expiry", ["2026-11-24T00:00:00Z", "2026-11-25T01:00:00Z"])
def test_an_expiry_in_the_past_or_too_far_ahead_is_no_proof_of_life(uri, clock, expiry):
    leave(uri, expires_at=expiry)
    with Lease.acquire(uri, "second") as held:
        held.check()
    assert clock.num_pauses == lease.NUM_LOOKS
    assert clock.seconds == pytest.approx(1000 + 30)


def test_who_waits_for_one_that_ends_well_gets_it_at_once(uri, clock):
    leave(uri, expires_at="2026-11-24T00:00:00Z")
    clock.on_pause = lambda: rewrite(uri, is_released=True)
    with Lease.acquire(uri, "second") as held:
        held.check()
    assert clock.num_pauses == 1


def test_who_waits_is_told_when_another_was_faster(uri, clock):
    leave(uri, expires_at="2026-11-24T00:00:00Z")
    clock.on_pause = lambda: rewrite(uri, owner="faster", token="another")
    with pytest.raises(ConfigError, match="written by faster"), Lease.acquire(uri, "second"):
        pass


@pytest.mark.parametrize("process", ["", ELSEWHERE])
def test_a_holder_elsewhere_is_believed(uri, clock, process):
    with Lease.acquire(uri, "first"):
        pass
    rewrite(uri, process=process, is_released=False, expires_at=(clock.now()).isoformat())
    clock.seconds -= 30
    with (
        pytest.raises(ConfigError, match=r"written by first .* if that run is dead, until 00:16:40 UTC"),
        Lease.acquire(uri, "second"),
    ):
        pass
    assert clock.num_pauses == 0


def test_a_record_of_before_is_read(uri, clock):
    leave(uri, expires_at="2026-11-24T00:00:00Z")
    old = record(uri)
    for name in ("seconds", "num_renewals", "is_released"):
        del old[name]
    write_bytes(uri, json.dumps(old).encode())
    with Lease.acquire(uri, "second") as held:
        held.check()
    assert clock.num_pauses == lease.NUM_LOOKS


def test_a_holder_that_was_killed_is_found_out_at_once(uri):
    process = start(HOLD, uri, 600)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="written by holder"), Lease.acquire(uri, "next"):
        pass
    process.kill()
    process.communicate()
    with Lease.acquire(uri, "next") as held:
        held.check()


def test_the_thread_renews(uri, monkeypatch):
    renewed = threading.Event()
    monkeypatch.setattr(Lease, "_renew", lambda self, **_: renewed.set() or True)
    with Lease.acquire(uri, "first", seconds=0.03):
        assert renewed.wait(10)


def test_the_clock_goes_on_while_the_machine_sleeps():
    assert lease._clock() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=5)


def refuse(*_: object, **__: object) -> str:
    raise StorageError("cannot write: the store is away")


def test_a_lease_that_cannot_be_renewed_is_no_leave_to_write(uri, clock, monkeypatch):
    with Lease.acquire(uri, "first", seconds=60) as held:
        monkeypatch.setattr(lease, "write_bytes", refuse)
        with contextlib.suppress(StorageError):
            held._renew()
        clock.seconds += 2
        held.check()
        clock.seconds += 2
        with pytest.raises(StageError, match="lease: cannot write: the store is away; without its lease"):
            held.check()


def test_a_renewal_that_took_too_long_is_made_again(uri, clock, monkeypatch):
    written, delays = lease.write_bytes, [30.0, 25.0, 1.0]

    def slowly(*arguments: object, **conditions: object) -> str:
        clock.seconds += delays.pop(0)
        return written(*arguments, **conditions)

    with Lease.acquire(uri, "first", seconds=60) as held:
        monkeypatch.setattr(lease, "write_bytes", slowly)
        clock.seconds += 10
        held.check()
        assert delays == []
        delays += [30.0] * 3
        clock.seconds += 10
        with pytest.raises(StageError, match="could not be renewed in time"):
            held.check()
        monkeypatch.undo()


def test_an_answer_that_was_lost_does_not_lose_the_lease(uri, clock, monkeypatch):
    written = lease.write_bytes

    def twice(*arguments: object, **conditions: object) -> str:
        written(*arguments, **conditions)  # got through, but its answer did not: the client tries again
        return written(*arguments, **conditions)

    def then_fail(*arguments: object, **conditions: object) -> str:
        written(*arguments, **conditions)
        return refuse()

    monkeypatch.setattr(lease, "write_bytes", twice)
    with Lease.acquire(uri, "first", seconds=600) as held:
        held.check()
        assert held._renew()
        assert held._renew()
        clock.seconds += 10
        held.check()
        monkeypatch.setattr(lease, "write_bytes", then_fail)
        with pytest.raises(StorageError):
            held._renew()
        monkeypatch.setattr(lease, "write_bytes", written)
        clock.seconds += 10
        assert not held._renew()  # finds its own, which says nothing of now
        held.check()
        monkeypatch.setattr(lease, "write_bytes", twice)
    assert record(uri)["is_released"] is True


def test_of_many_processes_one_gets_it(uri):
    outcomes = contend(uri, num_processes=8)
    assert sorted(outcome.code for outcome in outcomes) == [0] + [2] * 7
    refused = [outcome.error for outcome in outcomes if outcome.code]
    assert all(error.count("\n") == 1 for error in refused)
    assert all("is being written by" in error for error in refused)


def test_of_many_processes_one_takes_a_lease_that_was_left(uri):
    leave(uri, expires_at="2026-01-01T00:00:00Z", seconds=0.4)
    outcomes = contend(uri, num_processes=6)
    assert sorted(outcome.code for outcome in outcomes) == [0] + [2] * 5


def test_a_process_that_slept_past_its_lease_writes_nothing_any_more(uri, tmp_path):
    process = start(HOLD, uri, 1)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        try:
            second = _take_when_it_may(stack, uri)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        written, error = process.communicate(f"{tmp_path / 'written'}\n")
        second.check()
    assert process.returncode == 1
    assert "lease.json was lost to another run" in error.splitlines()[-1]
    assert (written, (tmp_path / "written").exists()) == ("", False)


def _take_when_it_may(stack: contextlib.ExitStack, uri: str) -> Lease:
    for _ in range(1000):  # each look takes a moment, the last half the lease's length
        with contextlib.suppress(ConfigError):
            return stack.enter_context(Lease.acquire(uri, "second", seconds=600))
        subprocess.run([sys.executable, "-c", ""], check=True)
    raise AssertionError("the lease never came free")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_another_file_is_no_lease(uri, content):
    write_bytes(uri, content)
    with (
        pytest.raises(ConfigError, match=r"lease\.json is not a lease of for_ray"),
        Lease.acquire(uri, "first"),
    ):
        pass
