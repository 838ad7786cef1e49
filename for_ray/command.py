"""A job as a command: what it refuses becomes one line on stderr, and an exit code."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from for_ray.errors import ForRayError, StageError

_is_command = threading.Event()


def is_command() -> bool:
    """Whether this process is a job that somebody waits for; its workers, and a library's user, are not."""
    return _is_command.is_set()


def run_command(job: Callable[[], None], *, when_interrupted: str = "interrupted") -> int:
    """Run a job; its exit code: 0 done, 2 refused, 1 a stage failed in the middle, 130 interrupted.

    Args:
        job: Reads its settings, does its work, prints what came of it.
        when_interrupted: What is said on an interrupt.
    """
    _is_command.set()
    try:
        job()
    except KeyboardInterrupt:
        print(f"error: {when_interrupted}", file=sys.stderr)  # noqa: T201 - it is what a command is for
        return 130
    except ForRayError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1 if isinstance(error, StageError) else 2
    finally:
        _is_command.clear()
    return 0
