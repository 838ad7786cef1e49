"""Processes that want one lease: those that hold it, and many that are let go at the same moment."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

HOLD = """
import sys
from pathlib import Path
from for_ray.command import run_command
from for_ray.storage import Lease

def job():
    with Lease.acquire(sys.argv[1], 'holder', seconds=float(sys.argv[2])) as held:
        print('held', flush=True)
        target = sys.stdin.readline().strip()
        held.check()
        Path(target).write_text('written')

sys.exit(run_command(job))
"""
"""Takes the lease, says so, and writes the file whose path comes on its stdin if the lease is still its."""

CONTEND = """
import os, sys
from for_ray.command import run_command
from for_ray.storage import Lease, stat
from for_ray.storage.refusals import ObjectGone

def job():
    try:
        stat(sys.argv[1])  # what has to be imported and connected is
    except ObjectGone:
        pass
    print('ready', flush=True)
    sys.stdin.readline()
    with Lease.acquire(sys.argv[1], f'process {os.getpid()}', seconds=600) as held:
        held.check()
        print('held', flush=True)
        sys.stdin.read()

sys.exit(run_command(job))
"""
"""Says when it is ready, starts at a line, and holds what it got until its stdin ends."""


class Outcome(NamedTuple):
    """How a process ended: its exit code and what it said on stderr."""

    code: int
    error: str


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process with pipes to all three of its streams."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contend(uri: str, *, num_processes: int) -> list[Outcome]:
    """Let so many processes go for a lease at once; who gets it keeps it until all others have ended."""
    processes = [start(CONTEND, uri) for _ in range(num_processes)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    winners = [process for process in processes if process.stdout and process.stdout.readline() == "held\n"]
    outcomes = [_ended(process) for process in processes if process not in winners]
    return outcomes + [_ended(process) for process in winners]


def _ended(process: subprocess.Popen[str]) -> Outcome:
    error = process.communicate()[1]
    return Outcome(process.returncode, error)
