"""Failures of a stage in one line, wherever they come from: our own errors, the disk's, or a worker's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from for_ray.errors import ForRayError, StageError


@contextlib.contextmanager
def failures(stage: str) -> Iterator[None]:
    """What fails once the index has been written to is a `StageError`, and one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("ray."):  # also where Ray mixes its own type with ours
            raise StageError(stage, _cause(error)) from error
        if isinstance(error, ForRayError | OSError) and not isinstance(error, StageError):
            raise StageError(stage, str(error)) from error
        raise


def _cause(error: BaseException) -> str:
    """The last "SomeError: message" of a worker's traceback that is not Ray's own, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        found = re.fullmatch(r"((?:\w+\.)*)(\w+(?:Error|Exception)): (.+)", line)
        if found and not found[1].startswith("ray."):
            return found[3] if found[1].startswith("for_ray.") else f"{found[2]}: {found[3]}"
    return lines[-1] if lines else type(error).__name__
