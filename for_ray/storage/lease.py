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

from pydantic import BaseModel, ConfigDict, ValidationError

from for_ray.errors import ConfigError, ForRayError, StageError, StorageError
from for_ray.storage.objects import read_bytes, stat, write_bytes
from for_ray.storage.refusals import ConditionFailed, ObjectChanged, ObjectGone
from for_ray.storage.uris import shown


class _Record(BaseModel):
    """What lies in the store: who holds the lease, since when, and until when if nobody renews it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    host: str
    process: str
    token: str
    since: datetime.datetime
    expires_at: datetime.datetime


class Lease:
    """Held while its `with` block runs; a thread renews it. Made by `Lease.acquire`.

    The object is only ever replaced by conditional writes, so of two runs one wins. It stays behind when the
    block ends, marked as expired: deleting it could delete the next holder's.
    """

    def __init__(self, uri: str, record: _Record, etag: str, seconds: float, started: float) -> None:
        self.uri = uri
        self._record = record
        self._etag = etag
        self._seconds = seconds
        self._valid_until = started + seconds
        self._is_lost = False
        self._stop = threading.Event()

    @classmethod
    @contextmanager
    def acquire(cls, uri: str, owner: str, *, seconds: float = 60) -> Iterator[Lease]:
        """Take the lease for the length of a `with` block.

        Args:
            uri: The object that is the lease.
            owner: Who asks, for the message that others get.
            seconds: How long the lease outlives a holder that is gone. Clocks of hosts must agree better than
                this. On the same machine a holder that died is found out at once.

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
        """Raise `StageError` if the lease is not surely ours any more; call it before each commit."""
        if self._is_lost or time.monotonic() >= self._valid_until:
            raise StageError(
                "lease",
                f"{shown(self.uri)} was lost to another run, or could not be renewed for {self._seconds:g} "
                "s; nothing more is written; run again when no other run writes this index",
            )

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._seconds / 3) and not self._is_lost:
            with suppress(ForRayError):  # the store is away for a moment: `check` knows when it was too long
                self._renew()

    def _renew(self) -> None:
        started = time.monotonic()
        record = self._record.model_copy(
            update={"expires_at": _now() + datetime.timedelta(seconds=self._seconds)}
        )
        try:
            self._etag = _write(self.uri, record, if_etag=self._etag)
        except ConditionFailed:
            found = _read(self.uri)
            if found is None or found[0].token != self._record.token:
                self._is_lost = True
                return
            # Ours: an earlier try got through although its answer did not.
            self._record, self._etag = found
            return
        self._record, self._valid_until = record, started + self._seconds

    def _release(self) -> None:
        if not self._is_lost:
            with suppress(StorageError):  # it expires by itself
                _write(self.uri, self._record.model_copy(update={"expires_at": _now()}), if_etag=self._etag)


def _take(uri: str, owner: str, seconds: float) -> Lease:
    token, since = secrets.token_hex(8), _now()
    found = _read(uri)
    for _ in range(5):
        if found is not None and _is_held(found[0]):
            raise _held(uri, found[0])
        started, now = time.monotonic(), _now()
        record = _Record(
            owner=owner,
            host=socket.gethostname(),
            process=_this_process(),
            token=token,
            since=since,
            expires_at=now + datetime.timedelta(seconds=seconds),
        )
        try:
            etag = _write(uri, record, if_etag=found[1] if found else None)
        except ConditionFailed:
            found = _read(uri)
            if found is None or found[0].token != token:
                continue
            record, etag = found  # an earlier try got through although its answer did not
        return Lease(uri, record, etag, seconds, started)
    raise ConfigError(f"{shown(uri)} is fought over by several runs; start one at a time")


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


def _held(uri: str, record: _Record) -> ConfigError:
    return ConfigError(
        f"{shown(uri.rpartition('/')[0])} is being written by {record.owner} on {record.host} since "
        f"{record.since:%Y-%m-%d %H:%M:%S} UTC; wait for it to end, or, if that run is dead, until "
        f"{record.expires_at:%H:%M:%S} UTC"
    )


def _is_held(record: _Record) -> bool:
    return record.expires_at > _now() and not _is_dead(record.process)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


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
