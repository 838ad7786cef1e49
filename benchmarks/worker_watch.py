"""What Ray's workers take while something runs: CPU time and memory, as the kernel counts them."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path

SAMPLE_SECONDS, FIND_SECONDS = 0.01, 0.25
"""Memory is read so often; new workers are looked for so often."""


class Watch:
    """This process's Ray workers, while the block runs.

    Attributes:
        private: Bytes that are one worker's own, at its peak.
        resident: Likewise, with the files that it maps.
    """

    def __init__(self) -> None:
        self.private = self.resident = 0
        self._began: dict[int, float] = {}
        self._busy: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def busy(self) -> float:
        """CPU seconds of all of them in the block."""
        return sum(seconds - self._began.get(pid, 0.0) for pid, seconds in self._busy.items())

    def __enter__(self) -> Watch:
        self._began = {pid: _cpu_seconds(pid) for pid in _workers()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        pids, found = _workers(), time.monotonic()
        while True:
            is_last = self._ended.wait(SAMPLE_SECONDS)
            if time.monotonic() - found > FIND_SECONDS:
                pids, found = _workers(), time.monotonic()
            for pid in pids:
                private, resident = _memory(pid)
                self.private, self.resident = max(self.private, private), max(self.resident, resident)
                self._busy[pid] = max(self._busy.get(pid, 0.0), _cpu_seconds(pid))
            if is_last:
                return


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process that are its own now, and the most that it had resident; 0 of one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status, re.MULTILINE))
    return 1024 * int(found.get("RssAnon", 0)), 1024 * int(found.get("VmHWM", 0))


def _cpu_seconds(pid: int) -> float:
    """Of a process so far; 0 of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _workers() -> list[int]:
    """Ray workers among the descendants of this process."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, wave = set(), {os.getpid()}
    while wave:
        found |= wave
        wave = {pid for pid, parent in parents.items() if parent in wave} - found
    return [pid for pid in found - {os.getpid()} if _title(pid).startswith("ray::")]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
