"""Whose fault a failure of Ray is: an image's, a node's, an encoder's, or a function's."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.data.exceptions import UserCodeException
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayTaskError,
    UnserializableException,
    WorkerCrashedError,
)

from for_ray.errors import StageError, StorageError
from for_ray.stages.failures import crash_of, failures

NEVER_RAN = "The actor never ran - it was cancelled before it started running."
LISTED = """ray.exceptions.RayTaskError: ray::ListFiles() (pid=1, ip=192.0.2.2)
    for file_chunks in ray.get(ref):
                       ^^^^^^^^^^^^
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: FooterReader
The actor died because its node has died. Node Id: ab
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats
"""
ORPHANED = """Traceback (most recent call last):
  At least one of the input arguments for this task could not be computed:
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: MapWorker
The actor never ran - it was cancelled before it started running."""
LOST_INPUT = """Traceback (most recent call last):
ray.exceptions.ObjectReconstructionFailedError: Failed to retrieve object abc.
The object is gone."""
OF_A_READER = """Traceback (most recent call last):
ray.exceptions.OutOfMemoryError: memory ran out on its worker"""
WRAPPED = f"Failed to process the following data block:\n{NEVER_RAN}"
OF_A_FUNCTION = """\x1b[36mray::MapBatches(measured_read)()\x1b[39m (pid=1, ip=192.0.2.2)
  File "blocks.py", line 1, in read_block
{raised}

The above exception was the direct cause of the following exception:

\x1b[36mray::MapBatches(measured_read)()\x1b[39m (pid=1, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/4 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure \
`ray.data.DataContext.get_current()` (`retried_io_errors` for I/O; `retried_map_errors` and \
`max_map_retries` for any task) if you believe this to be transient."""
FULL = "OSError: [Errno 28] No space left on device: '/images'"
DIED = "ray.exceptions.WorkerCrashedError: The worker died unexpectedly while executing this task."
DIED_ACTOR = """ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: Counter
The actor is dead because its worker process has died."""
RAISED = """Traceback (most recent call last):
  File "blocks.py", line 1, in read_block
for_ray.errors.StorageError: cannot read s3://b/k: access denied"""


def never_started() -> ActorDiedError:
    cause = ActorDiedErrorContext(actor_id=16 * b"a", error_message="", never_started=True)
    return ActorDiedError(cause)


def of_a_function(raised: str) -> RayTaskError:
    """What Ray Data raises where a function of a map did; tests/ray/test_failures.py lets it."""
    cause = UserCodeException("UDF failed to process a data block.")
    return RayTaskError("read", OF_A_FUNCTION.format(raised=raised), cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("raised", "crash", "reason"),
    [
        (FULL, None, FULL),
        ("for_ray.errors.StorageError: cannot read s3://b/k: denied", None, "cannot read s3://b/k: denied"),
        ("for_ray.storage.refusals.ObjectDenied: cannot read /a: denied", None, "cannot read /a: denied"),
        ("KeyError: 'width'", None, "KeyError: 'width'"),
        ("MemoryError", None, "MemoryError"),
        ("queue.Empty", None, "queue.Empty"),
        (DIED, "The worker died unexpectedly", "The worker died unexpectedly while executing this task."),
        (DIED_ACTOR, "results went with their node", "its worker process has died"),
    ],
)
def test_the_error_of_a_function_is_no_crash_unless_it_waited_for_what_died(raised, crash, reason):
    error = of_a_function(raised)
    assert crash_of(error) is None if crash is None else crash in crash_of(error)
    with pytest.raises(StageError) as caught, failures("encode"):
        raise error
    assert str(caught.value).startswith("encode: ")
    assert reason in str(caught.value)
    assert crash is not None or str(caught.value) == f"encode: {reason}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WorkerCrashedError(), "The worker died unexpectedly"),
        (ObjectLostError("ab" * 28, None, "here"), "results went with their node"),
        (RayTaskError("write", ORPHANED, ValueError()), "a node went before its encoder had started"),
        (never_started(), "a node went before its encoder had started"),
        (UserCodeException(WRAPPED), "a node went before its encoder had started"),
        (
            RayTaskError("write", ORPHANED.replace(NEVER_RAN, "It died."), ValueError()),
            "results went with their node",
        ),
        (RayTaskError("write", LOST_INPUT, ValueError()), "results went with their node"),
        (UnserializableException(LISTED), "results went with their node"),
        (UnserializableException(RAISED), None),
        (RayTaskError("encode", OF_A_READER, ValueError()), "its worker"),
        (RayTaskError("read", RAISED, ValueError()), None),
        (ActorUnavailableError("connection refused", None), "the node of an encoder could not be reached"),
        (ActorDiedError(), None),
        (StorageError("refused"), None),
    ],
)
def test_only_what_took_processes_or_results_away_is_a_crash(error, expected):
    crash = crash_of(error)
    assert crash is None if expected is None else expected in crash
    assert "\n" not in (crash or "")


def test_a_worker_says_what_our_own_error_says():
    with pytest.raises(StageError) as caught, failures("encode"):
        raise RayTaskError("read", RAISED, ValueError())
    assert str(caught.value) == "encode: cannot read s3://b/k: access denied"


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("The actor is unavailable", None)])
def test_an_encoder_that_dies_says_what_to_do(error):
    with pytest.raises(StageError) as caught, failures("encode"):
        raise error
    assert str(caught.value).startswith("encode: the process of an encoder died 4 times at the same images")
    assert "Lower --batch-size" in str(caught.value)
