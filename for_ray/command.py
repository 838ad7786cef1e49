"""A job as a command: what it refuses becomes one line on stderr, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from for_ray.errors import ForRayError, StageError


def run_command(job: Callable[[], None], *, when_interrupted: str = "interrupted") -> int:
    """Run a job; its exit code: 0 done, 2 refused, 1 a stage failed in the middle, 130 interrupted.

    Args:
        job: Reads its settings, does its work, prints what came of it.
        when_interrupted: What is said on an interrupt.
    """
    try:
        job()
    except KeyboardInterrupt:
        print(f"error: {when_interrupted}", file=sys.stderr)  # noqa: T201 - it is what a command is for
        return 130
    except ForRayError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1 if isinstance(error, StageError) else 2
    return 0
