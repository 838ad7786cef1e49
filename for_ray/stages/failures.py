"""Failures of a stage in one line, wherever they come from: our own errors, the disk's, or a worker's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from for_ray.errors import ForRayError, StageError

TASK_RETRIES = 3
"""A block that kills its process this often again breaks its stage off: without a bound Ray retries it for
ever."""

UNREACHABLE, NEVER_STARTED, RESULTS_LOST = (
    "the node of an encoder could not be reached",
    "a node went before its encoder had started",
    "tasks' results went with their node",
)
OF_NODES = (UNREACHABLE, NEVER_STARTED, RESULTS_LOST)
"""Crashes that no image can have caused, but for one that takes its whole node with it."""

DEAD_ENCODER = (
    f"the process of an encoder died {TASK_RETRIES + 1} times at the same images; is it out of memory? Lower "
    "--batch-size, or give its node more, and run again: what was committed stays"
)


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


def crash_of(error: BaseException) -> str | None:
    """What killed the process of a task, or took its results away, as often as Ray tries again.

    None where the error is another one: raised by a function, or the death of an actor at its work. A
    function that waits for another task, or for its result, raises that one's crash.
    """
    from ray import exceptions

    crashes = (
        exceptions.WorkerCrashedError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
    )
    if isinstance(error, crashes):
        return _cause(error)
    if isinstance(error, exceptions.ObjectLostError):
        return RESULTS_LOST
    # Ray asks an actor again at once, and may have done so as often as it does before it sees the node gone.
    if isinstance(error, exceptions.ActorUnavailableError):
        return UNREACHABLE
    # An actor that waited for a node which went before it came; Ray Data raises it in several wrappings.
    if type(error).__module__.startswith("ray.") and _NEVER_RAN in str(error):
        return NEVER_STARTED
    # Of some errors of tasks, such as the death of an actor that one waited for, Ray brings the text alone.
    is_of_task = isinstance(error, exceptions.RayTaskError | exceptions.UnserializableException)
    named = _named_error(error) if is_of_task else None
    if named is None or named[1] != "ray.exceptions." or named[2] == "UserCodeException":
        return None
    # A task whose input went with its node, and the actor that could make it again, or list it, is no more.
    return RESULTS_LOST if named[2].startswith(("ActorDied", "Object")) else _cause(error)


def _cause(error: BaseException) -> str:
    """The last "SomeError: message" of a worker's traceback that is not Ray's own, in one line."""
    lines = _lines(error)
    for found in filter(None, map(_ERROR.fullmatch, reversed(lines))):
        if found[1].startswith("for_ray.") and found[3]:
            return found[3]
        if not found[1].startswith("ray."):
            return f"{found[2]}: {found[3]}" if found[3] else found[2]
    if _is_death_of_actor(error):
        return DEAD_ENCODER
    return lines[-1] if lines else type(error).__name__


_NEVER_RAN = "The actor never ran - it was cancelled before it started running."
"""The last line of ray 2.60's `ActorDiedError` where no process is to blame."""

_ERROR = re.compile(r"((?:\w+\.)*)((?<=\.refusals\.)\w+|\w+(?:Error|Exception))(?:: (.+))?")

_CHAINED = "\nThe above exception was the direct cause of the following exception:\n"
_WRAPPED = "ray.exceptions.UserCodeException: "
"""What Ray Data raises in place of the error of a function, whose own text stands above it."""


def _named_error(error: BaseException) -> re.Match[str] | None:
    """The last line that is "SomeError: message", taken apart."""
    return next(filter(None, map(_ERROR.fullmatch, reversed(_lines(error)))), None)


def _lines(error: BaseException) -> list[str]:
    """Of the error's text; where Ray Data wrapped the error of a function, of that one's."""
    own, chained, wrapping = str(error).rpartition(_CHAINED)
    text = own if chained and _WRAPPED in wrapping else str(error)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_death_of_actor(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)
