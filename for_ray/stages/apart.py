"""Decoding apart: in a child process, so that an image that kills its process takes no other with it.

A child may die of what no image did: a neighbour took the memory, or it never came to its work. One that does
not start is therefore nobody's fault, and an image is to blame when a second, fresh child ends as the first.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Self

from for_ray.errors import DataError, ForRayError
from for_ray.model.preprocess import Decoded

Decode = Callable[[bytes], Decoded]

SECONDS_TO_DECODE = 120.0
"""The largest image that `preprocess` takes needs 3 s of a core; a node has more to do than that."""

SECONDS_TO_START = 120.0
"""For a child to load what it decodes with: 0.3 s of a core, and many children may start at once."""

SECONDS_TO_END = 5.0

_READY = "ready"


class _NoAnswer(NamedTuple):
    """Why a child gave none; it is gone."""

    reason: str


class _Child(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection


class Apart:
    """A child process that decodes one image after the other; another takes its place when it dies.

    The child is started with the first image, and ends with the `with` block, or with this process.

    Args:
        decode: What the child calls; it must be importable there.
        seconds: That one image may take.
    """

    def __init__(self, decode: Decode, *, seconds: float = SECONDS_TO_DECODE) -> None:
        self._decode, self._seconds = decode, seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def decode(self, raw: bytes) -> Decoded:
        """What `decode` gives; threads take turns, so that the child's death has one image as its cause.

        Raises:
            DataError: As `decode` does, or: a child died of the image or did not come to an end with it, and
                so did a second one.
            ForRayError: No child can be started.
        """
        with self._lock:
            answer = self._ask(raw)
            if isinstance(answer, _NoAnswer):
                answer = self._ask(raw)
        if isinstance(answer, _NoAnswer):
            raise DataError(answer.reason)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, raw: bytes) -> Decoded | Exception | _NoAnswer:
        if self._child is not None and self._child.connection.poll():  # it ended while nobody asked it
            self._let_go()
        child = self._child = self._child or _start_twice(self._decode, self._seconds)
        try:
            child.connection.send_bytes(raw)
            if child.connection.poll(self._seconds):
                answer: Decoded | Exception = child.connection.recv()
                return answer
        except (EOFError, OSError):
            return _NoAnswer(f"decoding killed its process ({self._let_go()})")
        child.process.kill()
        self._let_go()
        return _NoAnswer(f"decoding did not end in {self._seconds:g} s")

    def _let_go(self) -> str:
        """Have no child; how it ended."""
        child, self._child = self._child, None
        return _end(child) if child is not None else "never started"


def _start_twice(decode: Decode, seconds: float) -> _Child:
    """A child that is ready; one that is not is tried once more.

    Raises:
        ForRayError: Neither was.
    """
    child = _start(decode, seconds)
    if isinstance(child, _NoAnswer):
        child = _start(decode, seconds)
    if isinstance(child, _NoAnswer):
        raise ForRayError(
            f"the process that decodes images apart does not start: {child.reason}; has its node memory for "
            "it, and the same package as others? No image is to blame; run again, what was committed stays"
        )
    return child


def _start(decode: Decode, seconds: float) -> _Child | _NoAnswer:
    context = multiprocessing.get_context("spawn")  # a fork would share the threads' locks, and the S3 client
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, decode, seconds), name="decoding", daemon=True)
    child = _Child(process, ours)
    try:
        process.start()
        its.close()
        if ours.poll(SECONDS_TO_START) and ours.recv() == _READY:
            return child
    except (EOFError, OSError) as error:
        # A process that was not made has no exit code; it is the error that says why.
        return _NoAnswer(str(error) if process.pid is None else _end(child))
    process.kill()
    _end(child)
    return _NoAnswer(f"it was not ready in {SECONDS_TO_START:g} s")


def _end(child: _Child) -> str:
    """Let a child go; how it ended."""
    child.connection.close()
    child.process.join(SECONDS_TO_END)
    if child.process.exitcode is None:
        child.process.kill()
        child.process.join()
    return _ending(child.process.exitcode or 0)


def _serve(connection: Connection, decode: Decode, seconds: float) -> None:
    _die_first()
    connection.send(_READY)
    while True:
        try:
            raw = connection.recv_bytes()
        except EOFError:  # nobody asks any more
            return
        # Who waits kills a child that takes too long. If nobody is left to do so, the alarm does.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            answer: Decoded | Exception = decode(raw)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _die_first() -> None:
    """Be what Linux kills when memory runs out: the task that waits then knows which image it was."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with suppress(ValueError):
        return f"signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"signal {-exit_code}"
