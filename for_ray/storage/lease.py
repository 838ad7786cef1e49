"""The lease that lets one run at a time write an index."""

from __future__ import annotations

import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from for_ray.errors import ConfigError, ForRayError, StageError, StorageError
from for_ray.storage.objects import read_bytes, stat, write_bytes
from for_ray.storage.refusals import ConditionFailed, ObjectChanged, ObjectGone
from for_ray.storage.uris import shown

FRESH_SECONDS = 3.0
"""A renewal younger than this says as much as a new one."""

NUM_LOOKS = 10
"""How often a lease that seems to be left is looked at, in half its length, before it is taken."""


class _Record(BaseModel):
    """What lies in the store: who holds the lease, since when, and until when if nobody renews it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    host: str
    process: str
    token: str
    since: datetime.datetime
    expires_at: datetime.datetime
    seconds: float = Field(60, gt=0)
    """From a renewal to `expires_at`."""
    num_renewals: int = 0
    """Tried ones count: no two writes are alike, hence no two etags, whatever the clock says."""
    is_released: bool = False


class Lease:
    """Held while its `with` block runs; a thread renews it. Made by `Lease.acquire`.

    The object is only ever replaced by conditional writes, so of two runs one wins. It stays behind when the
    block ends, marked as released: deleting it could delete the next holder's.

    No wall clock is believed where it matters. A lease that seems to be left is taken only after its object
    has stood still for longer than a holder waits between renewals, so a clock that is wrong or jumps costs
    patience, never the lease. A holder that slept, or was cut off, finds out when `check` next renews: by
    then the object is another's. What remains is the moment between `check` and the commit that follows.
    A process that is stopped just there, for longer than its lease, commits beside the next holder. Lance
    adds such a commit, it does not overwrite one; rows that are in the table twice by it are found as
    duplicates by the next run's diff, and a snapshot that was published so is followed by the next run's.
    """

    def __init__(self, uri: str, record: _Record, etag: str, confirmed_at: float) -> None:
        self.uri = uri
        self._record = record
        self._etag = etag
        self._confirmed_at = confirmed_at
        self._num_renewals = 0
        self._is_lost = False
        self._stop = threading.Event()
        self._renewing = threading.Lock()

    @classmethod
    @contextmanager
    def acquire(cls, uri: str, owner: str, *, seconds: float = 60) -> Iterator[Lease]:
        """Take the lease for the length of a `with` block.

        Args:
            uri: The object that is the lease.
            owner: Who asks, for the message that others get.
            seconds: How long the lease outlives a holder that is gone; then it is watched for half as long
                before it is taken. On the same machine a holder that died is found out at once.

        Raises:
            ConfigError: Another run holds it, or the object is no lease.
            StorageError: The store refused.
        """
        lease = _take(uri, owner, seconds)
        thread = threading.Thread(target=lease._renew_until_stopped, name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            lease._stop.set()
            thread.join()
            lease._release()

    def check(self) -> None:
        """Raise `StageError` if the lease is not surely ours any more; call it before each commit.

        Unless that was done a moment ago, the lease is renewed here and now: who took it over meanwhile is
        found out by the store, not by a clock.
        """
        longest = self._record.seconds / 3
        for _ in range(3):  # a renewal may take so long that it says nothing any more
            if self._is_lost or self._age() < min(FRESH_SECONDS, longest / 2):
                break
            try:
                self._renew()
            except ForRayError as error:
                raise StageError("lease", f"{error}; without its lease nothing more is written") from error
        if self._is_lost or self._age() >= longest:
            raise StageError(
                "lease",
                f"{shown(self.uri)} was lost to another run, or could not be renewed in time; nothing more "
                "is written; run again when no other run writes this index",
            )

    def _age(self) -> float:
        return _clock() - self._confirmed_at

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._record.seconds / 3) and not self._is_lost:
            with suppress(ForRayError):  # the store is away for a moment: `check` asks again
                self._renew()

    def _renew(self, *, is_released: bool = False) -> bool:
        """Write the next record if the object is still ours; whether it was written."""
        with self._renewing:
            started, self._num_renewals = _clock(), self._num_renewals + 1
            record = self._record.model_copy(
                update={
                    "expires_at": _now() + datetime.timedelta(seconds=self._record.seconds),
                    "num_renewals": self._num_renewals,
                    "is_released": is_released,
                }
            )
            try:
                etag = _write(self.uri, record, if_etag=self._etag)
            except ConditionFailed:
                found = _read(self.uri)
                if found is None or found[0].token != self._record.token:
                    self._is_lost = True
                    return False
                # Ours: a try got through although its answer did not, this one or one before.
                self._record, self._etag = found
                if found[0] != record:
                    return False
            else:
                self._record, self._etag = record, etag
            self._confirmed_at = started
            return True

    def _release(self) -> None:
        if self._age() >= self._record.seconds:  # it has expired: the store has been away for as long
            return
        with suppress(ForRayError):  # it expires by itself
            while not self._is_lost and not self._renew(is_released=True):
                pass


def _take(uri: str, owner: str, seconds: float) -> Lease:
    token, since = secrets.token_hex(8), _now()
    found = _read(uri)
    for _ in range(5):
        if found is not None and not _is_free(found[0]):
            found = _watch(uri, *found)
        started, now = _clock(), _now()
        record = _Record(
            owner=owner,
            host=socket.gethostname(),
            process=_this_process(),
            token=token,
            since=since,
            expires_at=now + datetime.timedelta(seconds=seconds),
            seconds=seconds,
        )
        try:
            etag = _write(uri, record, if_etag=found[1] if found else None)
        except ConditionFailed:
            found = _read(uri)
            if found is None or found[0].token != token:
                continue
            record, etag = found  # an earlier try got through although its answer did not
        return Lease(uri, record, etag, started)
    raise ConfigError(f"{shown(uri)} is fought over by several runs; start one at a time")


def _watch(uri: str, record: _Record, etag: str) -> tuple[_Record, str] | None:
    """What lies there when it is free to be taken: its holder is gone, or let it go meanwhile.

    Raises:
        ConfigError: It is held.
    """
    seconds_left = (record.expires_at - _now()).total_seconds()
    if 0 < seconds_left <= record.seconds:
        end = f"wait for it to end, or, if that run is dead, until {record.expires_at:%H:%M:%S} UTC"
        raise _held(uri, record, end)
    # It expired, or it expires later than a right clock could have said: its holder may live with a wrong
    # clock, or we do. Who lives renews it three times in its length.
    found: tuple[_Record, str] | None = record, etag
    for _ in range(NUM_LOOKS):
        _pause(record.seconds / 2 / NUM_LOOKS)
        found = _read(uri)
        if found is None or _is_free(found[0]):
            break
        if found[1] != etag:
            raise _held(uri, found[0], "it is alive: wait for it to end")
    return found


def _write(uri: str, record: _Record, *, if_etag: str | None) -> str:
    content = record.model_dump_json(indent=1).encode() + b"\n"
    return write_bytes(uri, content, if_absent=if_etag is None, if_etag=if_etag)


def _read(uri: str) -> tuple[_Record, str] | None:
    """The record with its etag; nothing where there is no lease."""
    for _ in range(20):
        try:
            etag = stat(uri).etag
            return _Record.model_validate_json(read_bytes(uri, etag=etag)), etag
        except ObjectGone:
            return None
        except ObjectChanged:
            continue
        except ValidationError as error:
            raise ConfigError(
                f"{shown(uri)} is not a lease of for_ray; delete it if no run writes this index"
            ) from error
    raise StorageError(f"cannot read {shown(uri)}: it keeps changing; run again")


def _held(uri: str, record: _Record, remedy: str) -> ConfigError:
    return ConfigError(
        f"{shown(uri.rpartition('/')[0])} is being written by {record.owner} on {record.host} since "
        f"{record.since:%Y-%m-%d %H:%M:%S} UTC; {remedy}"
    )


def _is_free(record: _Record) -> bool:
    return record.is_released or _is_dead(record.process)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _clock() -> float:
    """Seconds that go on while the machine sleeps, where the system counts them, and that nobody sets."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _pause(seconds: float) -> None:
    time.sleep(seconds)  # as long as this machine is awake


def _this_process() -> str:
    """Machine, pid namespace, pid and start time of this process; empty where Linux's /proc is missing."""
    pid = str(os.getpid())
    return f"{_machine()}#{pid}#{_start_time(pid)}" if _machine() else ""


def _is_dead(process: str) -> bool:
    """Whether a process surely ended: it ran on this very machine and pid namespace, and is not there."""
    machine, _, rest = process.partition("#")
    pid, _, started = rest.partition("#")
    return bool(machine) and machine == _machine() and _start_time(pid) != started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers may share a boot id and a host name, but never a pid namespace.
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_time(pid: str) -> str:
    """In clock ticks since boot; empty when there is no such process, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
