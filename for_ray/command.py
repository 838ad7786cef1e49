"""A job as a command: what it refuses, or what ends it, becomes one line on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from for_ray.errors import ForRayError, StageError

CLEAN_UP_SECONDS = 10.0
"""How long after a SIGTERM that interrupts a job others do not."""


@dataclass
class _Sigterm:
    """When it interrupted the job last, by the clock that only goes forward; None: never."""

    last: float | None = None


_is_command, _sigterm = threading.Event(), _Sigterm()


def is_command() -> bool:
    """Whether this process is a job that somebody waits for; its workers, and a library's user, are not."""
    return _is_command.is_set()


def run_command(job: Callable[[], None], *, advice: str = "") -> int:
    """Run a job; its exit code: 0 done, 2 refused, 1 a stage failed, 130 interrupted, 143 ended by SIGTERM.

    SIGTERM is an interrupt as Ctrl-C is: `KeyboardInterrupt` in the main thread. The job may set another
    handler.

    Args:
        job: Reads its settings, does its work, prints what came of it.
        advice: What is said to do after an interrupt.
    """
    _is_command.set()
    try:
        with _sigterm_interrupts():
            job()
    except KeyboardInterrupt as error:
        line = "; ".join(filter(None, [how_ended(error), advice]))
        print(f"error: {line}", file=sys.stderr)  # noqa: T201 - it is what a command is for
        return 128 + (signal.SIGINT if _sigterm.last is None else signal.SIGTERM)
    except ForRayError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1 if isinstance(error, StageError) else 2
    finally:
        _is_command.clear()
        _sigterm.last = None
    return 0


def how_ended(error: BaseException) -> str:
    """What has ended a job, in one line: a signal by its name, or an error's type and text."""
    if isinstance(error, KeyboardInterrupt):
        # Ray raises one of its own where it waited: the error does not know which signal it was.
        return "interrupted" if _sigterm.last is None else "stopped by SIGTERM"
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, if it has one, over a block that sets another: `ray.init`.

    Ray's ends the process in the middle: by `SystemExit` while it starts, and later by C++ that aborts.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler):
        yield
        return
    try:
        yield
    except SystemExit:
        handler(signal.SIGTERM, None)
        raise
    finally:
        _handle_sigterm(handler)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    _handle_sigterm(_interrupt)
    try:
        yield
    finally:
        _handle_sigterm(before)


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    """Interrupt the job: what comes soon after, while it cleans up, must not keep it from that.

    What comes later means that the interrupt was lost, in a callback for one, or that the clean-up hangs.
    """
    now = time.monotonic()
    if _sigterm.last is None or now - _sigterm.last >= CLEAN_UP_SECONDS:
        _sigterm.last = now
        raise KeyboardInterrupt
